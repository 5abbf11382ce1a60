"""An `Inference` in a process of its own: both ends of the line between.

A step is some hundred short calls, each of which needs Python's lock, and so do the tracks: in one
process the two wait for each other, and a second core stays idle.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any, Final, Self

from stream.batcher import Ready
from stream.inference import EngineError, EngineSettings, Inference, Loaded
from stream.log import configured
from stream.pulse import GIVE_BACK_S, few_arenas, keep_loaded, trim
from stream.tracks.frames import Frames

POSSIBLE: Final = os.name == "posix"
"""A child inherits one end of the line; elsewhere there is no such thing."""

ENDS_WITHIN_S: Final = 5.0
"""How long what the model does may take when nobody needs it any more."""

KILLED_WITHIN_S: Final = 1.0
"""A driver that hangs may keep a process from ending even then."""

_CHILD: Final = "import sys; sys.path[:] = {path!r}; from stream.worker import serve; serve({fd})"
"""What it runs: from the same folders as its parent, and not from where it was started."""


class WorkerLost(EngineError):
    """The process ended, and with it the state of all streams."""


class Worker:
    """The parent's end; it is an `Inference`. `start`, then `open` first.

    All but `start` and `lost` block: they are for the thread of an engine, one call at a time.
    """

    loaded: Loaded

    def __init__(self, line: Connection, process: asyncio.subprocess.Process) -> None:
        self._line = line
        self._process = process

    @classmethod
    async def start(cls) -> Self:
        """A process that has nothing to do yet.

        Raises:
            EngineError: there cannot be another one.
        """
        ours, theirs = socket.socketpair()
        with theirs:
            code = _CHILD.format(path=sys.path, fd=theirs.fileno())
            try:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    "-c",
                    code,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # ours may be a sink's
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # a terminal's Ctrl-C is for the parent
                )
            except OSError as error:
                ours.close()
                raise EngineError(f"expected to start a process for the model ({error})") from error
        return cls(Connection(ours.detach()), process)

    async def lost(self) -> None:
        """Wait for the end of the process.

        Raises:
            WorkerLost: that was it.
        """
        raise _lost(await self._process.wait())

    def open(self, settings: EngineSettings, slots: int) -> Self:
        """See `Inference`."""
        self.loaded = self._ask("open", configured(), settings, slots)
        return self

    def step(self, batch: Sequence[Ready]) -> tuple[list[Frames], float]:
        """See `Inference.step`."""
        return self._ask("step", batch)

    def freeze(self, slot: int) -> Callable[[], bytes]:
        """See `Inference.freeze`."""
        saved = self._ask("freeze", slot)
        return lambda: saved

    def load(self, slot: int, data: bytes) -> None:
        """See `Inference.load`."""
        self._ask("load", slot, data)

    def alive(self) -> None:
        """See `Inference.alive`."""
        self._ask("alive")

    async def close(self, within_s: float = ENDS_WITHIN_S) -> None:
        """Let it finish what it does, within reason, and end it."""
        self._line.close()
        for patience_s in (within_s, KILLED_WITHIN_S):
            try:
                async with asyncio.timeout(patience_s):
                    await self._process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self._process.kill()

    def _ask(self, name: str, *given: object) -> Any:
        try:
            self._line.send((name, given))
            answer = self._line.recv()
        except (EOFError, OSError) as error:
            raise _lost(self._process.returncode) from error
        if isinstance(answer, _Raised):
            raise answer.error()
        return answer


class _Raised:
    """What a call raised, without the types of torch, which the parent does not load."""

    def __init__(self, error: Exception) -> None:
        kinds = (EngineError, ValueError)
        self.kind = next((kind for kind in kinds if isinstance(error, kind)), None)
        self.text = str(error) if self.kind else f"{type(error).__name__}: {error}"
        self.trace = "" if self.kind else traceback.format_exc()

    def error(self) -> Exception:
        """For the parent to raise; where it came from is a note of what nobody expected."""
        error = (self.kind or RuntimeError)(self.text)
        if self.trace:
            error.add_note(f"in the model's process:\n{self.trace}")
        return error


def _lost(code: int | None) -> WorkerLost:
    how = "ended"
    if code is not None:
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
    return WorkerLost(f"the model's process {how}; expected it to last (is there enough memory?)")


def serve(fd: int) -> None:
    """The child: answer until the parent, however it ends, lets go of the line.

    Args:
        fd: Its end, inherited.
    """
    # A terminal or a service manager tells everybody to stop; the parent still needs answers.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    few_arenas()
    with Connection(fd) as line, contextlib.suppress(EOFError, OSError):
        name, (logging, settings, slots) = line.recv()
        assert name == "open", name
        if logging is not None:
            logging.configure()
        try:
            inference = Inference(settings, slots)
        except Exception as error:  # noqa: BLE001 - it is the parent's to raise
            line.send(_Raised(error))
            return
        keep_loaded()
        line.send(inference.loaded)
        trimmed = monotonic()
        while True:
            name, given = line.recv()
            line.send(_answer(inference, name, given))
            if monotonic() - trimmed >= GIVE_BACK_S:
                trim()
                trimmed = monotonic()


def _answer(inference: Inference, name: str, given: tuple[Any, ...]) -> object:
    try:
        answer = getattr(inference, name)(*given)
        return answer() if callable(answer) else answer  # what may be done later is done here
    except Exception as error:  # noqa: BLE001 - it is the parent's to raise
        return _Raised(error)
