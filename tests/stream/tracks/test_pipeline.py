import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.tracks.codec import pack, unpack
from stream.tracks.frames import Frames
from stream.tracks.pipeline import Tracks, TracksState
from stream.tracks.settings import TracksSettings
from stream.tracks.voices import Gallery
from tests.stream.tracks.scenes import Stamper, Talk, embed, finals, scene, split, voices
from tests.stream.tracks.test_words import VOCABULARY, ctc

GALLERY = Gallery(("Ada",), voices(1).astype(np.float32))
CLASSES = {"kind": ("speech", "music")}


def everything():
    audio = scene(
        [Talk(0, 10, 150, 0), Talk(1, 120, 260, 1), Talk(2, 300, 420, 2), Talk(0, 430, 480, 0)],
        500,
        noise=0.4,
    )
    written = {20: "AH|", 100: "HE|", 130: "HELLO|", 270: "AHA|", 310: "HE|", 440: "A"}
    kinds = np.zeros((500, 2), np.float32)
    kinds[:, 0] = np.linspace(-2, 2, 500)
    return Frames(
        0,
        audio.activity,
        audio.voice,
        ctc(500, written),
        voice_delay=7,
        labels={"kind": kinds},
    )


def build():
    return Tracks(
        TracksSettings(),
        embed=embed,
        vocabulary=VOCABULARY,
        voiceprints=GALLERY,
        classes=CLASSES,
        stamp=Stamper(),
    )


def run(cuts=(), saved=()):
    frames = everything()
    tracks, events = build(), []
    for index, piece in enumerate(split(frames, cuts)):
        if index in saved:
            data = tracks.freeze()()
            tracks = build()
            tracks.restore(data)
            assert tracks.freeze()() == data
        events += tracks.step(piece)
    return events + tracks.flush(frames.end)


def test_every_track_speaks():
    assert {event.type for event in run(range(0, 500, 25))} == {
        "speech.started",
        "speech.ended",
        "turn.started",
        "turn.updated",
        "turn.ended",
        "speaker.identified",
        "transcript.partial",
        "transcript.final",
        "label",
    }


@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(0, 500), max_size=30), st.sets(st.integers(0, 30), max_size=5))
def test_finals_depend_neither_on_the_split_nor_on_save_and_restore(cuts, saved):
    assert finals(run(cuts, saved)) == finals(run())


def test_labels_are_means_over_windows():
    labels = [event for event in run() if event.type == "label"]
    assert [round(event.end) for event in labels] == [3, 4, 5, 6, 7, 8, 9, 10]
    assert [event.label for event in labels] == ["music"] * 4 + ["speech"] * 4
    first = labels[0]
    mean = np.linspace(-2, 2, 500)[:150].mean()
    assert first.score == pytest.approx(1 / (1 + np.exp(mean)), abs=1e-4)
    assert first.window == 3.0
    assert first.start == 0.0


def test_a_label_window_starts_anew_after_a_restart():
    tracks = build()
    kinds = np.ones((100, 2), np.float32)
    assert tracks.step(Frames(0, labels={"kind": kinds})) == []
    assert tracks.step(Frames(32000, nonfinite=True, labels={"kind": kinds})) == []
    assert len(tracks.step(Frames(64000, labels={"kind": kinds}))) == 2


@pytest.mark.parametrize(
    "data", [b"", b"nonsense", pack(TracksState())[:-3], pack(TracksState()) + b"more", pack({})]
)
def test_what_is_no_state_is_refused(data):
    with pytest.raises(ValueError, match=r"."):
        build().restore(data)


def test_a_state_of_another_version_names_the_field():
    data = pack(TracksState()).replace(b'"cursor":-1', b'"curser":-1', 1)
    with pytest.raises(ValueError, match=r"expected TracksState.turns with .*cursor"):
        unpack(TracksState, data)
    data = pack(TracksState()).replace(b'"cursor":-1', b'"cursor":"x"', 1)
    with pytest.raises(ValueError, match=r"expected TracksState.turns.cursor to be int, got 'x'"):
        unpack(TracksState, data)


def test_settings_name_file_and_key(tmp_path):
    file = tmp_path / "tracks.json"
    settings_ = TracksSettings().over({"turns": {"onset": 0.7}, "speakers": {"mean": [0.5, 1.0]}})
    settings_.save(file)
    assert TracksSettings.load(file) == settings_
    assert TracksSettings.load(file, {"turns": {"offset": 0.6}}).turns.onset == 0.7
    file.write_text('{"turns": {"onsett": 0.5}}')
    with pytest.raises(ValueError, match=r"tracks.json: turns.onsett: Extra inputs"):
        TracksSettings.load(file)
    file.write_text('{"turns": {"onset": 0.3, "offset": 0.5}}')
    with pytest.raises(ValueError, match=r"turns: .*offset ≤ its onset, got 0.5 > 0.3"):
        TracksSettings.load(file)
    file.write_text("[1]")
    with pytest.raises(ValueError, match=r"tracks.json: all of it: "):
        TracksSettings.load(file)
    file.write_bytes(b"\xff{")
    with pytest.raises(ValueError, match=r"tracks.json: expected JSON"):
        TracksSettings.load(file)
