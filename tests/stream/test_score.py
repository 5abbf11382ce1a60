import math
import sys

import numpy as np
import pytest

from stream.score import (
    Diarization,
    Edits,
    ScoreError,
    Span,
    character_errors,
    diarization_error,
    equal_error,
    label_swaps,
    percentile,
    plain,
    read_rttm,
    speaker_count_error,
    speaker_mapping,
    word_errors,
    write_rttm,
)


def test_the_three_parts_of_the_error():
    """By hand: A speaks 0–10, B 8–14; said are x 1–9 and y 9–16."""
    reference = [Span(0, 10, "A"), Span(8, 14, "B")]
    hypothesis = [Span(1, 9, "x"), Span(9, 16, "y")]
    error = diarization_error(reference, hypothesis, 20)
    # 0–1 nobody for A; 8–9 one of two; 9–10 one of two; 14–16 nobody speaks.
    assert error == Diarization(total_s=16, miss_s=3, false_alarm_s=2, confusion_s=0)
    assert error.rate == pytest.approx(5 / 16)
    assert (error.miss, error.false_alarm) == pytest.approx((3 / 16, 2 / 16))
    assert speaker_mapping(reference, hypothesis) == {"x": "A", "y": "B"}


def test_confusion_is_what_the_best_mapping_leaves():
    reference = [Span(0, 6, "A"), Span(6, 10, "B")]
    error = diarization_error(reference, [Span(0, 10, "x")], 10)
    assert error == Diarization(total_s=10, confusion_s=4)
    assert error.confusion == 0.4


def test_the_collar_is_on_either_side_of_each_boundary():
    reference, hypothesis = [Span(1, 5, "A")], [Span(1.5, 5.5, "x")]
    error = diarization_error(reference, hypothesis, 10, collar_s=0.25)
    # Scored: 0–0.75, 1.25–4.75, 5.25–10.
    assert error.total_s == pytest.approx(3.5)
    assert error.miss_s == pytest.approx(0.25)
    assert error.false_alarm_s == pytest.approx(0.25)


def test_nothing_said_is_all_missed_and_nothing_spoken_has_no_rate():
    assert diarization_error([Span(0, 2, "A")], [], 5) == Diarization(total_s=2, miss_s=2)
    error = diarization_error([], [Span(0, 2, "x")], 5)
    assert error == Diarization(false_alarm_s=2)
    assert math.isnan(error.rate)


def test_errors_add_up():
    total = Diarization(10, 1, 2, 3) + Diarization(10, 0, 0, 4)
    assert total == Diarization(20, 1, 2, 7)
    assert total.rate == 0.5
    assert Edits(4, 1, 1, 0) + Edits(6, 0, 0, 3) == Edits(10, 1, 1, 3)


def test_speakers_too_many_and_too_few():
    one, two = [Span(0, 1, "A")], [Span(0, 1, "x"), Span(1, 2, "y")]
    assert speaker_count_error(one, two) == 1
    assert speaker_count_error(two, one) == -1


def test_label_swaps():
    reference = [
        Span(0, 2, "A"),
        Span(2, 4, "B"),
        Span(4, 6, "A"),
        Span(6, 8, "B"),
        Span(8, 10, "A"),
        Span(10, 12, "A"),
    ]
    hypothesis = [
        Span(0, 2, "x"),
        Span(2, 4, "y"),
        Span(4, 4.9, "x"),
        Span(4.9, 6, "y"),  # A is y now …
        Span(6, 8, "y"),
        Span(10, 12, "x"),  # … and x again; 8–10 has nobody
    ]
    assert label_swaps(reference, hypothesis) == 2
    assert label_swaps(reference, []) == 0


def test_words_and_characters():
    assert plain("Don’t STOP — it's “OK”, 'said' he_1.") == "don't stop it's ok said he 1"
    errors = word_errors("The cat sat on the mat.", "the cat sit on mat")
    assert errors == Edits(total=6, substitutions=1, deletions=1, insertions=0)
    assert errors.rate == pytest.approx(1 / 3)
    assert word_errors("a b", "a b c") == Edits(total=2, insertions=1)
    assert character_errors("abc d", "abd de") == Edits(5, 1, 0, 1)
    assert word_errors("", "two words") == Edits(insertions=2)
    assert math.isnan(word_errors("", "").rate)
    assert word_errors("one two", "") == Edits(2, 0, 2, 0)
    assert character_errors("", "ab") == Edits(insertions=2)


