"""What systemd wants to know of a service: that it is ready, alive, and stopping.

Source: sd_notify(3) and sd_watchdog_enabled(3): datagrams to the socket in ``NOTIFY_SOCKET``.
Without that variable nothing is sent.
"""

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress

import structlog

log = structlog.get_logger(__name__)


class Supervisor:
    """The line to systemd, or to nobody.

    Args:
        environment: Where systemd left its variables.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET")
        watched = environment.get("WATCHDOG_USEC", "")
        ours = environment.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self.watchdog_s = int(watched) / 1e6 if watched.isdigit() and ours else 0.0
        """How long we may be silent before we are restarted; 0: nobody watches."""

    def ready(self) -> None:
        """Everything is loaded and warm: streams brought from now on are computed."""
        self._tell("READY=1", f"STATUS=serving, pid {os.getpid()}")

    def reloading(self) -> None:
        """The configuration is read again; `ready` ends it."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The daemon drains."""
        self._tell("STOPPING=1")

    async def watch(self, alive: Callable[[], Awaitable[None]]) -> None:
        """Keep the watchdog quiet for as long as ``alive`` returns; ends when nobody watches.

        Args:
            alive: Passes through what must not hang: the inference.
        """
        while self.watchdog_s:
            await alive()
            self._tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_s / 3)

    def _tell(self, *lines: str) -> None:
        if self._address is None:
            return
        address = self._address
        if address.startswith("@"):  # Linux' abstract sockets
            address = "\0" + address[1:]
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        # A systemd that does not listen is no reason to fail.
        with socket.socket(socket.AF_UNIX, kind) as line, suppress(OSError):
            line.sendto("\n".join(lines).encode(), address)
