import gzip
import itertools
import math
import sys

import numpy as np
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.clock import HOP
from stream.evaluate import flicker
from stream.tracks.decoding import Beam, BeamState, Symbols
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import BEGIN, LanguageModel, LanguageModelError, open_language_model
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings, WordsSettings
from tests.stream.tracks.scenes import Stamper, Talk, embed, finals, scene, split

ARPA = """\
\\data\\
ngram 1=10
ngram 2=6

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.2
-1.0\t</s>
-1.0\tTHE\t-0.5
-1.0\tCAT\t-0.3
-1.2\tCATS
-1.0\tSAT\t-0.3
-1.0\tON\t-0.3
-1.5\tMAT
-1.5\tHAT

\\2-grams:
-0.2\t<s> THE
-0.3\tTHE CAT
-0.6\tTHE MAT
-0.3\tCAT SAT
-0.3\tSAT ON
-0.3\tON THE

\\end\\
"""
TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ACEHKMNOSTXZ")
VOCABULARY = Vocabulary(TOKENS, blank=0, delimiter="|")
SETTINGS = TracksSettings()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("lm") / "language_model.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.encode()))
    return path


@pytest.fixture(scope="module")
def language(file):
    return LanguageModel.load(file)


def ctc(written, *, hold=1, gap=1):
    """Symbols of (character → probability) dicts or single characters → log-probabilities."""
    rows = [np.eye(len(TOKENS))[0]] * 5
    for symbol in written:
        chances = symbol if isinstance(symbol, dict) else {symbol: 0.95}
        row = np.zeros(len(TOKENS))
        for character, chance in chances.items():
            row[TOKENS.index(character)] = chance
        row[0] += 1 - row.sum()
        rows += [row] * hold + [np.eye(len(TOKENS))[0]] * gap
    rows += [np.eye(len(TOKENS))[0]] * 50
    table = np.array(rows) + 1e-5
    return np.log(table / table.sum(1, keepdims=True)).astype(np.float32)


def noisy(text, rng, margin=4.0):
    """A text as a weak acoustic model sees it: each character a guess among all."""
    rows = [np.eye(len(TOKENS))[0] * 12] * 10
    for character in text:
        row = rng.normal(0, 1.5, len(TOKENS))
        row[1:4] = -9
        row[0] = 1
        row[TOKENS.index(character)] += margin
        rows += [row] * int(rng.integers(1, 3)) + [np.eye(len(TOKENS))[0] * 8] * 2
    rows += [np.eye(len(TOKENS))[0] * 12] * 60
    table = np.array(rows)
    return (table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32)


def run(scores, language, config=SETTINGS, *, cuts=(), saved=(), talks=()):
    def build():
        return Tracks(
            config, embed=embed, vocabulary=VOCABULARY, language=language, stamp=Stamper()
        )

    audio = scene(talks, len(scores)) if talks else None
    frames = Frames(
        0,
        None if audio is None else audio.activity,
        None if audio is None else audio.voice,
        scores,
        voice_delay=7 if talks else 0,
    )
    tracks, events = build(), []
    for index, piece in enumerate(split(frames, cuts)):
        if index in saved:
            data = tracks.freeze()()
            tracks = build()
            tracks.restore(data)
            assert tracks.freeze()() == data
        events += tracks.step(piece)
    return events + tracks.flush(frames.end)


def said(events):
    return " ".join(e.text for e in events if e.type == "transcript.final")


# -- the language model ---------------------------------------------------------------------------


def test_words_have_the_probabilities_of_the_file(language):
    def log10(history, word):
        return language.word(history, word) / math.log(10)

    assert language.order == 2
    assert log10(("the",), "cat") == pytest.approx(-0.3)
    assert log10(("THE",), "Cat") == pytest.approx(-0.3)
    assert log10((BEGIN,), "the") == pytest.approx(-0.2)
    assert log10(("the",), "hat") == pytest.approx(-0.5 - 1.5)
    assert log10((), "hat") == pytest.approx(-1.5)
    assert log10(("xoz",), "hat") == pytest.approx(-1.5)


def test_begun_words_have_the_probability_of_all_that_begin_so(language):
    unseen = 10**-1.5
    spelling = language._spelling
    exact = 10**-1.0 + 10**-1.2 + unseen * math.exp(spelling.prefix("ca"))
    assert math.exp(language.prefix("CA")) == pytest.approx(exact)
    assert math.exp(language.prefix("xz")) == pytest.approx(
        unseen * math.exp(spelling.prefix("xz"))
    )


def test_an_unseen_word_is_spelled(language):
    score = language.word((), "tat")
    assert score == pytest.approx(math.log(10) * -1.5 + language._spelling.word("tat"))
    assert score > language.word((), "xoz") > language.word((), "xoz1") > -60


