"""A microphone without hardware: bit for bit, in real time."""

import os
import shutil
import subprocess
import threading
import time

import numpy as np

NEEDS = ("pulseaudio", "pactl")
MISSING = [name for name in NEEDS if shutil.which(name) is None]


def ramp(start):
    """Samples that rise by one, from 1 to 30,000 again and again."""
    return np.arange(start, start + 320) % 30_000 + 1


class FakeMicrophone:
    """A PulseAudio of our own whose only microphone is a FIFO.

    Args:
        folder: For its sockets and the FIFO.
        channels: Of the microphone.
        says: First sample → [320] s16 samples it hears; in the second channel they are negated.
    """

    OPTIONS = (
        "--daemonize=no",
        "--use-pid-file=no",
        "--exit-idle-time=-1",
        "--disable-shm=true",
    )

    def __init__(self, folder, channels=1, says=ramp):
        self.folder = folder
        self.channels = channels
        self.says = says
        self.env = {
            **os.environ,
            "HOME": str(folder),
            "PULSE_RUNTIME_PATH": str(folder),
            "PULSE_STATE_PATH": str(folder),
        }
        self.module = (
            f"module-pipe-source source_name=mic0 file={folder}/mic0 rate=16000 "
            f"channels={channels} format=s16le"
        )
        self.spoken = 0  # samples fed so far
        self._feeding = threading.Event()
        self._threads = []

    def __enter__(self):
        script = self.folder / "fm.pa"
        script.write_text(
            f"load-module module-native-protocol-unix socket={self.folder}/native "
            "auth-anonymous=1\n"
            f"load-module {self.module}\n"
            # One source is always there, so that unplugging ours leaves a server with a device.
            f"load-module module-pipe-source source_name=spare file={self.folder}/spare\n"
            "set-default-source mic0\n"
        )
        self.process = subprocess.Popen(
            ["pulseaudio", "-n", "-F", script, *self.OPTIONS],
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._await(self.folder / "native", self.folder / "mic0")
        return self

    def __exit__(self, *_):
        self.hush()
        self.process.terminate()
        self.process.wait()

    def _await(self, *paths):
        for _ in range(500):
            if all(path.exists() for path in paths):
                return
            time.sleep(0.02)
        raise AssertionError(f"PulseAudio did not make {paths}")

    def speak(self):
        """Feed it, in real time, until hushed."""
        self._feeding.set()
        thread = threading.Thread(target=self._feed)
        thread.start()
        self._threads.append(thread)

    def hush(self):
        self._feeding.clear()
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _feed(self):
        # Non-blocking, for a FIFO that nobody reads any more must not hold the test.
        try:
            fifo = os.open(self.folder / "mic0", os.O_WRONLY | os.O_NONBLOCK)
        except OSError:
            return
        began, sent = time.monotonic(), 0
        try:
            while self._feeding.is_set():
                said = self.says(self.spoken).astype("<i2")
                frames = np.stack([said, -said][: self.channels], 1)
                try:
                    os.write(fifo, frames.tobytes())
                except BlockingIOError:
                    pass
                else:
                    self.spoken += 320
                sent += 1
                time.sleep(max(began + sent * 0.02 - time.monotonic(), 0))
        except BrokenPipeError:
            pass
        finally:
            os.close(fifo)

    def pactl(self, *arguments):
        env = {**self.env, "PULSE_SERVER": f"unix:{self.folder}/native"}
        subprocess.run(["pactl", *arguments], env=env, check=True, stdout=subprocess.DEVNULL)

    def unplug(self):
        self.hush()
        self.pactl("unload-module", "module-pipe-source")

    def plug(self):
        self.pactl("load-module", *self.module.split())
        self._await(self.folder / "mic0")
