"""The main job, from an audio file, a pipe or a configuration, to files a reader accepts."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import soundfile
import yaml

from sinks.events import parse
from tests.e2e.conftest import RATE, start

RTTM = re.compile(r"SPEAKER (\S+) 1 (\d+\.\d+) (\d+\.\d+) <NA> <NA> (\S+) <NA> <NA>")
CUE = re.compile(r"(?:(\d\d):)?(\d\d):(\d\d)[.,](\d{3}) --> (?:(\d\d):)?(\d\d):(\d\d)[.,](\d{3})")


def turns(path: Path) -> list[tuple[float, float, str]]:
    found = []
    for line in path.read_text().splitlines():
        match = RTTM.fullmatch(line)
        assert match, line
        begin, length = float(match[2]), float(match[3])
        found.append((begin, begin + length, match[4]))
    return found


def events(path: Path):
    return [parse(line) for line in path.read_bytes().splitlines()]


def cues(text: str) -> list[tuple[float, float]]:
    def at(hours, minutes, seconds, milliseconds):
        return 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds) + int(milliseconds) / 1000

    return [(at(*m.groups()[:4]), at(*m.groups()[4:])) for m in CUE.finditer(text)]


def test_every_file_is_valid_and_they_tell_the_same(livesat, opening, tmp_path):
    files = {kind: tmp_path / f"opening.{kind}" for kind in ("rttm", "jsonl", "vtt", "srt")}
    options = [part for kind, path in files.items() for part in (f"--{kind}", path)]
    result = livesat("annotate", opening, *options)
    assert result.code == 0, result.err
    assert result.err == ""
    assert "session opened: file:opening.wav" in result.out

    heard = events(files["jsonl"])
    assert [event.seq for event in heard] == list(range(len(heard)))
    assert heard[0].type == "session.opened"
    assert heard[-1].type == "session.closed"
    assert heard[-1].end == pytest.approx(12.0)

    spoken = turns(files["rttm"])
    assert spoken
    assert all(0 <= begin < end <= 12.01 for begin, end, _ in spoken)
    last = {e.turn_id: e for e in heard if e.type == "turn.ended"}
    assert len(spoken) == len(last)

    vtt, srt = files["vtt"].read_text(), files["srt"].read_text()
    assert vtt.startswith("WEBVTT\n")
    assert re.match(r"1\n\d\d:\d\d:\d\d,\d{3} --> ", srt)
    for text in (vtt, srt):
        assert cues(text)
        assert all(begin < end <= 13 for begin, end in cues(text))


def test_a_file_that_is_there_is_written_anew(livesat, opening, tmp_path):
    path = tmp_path / "opening.rttm"
    path.write_text("SPEAKER other 1 0.000 1.000 <NA> <NA> X <NA> <NA>\n")
    assert livesat("annotate", opening, "--rttm", path, "-q").code == 0
    assert all(who != "X" for _, _, who in turns(path))


def test_quiet_says_nothing(livesat, opening):
    result = livesat("annotate", opening, "-q")
    assert (result.code, result.out, result.err) == (0, "", "")


def test_events_to_stdout_are_json_and_nothing_else(livesat, opening):
    result = livesat("annotate", opening, "--jsonl", "-")
    assert result.code == 0
    kinds = [parse(line).type for line in result.out.splitlines()]
    assert kinds[0] == "session.opened"
    assert kinds[-1] == "session.closed"


def test_any_rate_and_channel_count_give_the_same_turns(livesat, opening, tmp_path):
    import numpy as np
    import soxr

    samples, _ = soundfile.read(opening, dtype="float32")
    stereo = tmp_path / "stereo.flac"
    soundfile.write(stereo, np.stack([soxr.resample(samples, RATE, 44_100)] * 2, 1), 44_100)
    paths = []
    for source in (opening, stereo):
        paths.append(tmp_path / f"{source.stem}.rttm")
        assert livesat("annotate", source, "--rttm", paths[-1], "-q").code == 0
    first, second = (turns(path) for path in paths)
    assert first
    assert second
    assert sum(e - b for b, e, _ in first) == pytest.approx(
        sum(e - b for b, e, _ in second), rel=0.1
    )


def test_raw_samples_on_stdin_give_what_the_file_gives(livesat, opening, tmp_path):
    file, pipe = tmp_path / "file.rttm", tmp_path / "pipe.rttm"
    assert livesat("annotate", opening, "--rttm", file, "-q").code == 0
    samples, _ = soundfile.read(opening, dtype="int16")
    process = start("annotate", "-", "--rttm", pipe, cwd=tmp_path, stdin=subprocess.PIPE)
    out, err = process.communicate(samples.tobytes(), timeout=120)
    assert process.returncode == 0, err
    assert b"session opened: stdin" in out
    assert turns(pipe) == turns(file)


@pytest.mark.skipif(sys.platform == "win32", reason="no signals")
def test_a_daemon_told_to_stop_finishes_what_it_heard(meeting, tmp_path):
    target = tmp_path / "meeting.jsonl"
    settings = {
        "sources": {"meeting": {"kind": "file", "path": str(meeting), "realtime": True}},
        "sinks": {"file": {"kind": "jsonl", "path": str(target)}},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    with start("run", cwd=tmp_path) as process:
        try:
            patience = time.monotonic() + 90
            while not (target.exists() and b"turn." in target.read_bytes()):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < patience
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    heard = events(target)
    assert heard[-1].type == "session.closed"
    assert heard[-1].reason == "stopped"
    assert heard[-1].end < 70
    began = {e.turn_id for e in heard if e.type == "turn.started"}
    assert began == {e.turn_id for e in heard if e.type == "turn.ended"}


def test_a_reader_that_leaves_is_no_error(opening, tmp_path):
    with start("annotate", opening, cwd=tmp_path) as process:
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(timeout=120) == 0
        assert process.stderr.read() == b""


def test_config_gives_the_engine_and_options_win(livesat, opening, tmp_path):
    settings = {
        "engine": {"chunk_ms": 1000, "lookahead_ms": 400},
        "sources": {"ignored": {"kind": "stdin"}},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    result = livesat("annotate", opening, "--config", path, "--chunk", 800, "--jsonl", "-")
    assert result.code == 0, result.err
    opened = json.loads(result.out.splitlines()[0])
    assert opened["latency"] == {"chunk_ms": 800, "lookahead_ms": 400}
    assert opened["source"] == "file:opening.wav"
