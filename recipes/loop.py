"""The training loop of every stage: steps, curves, checkpoints, and any number of processes.

A `Trainable` makes a step from nothing but its settings, its state and the step's number, so a run
that was cut at any moment and resumed makes the steps an unbroken one would have made.

Under ``torchrun --nproc-per-node N`` each process draws data of its own, gradients are averaged,
and the first process alone logs and saves.
"""

import json
import math
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, distributed

BARS = "▁▂▃▄▅▆▇█"


class Trainable(Protocol):
    """What the loop drives.

    Attributes:
        step: steps made so far.
        steps: steps to make.
    """

    step: int

    @property
    def steps(self) -> int:
        """Steps to make."""
        ...

    def advance(self) -> dict[str, float]:
        """Makes one step and gives its losses by name."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything a later process needs to go on; tensors and plain values only."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from such a state."""
        ...


@dataclass(frozen=True, slots=True)
class World:
    """The processes that train together.

    Attributes:
        rank: this one's number.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0


ALONE = World()


@contextmanager
def world(device: torch.device) -> Iterator[World]:
    """Joins the processes ``torchrun`` started, if it did: nccl between GPUs, gloo otherwise."""
    if "RANK" not in os.environ:
        yield ALONE
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def device_of(name: str) -> torch.device:
    """``auto`` is this process's GPU where there is one.

    Raises:
        SystemExit: a CUDA device was asked for, and there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise SystemExit(f"device: got {name}, but there is no CUDA device; expected cpu or auto")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return torch.device(name)


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """The mean over all processes; does nothing in a lone one.

    One flat tensor: a heap of small ones would spend its time on messages. A parameter that took no
    part in one process's step has a gradient of zero there.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        return
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    at = 0
    for gradient in gradients:
        gradient.copy_(flat[at : at + gradient.numel()].view_as(gradient))
        at += gradient.numel()


def ramp(step: int, steps: int, warm_up: int, decay: int) -> float:
    """Share of the highest learning rate: a rise, a plateau, a linear end.

    >>> [round(ramp(step, 10, 2, 5), 2) for step in (0, 1, 4, 6, 9)]
    [0.5, 1.0, 1.0, 0.8, 0.2]
    """
    rise = min(1.0, (step + 1) / max(warm_up, 1))
    fall = min(1.0, max(0.0, (steps - step) / max(decay, 1)))
    return rise * fall


def checkpoint_path(folder: Path) -> Path:
    """Where a run in ``folder`` keeps its state."""
    return folder / "checkpoint.pt"


def save(trainable: Trainable, folder: Path) -> None:
    """Writes the state in one move: a cut leaves the old one whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path = checkpoint_path(folder)
    partial = path.with_suffix(".partial")
    torch.save({"step": trainable.step, **trainable.state()}, partial)
    partial.rename(path)


def resume(trainable: Trainable, folder: Path) -> bool:
    """Goes on from the folder's checkpoint, if there is one."""
    path = checkpoint_path(folder)
    if not path.exists():
        return False
    state = torch.load(path, weights_only=True, map_location="cpu")
    trainable.load(state)
    trainable.step = state["step"]
    return True


def train(
    trainable: Trainable,
    folder: Path,
    *,
    name: str,
    save_s: float = 120,
    log_steps: int = 20,
    keep: Iterable[int] = (),
    who: World = ALONE,
) -> None:
    """Runs until the last step, or until SIGTERM or Ctrl-C, and saves.

    Args:
        trainable: What is trained.
        folder: Of ``checkpoint.pt`` and ``log.jsonl``.
        name: Said in the progress line.
        save_s: Seconds between checkpoints.
        log_steps: Steps whose mean is one line of the log.
        keep: Steps whose checkpoint stays, as ``step-N.pt``.
        who: The processes that train together.
    """
    found = resume(trainable, folder)
    stop: list[int] = []
    previous = {
        number: signal.signal(number, lambda received, _: stop.append(received))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    kept = set(keep)
    folder.mkdir(parents=True, exist_ok=True)
    saved = began = time.monotonic()
    sums: dict[str, list[float]] = {}
    try:
        with (
            (folder / ("log.jsonl" if who.leads else os.devnull)).open("a") as log,
            _Screen(name, trainable, who) as screen,
        ):
            screen.say(f"{name}: {'resumed at' if found else 'new run, at'} step {trainable.step}")
            while trainable.step < trainable.steps and not _any(stop):
                for key, value in trainable.advance().items():
                    sums.setdefault(key, []).append(value)
                if trainable.step in kept and who.leads:
                    save(trainable, folder)
                    (folder / f"step-{trainable.step}.pt").write_bytes(
                        checkpoint_path(folder).read_bytes()
                    )
                if trainable.step % log_steps == 0 or trainable.step == trainable.steps:
                    now = time.monotonic()
                    line = {key: round(_mean(values), 4) for key, values in sums.items()}
                    count = max(len(values) for values in sums.values())
                    line |= {"step": trainable.step, "s": round((now - began) / count, 3)}
                    log.write(json.dumps(line) + "\n")
                    log.flush()
                    screen.show(line)
                    sums, began = {}, now
                if who.leads and time.monotonic() - saved > save_s:
                    save(trainable, folder)
                    saved = time.monotonic()
            if who.leads:
                save(trainable, folder)
            screen.say(f"{name}: saved at step {trainable.step}")
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _mean(values: list[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _any(stop: list[int]) -> bool:
    """Whether any process was told to stop: they must leave the loop at one step."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return bool(stop)
    flag = torch.tensor(float(bool(stop)))
    if distributed.get_backend() == "nccl":
        flag = flag.cuda()
    distributed.all_reduce(flag)
    return bool(flag > 0)


def sparkline(values: Iterable[float]) -> str:
    """Bars from the lowest to the highest value.

    >>> sparkline([0, 1, 2, 7])
    '▁▂▃█'
    """
    values = [value for value in values if math.isfinite(value)]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0
    return "".join(BARS[round((value - low) * scale)] for value in values)


@dataclass
class _Screen:
    """A progress bar and a curve a loss in a terminal, a line each time otherwise."""

    name: str
    trainable: Trainable
    who: World
    curves: dict[str, deque[float]] = field(default_factory=dict[str, deque[float]])
    live: Live | None = None

    def __enter__(self) -> "_Screen":
        self.bar = Progress(
            TextColumn(self.name),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        steps = self.trainable.steps
        self.task = self.bar.add_task(self.name, total=steps, completed=self.trainable.step)
        if self.who.leads and sys.stdout.isatty():
            self.live = Live(self.bar, refresh_per_second=4)
            self.live.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live is not None:
            self.live.__exit__(None, None, None)

    def say(self, text: str) -> None:
        """A line of its own."""
        if self.who.leads:
            print(text, flush=True)

    def show(self, line: dict[str, float]) -> None:
        """The means of the last steps."""
        if not self.who.leads:
            return
        if self.live is None:
            print(" ".join(f"{key} {value:g}" for key, value in line.items()), flush=True)
            return
        for key, value in line.items():
            if key not in ("step", "s"):
                self.curves.setdefault(key, deque(maxlen=40)).append(value)
        self.bar.update(self.task, completed=int(line["step"]))
        self.live.update(Group(self.bar, self._table(line)))

    def _table(self, line: dict[str, float]) -> RenderableType:
        table = Table(box=None, padding=(0, 2))
        for title in ("loss", "now", "curve"):
            table.add_column(title, justify="right" if title == "now" else "left")
        for key, values in self.curves.items():
            table.add_row(key, f"{line.get(key, math.nan):.4g}", sparkline(values))
        return table