def test_spellings_are_probabilities(language):
    spelling = language._spelling
    for before in ("", "c", "ca", "xx"):
        total = sum(
            math.exp(spelling.prefix(before + letter) - spelling.prefix(before))
            for letter in "acehmnost"
        )
        end = math.exp(spelling.word(before) - spelling.prefix(before))
        assert total + end == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, r"none.arpa: expected a language model .*: No such file"),
        (b"\xff\xfe\x00", r"none.arpa: expected a language model"),
        (b"some text\n", r"none.arpa: expected an ARPA file with \\1-grams:, found none"),
        (b"\\1-grams:\nTHE -1\n", r"none.arpa:2: expected an ARPA unigram, got 'THE -1'"),
        (b"\\1-grams:\n-1 THE\n", r"none.arpa: expected an ARPA file, got "),
    ],
)
def test_what_is_no_language_model_is_named(tmp_path, content, complaint):
    path = tmp_path / "none.arpa"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(LanguageModelError, match=complaint) as caught:
        LanguageModel.load(path)
    assert "\n" not in str(caught.value)


def test_a_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "cut.arpa.gz"
    path.write_bytes(gzip.compress(ARPA.encode())[:-9])
    with pytest.raises(LanguageModelError, match=r"cut.arpa.gz: expected a language model"):
        LanguageModel.load(path)


def words(**changes):
    return WordsSettings().model_copy(update=changes)


def test_the_beam_is_taken_where_it_can_be_had(file):
    symbols_only = Vocabulary(TOKENS, 0, None)
    assert open_language_model(words(), file, VOCABULARY) is not None
    assert open_language_model(words(decoder="greedy"), file, VOCABULARY) is None
    assert open_language_model(words(), None, VOCABULARY) is None
    assert open_language_model(words(), file, symbols_only) is None
    assert open_language_model(words(decoder="beam"), file, None) is None
    assert open_language_model(words(language_model=file), None, VOCABULARY) is not None
    with pytest.raises(LanguageModelError, match=r"tracks.words.language_model: .* has none"):
        open_language_model(words(decoder="beam"), None, VOCABULARY)
    with pytest.raises(LanguageModelError, match=r"tracks.words.decoder: .* expected greedy"):
        open_language_model(words(decoder="beam"), file, symbols_only)


