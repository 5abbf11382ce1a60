import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.clock import HOP
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings
from tests.stream.tracks.scenes import Stamper, Talk, embed, finals, scene, split

TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "|", "E", "H", "L", "O", "A", "'")
VOCABULARY = Vocabulary(TOKENS, blank=0, delimiter="|")
SETTINGS = TracksSettings()


def ctc(length, written, probability=0.9):
    """{frame: symbols, one a frame} → log-probabilities; all else blank."""
    scores = np.full((length, len(TOKENS)), 1e-3, np.float32)
    best = np.zeros(length, int)
    for frame, text in written.items():
        for offset, symbol in enumerate(text):
            best[frame + offset] = 0 if symbol == "_" else TOKENS.index(symbol)
    scores[np.arange(length), best] = probability
    return np.log(scores)


def run(frames, config=SETTINGS, *, cuts=(), vocabulary=VOCABULARY):
    tracks = Tracks(config, embed=embed, vocabulary=vocabulary, stamp=Stamper())
    events = []
    for piece in split(frames, cuts):
        events += tracks.step(piece)
    return events + tracks.flush(frames.end)


def said(events):
    return [e.text for e in events if e.type == "transcript.final"]


def test_letters_repeats_and_blanks():
    events = run(Frames(0, ctc=ctc(100, {10: "HH_EEL_LLO|", 25: "AA"})))
    assert said(events) == ["hello a"]
    final = events[-1]
    hello, a = final.words
    assert (hello.start, hello.end) == (10 * 0.02, 20 * 0.02)
    assert (a.start, a.end) == (25 * 0.02, 27 * 0.02)
    assert hello.confidence == pytest.approx(0.9, abs=1e-3)
    assert hello.speaker is None
    assert final.turn_id is None
    assert (final.start, final.end) == (hello.start, a.end)


def test_special_symbols_are_no_text_and_the_apostrophe_is():
    scores = ctc(60, {5: "A'A|"})
    scores[20, 2] = 0.0  # </s>
    scores[22, 3] = 0.0  # <unk>
    assert said(run(Frames(0, ctc=scores))) == ["a'a"]


def test_case_is_kept_if_so_set():
    config = SETTINGS.over({"words": {"case": "keep"}})
    assert said(run(Frames(0, ctc=ctc(50, {5: "AHA"})), config)) == ["AHA"]


def test_without_a_delimiter_every_symbol_is_a_word():
    vocabulary = Vocabulary(TOKENS, blank=0, delimiter=None)
    assert said(run(Frames(0, ctc=ctc(50, {5: "AA_HE"})), vocabulary=vocabulary)) == ["a h e"]


def test_silence_makes_final_and_ends_a_word_without_delimiter():
    events = run(Frames(0, ctc=ctc(200, {10: "AH", 100: "HE"})), cuts=range(0, 200, 10))
    assert said(events) == ["ah", "he"]
    partials = [e.text for e in events if e.type == "transcript.partial"]
    assert partials == ["ah", "he"]


def test_a_long_segment_is_cut_after_a_word():
    config = SETTINGS.over({"words": {"max_segment_ms": 1000}})
    written = dict.fromkeys(range(0, 200, 10), "AH|")
    assert said(run(Frames(0, ctc=ctc(250, written)), config))[0] == " ".join(["ah"] * 5)


def test_finished_words_never_change():
    written = dict.fromkeys(range(0, 300, 12), "H_E_L_LO|")
    frames = Frames(0, ctc=ctc(400, written))
    events = run(frames, cuts=range(0, 400, 4))
    before = []
    partials = 0
    for event in events:
        if event.type not in ("transcript.partial", "transcript.final"):
            continue
        words = [word.word for word in event.words]
        assert words[: len(before) - 1] == before[:-1]
        if before and len(words) == len(before):
            assert words[-1].startswith(before[-1])
        partials += event.type == "transcript.partial"
        before = words if event.type == "transcript.partial" else []
    assert 20 <= partials <= 300 * 20 / 200


def test_words_have_speakers_and_a_change_of_speaker_makes_final():
    talks = [Talk(0, 10, 150, 0), Talk(1, 152, 300, 1)]
    audio = scene(talks, 400)
    written = {20: "AH|", 100: "HE|", 120: "HEL_LO|", 170: "AHA|", 250: "HE|"}
    frames = Frames(0, audio.activity, audio.voice, ctc(400, written), voice_delay=7)
    events = run(frames)
    told = [
        ([(word.word, word.speaker) for word in e.words], e.turn_id)
        for e in events
        if e.type == "transcript.final"
    ]
    assert told == [
        ([("ah", "S1")], "T1"),
        ([("he", "S1"), ("hello", "S1")], "T1"),
        ([("aha", "S2")], "T2"),
        ([("he", "S2")], "T2"),
    ]
    # "aha" waited until its turn, at first taken for S1's, was known to be S2's.
    started = next(e for e in events if e.type == "turn.started" and e.turn_id == "T2")
    assert started.speaker.label == "S1"


def test_in_overlap_words_stay_with_the_turn_that_goes_on():
    talks = [Talk(0, 10, 200, 0), Talk(1, 100, 200, 1)]
    audio = scene(talks, 300)
    written = {90: "AH|", 110: "HE|", 130: "HEL_LO|"}
    frames = Frames(0, audio.activity, audio.voice, ctc(300, written), voice_delay=7)
    assert said(run(frames)) == ["ah he hello"]


def test_the_end_of_a_turn_makes_final_before_long_silence():
    audio = scene([Talk(0, 10, 100)], 200)
    frames = Frames(0, audio.activity, audio.voice, ctc(200, {60: "AH|HE"}), voice_delay=7)
    tracks = Tracks(SETTINGS, embed=embed, vocabulary=VOCABULARY, stamp=Stamper())
    pieces = split(frames, [116])
    assert said(tracks.step(pieces[0])) == ["ah he"]


def test_words_do_not_reach_over_a_hole():
    scores = ctc(100, {46: "HE", 50: "LLO"})
    tracks = Tracks(SETTINGS, vocabulary=VOCABULARY, stamp=Stamper())
    events = tracks.step(Frames(0, ctc=scores[:50]))
    events += tracks.step(Frames(50 * HOP + 32000, ctc=scores[50:]))
    events += tracks.flush(200 * HOP)
    assert said(events) == ["he", "lo"]


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.sampled_from(["AH|", "HE", "HEL_LO|", "", "____", "|"]), max_size=20),
    st.lists(st.integers(0, 400), max_size=30),
)
def test_finals_do_not_depend_on_the_split(texts, cuts):
    audio = scene([Talk(0, 10, 100, 0), Talk(1, 90, 200, 1), Talk(2, 230, 390, 0)], 400)
    written = {20 * index: text for index, text in enumerate(texts)}
    frames = Frames(0, audio.activity, audio.voice, ctc(400, written), voice_delay=7)
    assert finals(run(frames, cuts=cuts)) == finals(run(frames))
