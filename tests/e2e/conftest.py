"""The command, run in this process (torch is loaded once) or in one of its own."""

import os
import subprocess
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import soundfile
import structlog

from stream.cli import main

ROOT = Path(__file__).parents[2]
RATE = 16_000


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    def complains(self, *parts: str, code: int) -> None:
        """One line on stderr, that says these things, and nothing else."""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("livesat: error: "), self.err
        for part in parts:
            assert part in lines[0], self.err
        assert self.code == code


@pytest.fixture
def livesat(monkeypatch, capsys):
    """`livesat(*args)` in this process."""

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["livesat", *map(str, args)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return Result(int(left.value.code or 0), out, err)

    yield run
    structlog.reset_defaults()


def start(*args: object, cwd: Path, **more) -> subprocess.Popen:
    """`livesat …` in a process of its own, from another folder."""
    return subprocess.Popen(
        [sys.executable, "-m", "stream", *map(str, args)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **more,
    )


@pytest.fixture(scope="session")
def meeting():
    """The demo conversation."""
    return Path(str(files("stream") / "demo" / "meeting.flac"))


@pytest.fixture(scope="session")
def opening(meeting, tmp_path_factory):
    """Its first twelve seconds: three turns, two speakers."""
    samples, rate = soundfile.read(meeting, frames=12 * RATE, dtype="int16")
    path = tmp_path_factory.mktemp("audio") / "opening.wav"
    soundfile.write(path, samples, rate)
    return path


@pytest.fixture
def tone(tmp_path):
    """`tone(name, samples)` writes float samples as a WAV file."""

    def write(name: str, samples: np.ndarray, rate: int = RATE) -> Path:
        path = tmp_path / name
        soundfile.write(path, samples, rate, subtype="FLOAT")
        return path

    return write