def test_equal_error_by_hand():
    result = equal_error([0.1, 0.2, 0.6, 0.3, 0.7, 0.8], [0, 0, 0, 1, 1, 1])
    # From 0.6 on: one of three false (0.6), one of three rejected (0.3).
    assert result.rate == pytest.approx(1 / 3)
    assert result.threshold == 0.6
    perfect = equal_error([1, 2, 3, 4], [0, 0, 1, 1])
    assert (perfect.rate, perfect.threshold) == (0, 3)
    useless = equal_error([5, 5, 5, 5], [0, 1, 0, 1])
    assert useless.rate == 0.5


def test_equal_error_of_two_normals():
    rng = np.random.default_rng(0)
    scores = np.r_[rng.normal(0, 1, 20000), rng.normal(2, 1, 20000)]
    result = equal_error(scores, np.arange(40000) >= 20000)
    assert result.rate == pytest.approx(0.1587, abs=0.005)
    assert result.threshold == pytest.approx(1, abs=0.05)


def test_equal_error_refuses_what_has_no_answer():
    with pytest.raises(ValueError, match="got 2 same and 0 different"):
        equal_error([1, 2], [True, True])
    with pytest.raises(ValueError, match=r"expected two \[N\], got \(2,\) and \(3,\)"):
        equal_error([1, 2], [True, False, True])


def test_percentiles():
    values = [float(v) for v in range(1, 101)]
    assert percentile(values, 50) == 50
    assert percentile(values, 99) == 99
    assert percentile([7.0], 99) == 7
    assert percentile([3, 1, 2], 0) == 1
    assert math.isnan(percentile([], 50))


def test_rttm_survives_the_round_trip(tmp_path):
    path = tmp_path / "a.rttm"
    files = {"one": [Span(0.5, 1.25, "A"), Span(1, 3.002, "B")], "two": [Span(0, 1, "C D")]}
    write_rttm(path, files)
    lines = path.read_text().splitlines()
    assert lines[0] == "SPEAKER one 1 0.500 0.750 <NA> <NA> A <NA> <NA>"
    read = read_rttm(path)
    assert list(read) == ["one", "two"]
    assert [(s.start, round(s.end, 3), s.speaker) for s in read["one"]] == [
        (0.5, 1.25, "A"),
        (1, 3.002, "B"),
    ]
    assert read["two"] == [Span(0, 1, "C_D")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("SPEAKER f 1 0.5", r"x.rttm:3: expected 10 columns, got 4"),
        ("SPEAKER f 1 x 1 <NA> <NA> A <NA> <NA>", r"x.rttm:3: expected seconds, got 'x'"),
        ("SPEAKER f 1 nan 1 <NA> <NA> A <NA> <NA>", r"x.rttm:3: expected seconds, got 'nan'"),
        ("SPEAKER f 1 0 -1 <NA> <NA> A <NA> <NA>", r"x.rttm:3: expected times ≥ 0"),
        ("0.5 1.5 A", r"x.rttm:3: expected an RTTM line"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "x.rttm"
    path.write_text(f";; comment\nSPKR-INFO f 1 <NA> <NA> <NA> unknown A <NA>\n{line}\n")
    with pytest.raises(ScoreError, match=message):
        read_rttm(path)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ScoreError, match=r"none.rttm: cannot be read \(No such file"):
        read_rttm(tmp_path / "none.rttm")
    (tmp_path / "b.rttm").write_bytes(b"\xff\xfe")
    with pytest.raises(ScoreError, match="not UTF-8"):
        read_rttm(tmp_path / "b.rttm")


def test_a_missing_scorer_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(ScoreError, match=r"jiwer is not installed; .*livesat\[eval\]"):
        word_errors("a", "b")
    monkeypatch.setitem(sys.modules, "pyannote.metrics", None)
    with pytest.raises(ScoreError, match=r"pyannote.metrics is not installed"):
        diarization_error([], [], 1)
