"""Whatever the user gets wrong is one clear line, an exit code, and no traceback."""

import json
import socket
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

RATE = 16_000


def config(folder: Path, **sections) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(sections))
    return path


def wav(path: Path, channels: int, frames: int) -> Path:
    """A PCM file whose header says what it says."""
    data = bytes(2 * max(channels, 1) * frames)
    form = struct.pack("<HHIIHH", 1, channels, RATE, 2 * RATE * channels, 2 * channels, 16)
    chunks = b"fmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WAVE" + chunks)
    return path


# -- the command --------------------------------------------------------------------------------


def test_an_unknown_command(livesat):
    livesat("annotat").complains("annotat", code=2)


def test_an_unknown_option(livesat):
    livesat("annotate", "a.wav", "--rtm", "a.rttm").complains("--rtm", code=2)


def test_a_number_that_is_none(livesat):
    livesat("annotate", "a.wav", "--chunk", "soon").complains("--chunk", code=2)


def test_a_missing_argument(livesat):
    livesat("annotate").complains("AUDIO", code=2)


def test_a_decoder_that_is_none(livesat, opening):
    livesat("annotate", opening, "--decoder", "best").complains(
        "tracks.words.decoder", "best", "beam", code=2
    )


def test_a_language_model_that_cannot_be_read(livesat, opening, tmp_path):
    (tmp_path / "some.arpa").write_text("not that")
    for name in ("some.arpa", "none.arpa"):
        words = {"words": {"language_model": str(tmp_path / name)}}
        more = {"tracks": words, "log": {"level": "warning"}}
        path = config(tmp_path, sources={"a": {"kind": "stdin"}}, **more)
        livesat("annotate", opening, "--config", path).complains(name, "ARPA", code=1)


def test_the_beam_without_its_extra(livesat, opening, monkeypatch):
    monkeypatch.setitem(sys.modules, "kenlm", None)
    livesat("annotate", opening, "--decoder", "beam").complains(
        "kenlm is not installed", "pip install 'livesat[lm]'", code=1
    )


def test_a_chunk_that_is_no_whole_number_of_frames(livesat, opening):
    livesat("annotate", opening, "--chunk", "510").complains(
        "chunk_ms", "510", "multiple of 20", code=2
    )


def test_an_output_in_a_folder_that_is_not_there(livesat, opening, tmp_path):
    target = tmp_path / "nowhere" / "a.rttm"
    livesat("annotate", opening, "--rttm", target).complains("--rttm", "no such folder", code=2)


def test_an_output_that_cannot_go_to_stdout(livesat, opening):
    livesat("annotate", opening, "--rttm", "-").complains("--rttm", "--jsonl", code=2)


# -- the configuration --------------------------------------------------------------------------


def test_an_unknown_key(livesat, tmp_path):
    path = config(tmp_path, sources={"a": {"kind": "stdin"}}, engin={"chunk_ms": 500})
    livesat("run", "--config", path).complains("config.yaml", "engin", "engine", code=2)


def test_a_wrong_type(livesat, tmp_path):
    path = config(tmp_path, sources={"a": {"kind": "stdin"}}, engine={"chunk_ms": "half"})
    livesat("run", "--config", path).complains("engine.chunk_ms", "half", "integer", code=2)


def test_an_unknown_kind_of_sink(livesat, tmp_path):
    path = config(tmp_path, sources={"a": {"kind": "stdin"}}, sinks={"b": {"kind": "telegraph"}})
    livesat("run", "--config", path).complains("sinks.b", "telegraph", "mqtt", code=2)


def test_no_configuration(livesat, tmp_path):
    livesat("run", "--config", tmp_path / "none.yaml").complains(
        "none.yaml", "no such file", code=2
    )


# -- audio --------------------------------------------------------------------------------------


def test_a_missing_file(livesat, tmp_path):
    livesat("annotate", tmp_path / "none.wav").complains("none.wav", "no such file", code=2)


def test_a_folder_instead_of_audio(livesat, tmp_path):
    livesat("annotate", tmp_path).complains("expected an audio file", code=1)


def test_an_empty_file(livesat, tmp_path):
    path = tmp_path / "empty.wav"
    path.touch()
    livesat("annotate", path).complains("empty.wav", "expected audio", code=1)


def test_a_file_that_is_not_audio(livesat, tmp_path):
    path = tmp_path / "words.wav"
    path.write_text("these are words")
    livesat("annotate", path).complains("words.wav", "not an audio file", code=1)


def test_a_file_of_one_sample(livesat, tmp_path):
    path = wav(tmp_path / "one.wav", channels=1, frames=1)
    livesat("annotate", path).complains("one.wav", "1 sample", code=1)


def test_a_file_without_channels(livesat, tmp_path):
    path = wav(tmp_path / "none.wav", channels=0, frames=RATE)
    livesat("annotate", path).complains("none.wav", code=1)


def test_a_sample_that_is_not_a_number_costs_its_chunk_only(livesat, tone, tmp_path):
    samples = np.random.default_rng(0).standard_normal(4 * RATE) * 0.1
    samples[RATE] = np.nan
    target = tmp_path / "nan.jsonl"
    result = livesat("annotate", tone("nan.wav", samples), "--jsonl", target, "-q")
    assert result.code == 0
    events = [json.loads(line) for line in target.read_text().splitlines()]
    gaps = [event for event in events if event["type"] == "gap"]
    assert [gap["reason"] for gap in gaps] == ["non-finite"]
    assert events[-1]["type"] == "session.closed"
    assert events[-1]["end"] == pytest.approx(4.0)


# -- the engine ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("device", "code"), [("tpu", 2), ("cuda:77", 1)])
def test_an_unknown_device(livesat, opening, device, code):
    livesat("annotate", opening, "--device", device).complains(device, code=code)


def test_a_checkpoint_that_is_not_there(livesat, opening, tmp_path):
    livesat("annotate", opening, "--checkpoint", tmp_path / "none").complains("none", code=1)


def test_a_checkpoint_of_another_architecture(livesat, opening, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "whisper", "architectures": ["WhisperModel"]})
    )
    livesat("annotate", opening, "--checkpoint", tmp_path).complains("whisper", code=1)


# -- sinks --------------------------------------------------------------------------------------


def test_a_broker_that_is_not_there(livesat, opening, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        rttm = tmp_path / "opening.rttm"
        rttm.touch()  # it is appended to, if it is opened before the broker ends the run
        path = config(
            tmp_path,
            sources={"opening": {"kind": "file", "path": str(opening)}},
            sinks={
                "broker": {"kind": "mqtt", "host": "127.0.0.1", "port": port},
                "turns": {"kind": "rttm", "path": str(rttm)},
            },
            log={"level": "error"},
        )
        livesat("run", "--config", path).complains("127.0.0.1", str(port), code=1)
    assert all(line.startswith("SPEAKER ") for line in rttm.read_text().splitlines())
