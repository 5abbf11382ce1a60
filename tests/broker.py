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
from typing import Any, Final, Self

import nats
import pytest

SEARCH: Final = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"))
STARTS_WITHIN_S: Final = 15.0


def mosquitto() -> str | None:
    """The broker's binary: Debian installs it where only root looks."""
    return shutil.which("mosquitto", path=SEARCH)


class Server:
    """A server process on a free loopback port, to be killed and started again.

    Args:
        command: How it is started; PORT stands for its port.
        log: The file of what it says; None discards it.
    """

    host = "127.0.0.1"

    def __init__(self, *command: str, log: Path | None = None) -> None:
        self.port = _free_port()
        self._command = [part.replace("PORT", str(self.port)) for part in command]
        self._log = Path(os.devnull) if log is None else log
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def start(self) -> Self:
        """Start, and return once it takes connections."""
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log)
        deadline = time.monotonic() + STARTS_WITHIN_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex((self.host, self.port)) == 0:
                    return self
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{self._command[0]} did not start:\n{self.log}")

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


class Broker(Server):
    """mosquitto; `config` is added to its configuration file."""

    def __init__(self, folder: Path, config: str = "") -> None:
        binary, file = mosquitto(), folder / "mosquitto.conf"
        assert binary is not None
        super().__init__(binary, "-c", str(file), log=folder / "mosquitto.log")
        user = "user root\n" if os.geteuid() == 0 else ""
        access = "" if "allow_anonymous" in config else "allow_anonymous true\n"
        file.write_text(f"{user}listener {self.port} {self.host}\n{access}{config}")


async def stored(server: Server) -> list[Any]:
    """Every message of JetStream's stream LIVESAT, in order."""
    client = await nats.connect(f"nats://{server.host}:{server.port}")
    try:
        stream = client.jetstream()
        count = (await stream.stream_info("LIVESAT")).state.messages
        reader = await stream.subscribe("livesat.>", ordered_consumer=True)
        return [await reader.next_msg(timeout=10) for _ in range(count)]
    finally:
        await client.close()


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
