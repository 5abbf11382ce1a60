"""Enrolled people and scores, through the command line."""

import json
import math
from importlib.resources import files

import numpy as np
import pytest
import soundfile

from sinks.events import parse
from tests.e2e.conftest import RATE

DEMO = files("stream") / "demo"


def reference():
    for line in (DEMO / "meeting.rttm").read_text().splitlines():
        columns = line.split()
        yield columns[7], float(columns[3]), float(columns[3]) + float(columns[4])


@pytest.fixture(scope="module")
def nora(meeting, tmp_path_factory):
    """Ten seconds of one voice, nobody beside it."""
    samples, _ = soundfile.read(meeting, dtype="int16")
    spans = list(reference())
    clean = [
        samples[int(start * RATE) : int(end * RATE)]
        for who, start, end in spans
        if who == "Nora" and not any(o != who and s < end and start < e for o, s, e in spans)
    ]
    path = tmp_path_factory.mktemp("people") / "nora.wav"
    soundfile.write(path, np.concatenate(clean)[: 10 * RATE], RATE)
    return path


def test_a_life_of_a_voice(livesat, nora, opening, tmp_path):
    voices = tmp_path / "voices.db"
    told = livesat("voices", "--voices", voices)
    assert (told.code, told.out) == (0, "")
    assert "nobody is enrolled" in told.err

    told = livesat("enroll", "Nora", nora, "--consent", "for the test", "--voices", voices)
    assert told.code == 0, told.err
    assert "Nora: 1 clip(s)" in told.out
    assert voices.stat().st_mode & 0o077 == 0

    told = livesat("voices", "--voices", voices)
    assert "Nora" in told.out
    assert "for the test" in told.out

    told = livesat("annotate", opening, "--voices", voices, "--jsonl", "-")
    assert told.code == 0, told.err
    heard = [parse(line) for line in told.out.splitlines()]
    identities = [event.identity for event in heard if event.type == "speaker.identified"]
    assert identities
    assert set(identities) <= {"Nora", None}

    assert livesat("rename", "Nora", "Norah", "--voices", voices).code == 0
    livesat("forget", "Nora", "--voices", voices).complains("Nora", "Norah", code=1)
    assert "Norah is forgotten" in livesat("forget", "norah", "--voices", voices).out
    assert b"Norah" not in voices.read_bytes()


def test_a_clip_of_silence_teaches_nothing(livesat, tone, tmp_path):
    clip = tone("silence.wav", np.zeros(3 * RATE))
    result = livesat("enroll", "Nobody", clip, "--voices", tmp_path / "voices.db")
    result.complains("silence.wav", "speech", "expected", code=1)
    told = livesat("enroll", "Nobody", clip, "--device", "tpu", "--voices", tmp_path / "voices.db")
    told.complains("engine.device", "tpu", code=2)


def test_a_clip_that_is_not_there(livesat, tmp_path):
    livesat("enroll", "Nora", tmp_path / "none.wav").complains("no such file", code=2)


def test_scores_of_a_folder(livesat, opening, tmp_path):
    (tmp_path / "opening.wav").write_bytes(opening.read_bytes())
    rows = [
        f"SPEAKER opening 1 {start:.3f} {min(end, 12) - start:.3f} <NA> <NA> {who} <NA> <NA>\n"
        for who, start, end in reference()
        if start < 12
    ]
    (tmp_path / "opening.rttm").write_text("".join(rows))
    (tmp_path / "opening.txt").write_text("Nora: Good morning, everyone. Let's keep this short.\n")

    result = livesat("eval", tmp_path, "--json", tmp_path / "scores.json")
    assert result.code == 0, result.err
    for words in ("DER, overlap scored", "confusion", "streaming", "offline", "WER", "latency p99"):
        assert words in result.out
    assert "words: beam" in result.out
    assert "partial words later changed" in result.out

    scores = json.loads((tmp_path / "scores.json").read_text())
    (file,) = scores["files"]
    assert file["name"] == "opening"
    streaming = scores["total"]["streaming"]
    assert streaming["audio_s"] == pytest.approx(12.0)
    assert streaming["der"]["rate"] == pytest.approx(
        sum(streaming["der"][part] for part in ("miss", "false_alarm", "confusion")), abs=2e-4
    )
    assert math.isfinite(scores["total"]["offline"]["der"]["rate"])

    assert scores["decoder"] == "beam"
    assert streaming["partial_words"] >= 0

    printed = livesat("eval", tmp_path, "--no-offline", "--decoder", "greedy", "--json", "-")
    assert json.loads(printed.out)["total"]["offline"] is None
    assert json.loads(printed.out)["decoder"] == "greedy"


def test_scores_at_several_latencies(livesat, opening, tmp_path):
    (tmp_path / "opening.wav").write_bytes(opening.read_bytes())
    (tmp_path / "opening.rttm").write_text("SPEAKER opening 1 0 4 <NA> <NA> Nora <NA> <NA>\n")
    result = livesat("eval", tmp_path, "--latency", "0.32,1.28", "--json", tmp_path / "all.json")
    assert result.code == 0, result.err
    for words in ("200 + 120 ms", "800 + 480 ms", "0.32 s", "1.28 s", "offline"):
        assert words in result.out
    soon, late = json.loads((tmp_path / "all.json").read_text())["latencies"]
    assert (soon["chunk_ms"], late["chunk_ms"]) == (200, 800)
    assert soon["total"]["offline"] is not None
    assert late["total"]["offline"] is None

    nowhere = livesat("eval", tmp_path, "--json", tmp_path / "missing" / "all.json")
    nowhere.complains("no such folder", code=2)
    livesat("eval", tmp_path, "--latency", "0.3,x").complains("0.32,0.64,1.28", code=2)
    both = livesat("eval", tmp_path, "--latency", "0.32", "--chunk", "400")
    both.complains("--latency chooses chunk and look-ahead", code=2)


def test_scores_of_a_folder_without_references(livesat, tmp_path):
    livesat("eval", tmp_path).complains("expected pairs", code=1)
    livesat("eval", tmp_path / "none").complains("expected a folder", code=1)


def test_the_demo_ends_with_its_score(livesat):
    result = livesat("demo", "--fast")
    assert result.code == 0, result.err
    assert "session closed" in result.out
    assert "to the millisecond" in result.out
    assert "of 4 speakers" in result.out