def test_without_the_extra_words_are_decoded_greedily_and_the_log_says_so(file, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    structlog.reset_defaults()  # another test's configuration may be quieter
    with structlog.testing.capture_logs() as logs:
        assert open_language_model(words(), file, VOCABULARY) is None
    assert [entry["log_level"] for entry in logs] == ["warning"]
    assert "livesat[lm]" in logs[0]["event"]
    with pytest.raises(LanguageModelError, match=r"kenlm is not installed.*livesat\[lm\]"):
        open_language_model(words(decoder="beam"), file, VOCABULARY)


# -- the search -----------------------------------------------------------------------------------


def collapsed(path, tokens):
    letters = [tokens[index] for index, _ in itertools.groupby(path) if tokens[index] != "<pad>"]
    return " ".join("".join(letters).replace("|", " ").split())


class Flat:
    """A language model that says nothing."""

    order = 2

    def prefix(self, letters):
        return 0.0

    def word(self, history, word):
        return 0.0


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_a_wide_beam_finds_the_likeliest_text_of_all_paths(seed):
    tokens = ("<pad>", "|", "A", "B")
    rng = np.random.default_rng(seed)
    scores = np.log(rng.dirichlet(np.full(4, 0.8), 6) + 0.01).astype(np.float32)
    sums = {}
    for path in itertools.product(range(4), repeat=6):
        text = collapsed(path, tokens)
        total = sum(float(scores[at, index]) for at, index in enumerate(path))
        sums[text] = sums.get(text, 0.0) + math.exp(total)
    best, second = sorted(sums.values())[-1:-3:-1]
    if second > 0.97 * best:
        return
    config = WordsSettings(beam_width=512, alpha=0, beta=0)
    beam = Beam(Symbols(Vocabulary(tokens, 0), "keep"), config, Flat(), BeamState())
    found = []
    for at, row in enumerate(scores):
        found += beam.row(row, int(np.argmax(row)), at * HOP)
    text = " ".join(word.text for word in found + beam.finish())
    assert sums[text] == best


def test_the_language_model_decides_what_the_ear_cannot(language):
    written = ["T", "H", "E", "|", {"K": 0.5, "C": 0.45}, "A", "T", "|", "S", {"A": 0.6}, "T", "|"]
    scores = ctc(written)
    assert said(run(scores, None)) == "the kat sat"
    assert said(run(scores, language)) == "the cat sat"


def test_the_words_before_decide(language):
    unclear = {"M": 0.45, "H": 0.5}
    assert said(run(ctc([*"THE|", unclear, *"AT|"]), language)) == "the mat"
    assert said(run(ctc([*"THE|", unclear, *"AT|"]), language, over(alpha=0))) == "the hat"


def test_a_clear_word_that_nobody_wrote_is_read(language):
    assert said(run(ctc("THE|MOAN|SAT|", hold=2), language)) == "the moan sat"


def test_doubled_letters_need_a_silence_between(language):
    assert said(run(ctc("MOO|MOO|", hold=2), language)) == "moo moo"
    assert said(run(ctc("MOO|", hold=2, gap=0), language)) == "mo"


def test_times_and_confidence_are_those_of_the_characters(language):
    events = run(ctc("THE|CAT|", hold=2), language)
    the, cat = events[-1].words
    assert (the.start, the.end) == pytest.approx((5 * 0.02, 13 * 0.02))
    assert (cat.start, cat.end) == pytest.approx((17 * 0.02, 25 * 0.02))
    assert the.confidence == pytest.approx(0.95, abs=0.01)


def test_a_word_is_certain_when_all_agree_or_after_a_while(language):
    config = over(commit_ms=1000, partial_ms=20)
    sure = ctc("THE|CAT|SAT|")
    unsure = ctc([*"THE|", {"C": 0.5, "K": 0.45}, {"A": 0.5, "O": 0.45}, *"T|SAT|ON|THE|MAT|CAT|"])
    for scores, within in ((sure, 0.2), (unsure, 1.05)):
        pieces = split(Frames(0, ctc=scores), range(1, len(scores)))
        tracks = Tracks(config, vocabulary=VOCABULARY, language=language, stamp=Stamper())
        seen = {}
        for at, piece in enumerate(pieces):
            tracks.step(piece)
            for word in tracks._state.words.segment:
                seen.setdefault(word.start, at * HOP - word.end)
        assert len(seen) >= 3
        assert max(list(seen.values())[:2]) / 16000 <= within


def test_a_stream_does_not_grow(language):
    rng = np.random.default_rng(3)
    tracks = Tracks(SETTINGS, vocabulary=VOCABULARY, language=language, stamp=Stamper())
    sizes = []
    for second in range(40):
        table = rng.dirichlet(np.full(len(TOKENS), 0.1), 50)
        scores = np.log(table + 1e-6).astype(np.float32)
        tracks.step(Frames(second * 16000, ctc=scores))
        sizes.append(len(tracks.freeze()()))
        assert len(tracks._state.words.beam.hypotheses) <= SETTINGS.words.beam_width
    assert max(sizes) < 2 * max(sizes[:20])
    assert max(sizes) < 200_000


def test_a_word_without_an_end_is_cut(language):
    config = over(max_segment_ms=1000)
    for model in (language, None):
        events = run(ctc("ZOXA" * 40), model, config)
        first = next(event for event in events if event.type == "transcript.final")
        assert first.end - first.start <= 1.1


def over(**changes):
    return SETTINGS.over({"words": changes})


TEXTS = ("THE|CAT|SAT|ON|THE|MAT", "THE|HAT|SAT|ON|THE|CAT", "CATS|SAT|ON|XOZ|THE|MAT|THE|CAT")


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 1000),
    st.lists(st.integers(0, 300), max_size=30),
    st.sets(st.integers(0, 30), max_size=5),
)
def test_finals_depend_neither_on_the_split_nor_on_save_and_restore(language, seed, cuts, saved):
    rng = np.random.default_rng(seed)
    scores = np.concatenate([noisy(TEXTS[seed % 3], rng), noisy(TEXTS[(seed + 1) % 3], rng)])
    talks = [Talk(0, 5, len(scores) // 2, 0), Talk(1, len(scores) // 2 - 10, len(scores) - 20, 1)]
    cuts = [cut for cut in cuts if cut <= len(scores)]
    whole = finals(run(scores, language, talks=talks))
    assert finals(run(scores, language, cuts=cuts, saved=saved, talks=talks)) == whole
    assert any(event["type"] == "transcript.final" for event in whole)


def test_the_other_decoder_goes_on_from_a_saved_state(language):
    scores = ctc("THE|CAT|SAT|ON")
    for one, other in ((language, None), (None, language)):
        tracks = Tracks(SETTINGS, vocabulary=VOCABULARY, language=one, stamp=Stamper())
        first, second = split(Frames(0, ctc=scores), [18])
        tracks.step(first)
        resumed = Tracks(SETTINGS, vocabulary=VOCABULARY, language=other, stamp=Stamper())
        resumed.restore(tracks.freeze()())
        events = resumed.step(second) + resumed.flush(second.end)
        assert said(events).endswith("sat on")


def test_partials_rarely_change(language):
    rng = np.random.default_rng(5)
    told, changed = np.zeros(2, int), np.zeros(2, int)
    for number in range(30):
        scores = noisy(TEXTS[number % 3], rng, margin=4.5)
        for index, config in enumerate((SETTINGS, over(stable_ms=0, stable_share=0))):
            counts = flicker(run(scores, language, config, cuts=range(0, len(scores), 5)))
            told[index] += counts[0]
            changed[index] += counts[1]
    assert told[0] > 100
    assert changed[0] / told[0] < 0.02
    assert changed[1] / told[1] > 0.2
