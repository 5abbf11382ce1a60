"""`livesat listen` and `livesat devices`, through PulseAudio's microphone that is a FIFO."""

import os
import signal
import threading
import time

import pytest
import soundfile

from sinks.events import parse
from tests.e2e.conftest import RATE, start
from tests.stream.test_microphone import FakeMicrophone, absent


class Talker(FakeMicrophone):
    """Speaks a recording, once, at the speed it was spoken."""

    def __init__(self, folder, samples):
        super().__init__(folder)
        self.samples = samples
        self.done = threading.Event()

    def _feed(self):
        fifo = os.open(self.folder / "mic0", os.O_WRONLY)
        try:
            began = time.monotonic()
            for index in range(0, len(self.samples) - 319, 320):
                if not self._feeding.is_set():
                    break
                os.write(fifo, self.samples[index : index + 320].tobytes())
                time.sleep(max(began + (index + 320) / RATE - time.monotonic(), 0))
        except BrokenPipeError:
            pass
        finally:
            os.close(fifo)
            self.done.set()


@pytest.fixture
def talker(opening, tmp_path, monkeypatch):
    pytest.importorskip("sounddevice", reason="the microphone needs sounddevice")
    samples, _ = soundfile.read(opening, dtype="int16")
    with Talker(tmp_path, samples) as talker:
        for name, value in {
            "PULSE_SERVER": f"unix:{tmp_path}/native",
            "PULSE_SOURCE": "mic0",
            "HOME": str(tmp_path),
        }.items():
            monkeypatch.setenv(name, value)
        yield talker


@absent
@pytest.mark.mic
def test_what_is_said_to_a_microphone_becomes_turns(talker, tmp_path):
    with start("devices", cwd=tmp_path) as listed:
        names = listed.communicate(timeout=60)[0].decode()
    if "pulse" not in names:
        pytest.skip("the fake microphone needs libasound2-plugins")

    target = tmp_path / "heard.jsonl"
    process = start("listen", "-m", "pulse", "--jsonl", target, cwd=tmp_path)
    with process:
        try:
            patience = time.monotonic() + 90
            while not (target.exists() and target.stat().st_size):
                assert process.poll() is None, process.stderr.read()
                assert time.monotonic() < patience
                time.sleep(0.1)
            talker.speak()
            assert talker.done.wait(60)
            time.sleep(2)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    events = [parse(line) for line in target.read_bytes().splitlines()]
    assert events[0].source == "microphone:pulse"
    turns = [event for event in events if event.type == "turn.ended"]
    assert turns
    assert events[-1].reason == "stopped"
    assert [event.seq for event in events] == list(range(len(events)))


@absent
@pytest.mark.mic
def test_a_microphone_of_another_name(talker, livesat):
    livesat("listen", "-m", "telescope").complains("telescope", code=1)
