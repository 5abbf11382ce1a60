"""A daemon in a process of its own, looked at from outside: for benchmarks that load it."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import httpx
import yaml

ROOT = Path(__file__).parents[1]
MEETING = ROOT / "stream/demo/meeting.flac"
SLOPE_MIB_H = 1.0
"""How much a daemon may grow (reliability bar, row 15)."""
OVERHEAD = 1.5
"""Memory of a kept line of the feed, for each of its bytes."""
STARTS_WITHIN_S = 120.0
ENDS_WITHIN_S = 60.0


def free_ports(count: int) -> list[int]:
    """Ports that nobody uses now, all different, for TCP and UDP."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@dataclass
class Daemon:
    """`livesat run`.

    Attributes:
        folder: Where its configuration and its standard error are.
        port: Of its server.
        code: Its exit code, once it has ended.
        resident: (seconds since `watch` began, MiB) once a second.
    """

    folder: Path
    port: int
    code: int | None = None
    resident: list[tuple[float, float]] = field(default_factory=list)
    _process: "subprocess.Popen[bytes] | None" = None

    async def start(self, tree: Mapping[str, Any], env: Mapping[str, str] | None = None) -> None:
        """Start it with this configuration, and wait until it is ready."""
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(dict(tree)))
        command = [sys.executable, "-m", "stream", "run", "--config", str(path)]
        with (self.folder / "errors.log").open("ab") as errors:
            self._process = await asyncio.to_thread(
                subprocess.Popen, command, cwd=ROOT, stderr=errors, env=env
            )
        async with asyncio.timeout(STARTS_WITHIN_S), self.http() as http:
            while True:
                if self._process.poll() is not None:
                    raise RuntimeError(f"the daemon did not start:\n{self.said}")
                try:
                    if (await http.get("/readyz")).status_code == 200:
                        return
                except httpx.TransportError:
                    await asyncio.sleep(0.05)

    @contextlib.asynccontextmanager
    async def running(
        self, tree: Mapping[str, Any], env: Mapping[str, str] | None = None
    ) -> "AsyncIterator[Daemon]":
        """Start it; stop it at the end, if that has not happened."""
        await self.start(tree, env)
        try:
            yield self
        finally:
            await self.stop()

    def http(self) -> httpx.AsyncClient:
        """A client of its server."""
        return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=30)

    def url(self, path: str) -> str:
        """Of a WebSocket."""
        return f"ws://127.0.0.1:{self.port}{path}"

    async def stop(self) -> None:
        """SIGTERM, and wait for the end."""
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL."""
        await self._end(signal.SIGKILL)

    async def _end(self, number: int) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.send_signal(number)
            try:
                self.code = await asyncio.to_thread(process.wait, ENDS_WITHIN_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process is not None
        return self._process.pid

    @property
    def mib(self) -> float:
        """Resident memory of it and of its model's process."""
        return sum(map(resident_mib, family(self.pid)))

    @property
    def said(self) -> str:
        """Its standard error so far."""
        return (self.folder / "errors.log").read_text(errors="replace")

    @property
    def tracebacks(self) -> int:
        """How many it has written."""
        return self.said.count("Traceback (most recent call last)")

    async def watch(self) -> None:
        """Note its memory once a second, until it ends."""
        began = monotonic()
        while self._process is not None:
            self.resident.append((monotonic() - began, self.mib))
            await asyncio.sleep(1.0)

    def usual_mib(self, begin_s: float, end_s: float) -> float:
        """Its memory in a stretch of time: the median, between saves and moments after a trim."""
        return median(mib for at, mib in self.resident if begin_s <= at < end_s)


def resident_mib(pid: int) -> float:
    """Resident memory of a process."""
    return _status_mib(pid, "VmRSS")


def peak_mib(pid: int) -> float:
    """The most resident memory a process has had."""
    return _status_mib(pid, "VmHWM")


def _status_mib(pid: int, field: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def open_files(pid: int) -> int:
    """Open files of a process and of those it started."""
    return sum(len(list(Path(f"/proc/{each}/fd").iterdir())) for each in family(pid))


def family(pid: int) -> list[int]:
    """A process and those it started, as far as they are there when they are looked at."""
    children: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(OSError):
                children += map(int, (task / "children").read_text().split())
    return [pid, *(each for child in children for each in family(child))]
