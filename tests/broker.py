"""Real brokers on free loopback ports, to be started, killed and started again."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final, Self

import pytest

SEARCH: Final = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
STARTS_WITHIN_S: Final = 10.0


def mosquitto() -> str | None:
    """The broker's binary: Debian installs it where only root looks."""
    return shutil.which("mosquitto", path=SEARCH)


class Broker:
    """One broker; `config` is added to its configuration file."""

    def __init__(self, folder: Path, config: str = "", *, host: str = "127.0.0.1") -> None:
        self.folder = folder
        self.host = host
        self.port = _free_port()
        self._config = config
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self.folder / "mosquitto.log").read_text(errors="replace")

    def start(self) -> Self:
        """Start, and return once it takes connections."""
        binary = mosquitto()
        assert binary is not None
        config = self.folder / "mosquitto.conf"
        user = "user root\n" if os.geteuid() == 0 else ""
        listener = f"listener {self.port} {self.host}\n"
        access = "" if "allow_anonymous" in self._config else "allow_anonymous true\n"
        config.write_text(f"{user}{listener}{access}{self._config}")
        with (self.folder / "mosquitto.log").open("ab") as log:
            self._process = subprocess.Popen([binary, "-c", str(config)], stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with socket.socket() as probe:
                if probe.connect_ex((self.host, self.port)) == 0:
                    return self
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"mosquitto did not start:\n{self.log}")

    def kill(self) -> None:
        """Kill it as a power cut would."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """Ask it to end."""
        self._end(signal.SIGTERM)

    def freeze(self) -> None:
        """Stop it from answering, its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def _end(self, sign: int) -> None:
        if self._process is not None:
            self._process.send_signal(sign)
            self._process.send_signal(signal.SIGCONT)
            self._process.wait()
            self._process = None


class Server:
    """A server process on a free loopback port, to be killed and started again."""

    def __init__(self, *command: str) -> None:
        self.port = _free_port()
        self._command = [part.replace("PORT", str(self.port)) for part in command]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        quiet = subprocess.DEVNULL
        self._process = subprocess.Popen(self._command, stdout=quiet, stderr=quiet)
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return self
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{self._command[0]} did not start")

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()

    def freeze(self) -> None:
        """Stop it from answering, its connections open."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)


def nats_server(folder: Path) -> list[str]:
    """The command of a NATS server that keeps streams in a folder."""
    binary = shutil.which("nats-server", path=str(Path(sys.executable).parent)) or "nats-server"
    return [binary, "-js", "-sd", str(folder), "-a", "127.0.0.1", "-p", "PORT"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def make_broker(tmp_path: Path) -> Iterator[Callable[..., Broker]]:
    """Start a broker with lines of configuration; it ends with the test."""
    if mosquitto() is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto (make test does)")
    started: list[Broker] = []

    def make(config: str = "") -> Broker:
        folder = tmp_path / f"mosquitto{len(started)}"
        folder.mkdir()
        started.append(Broker(folder, config))
        return started[-1].start()

    yield make
    for broker in started:
        broker.kill()


@pytest.fixture
def broker(make_broker: Callable[..., Broker]) -> Broker:
    """A broker that lets everybody do everything."""
    return make_broker()
