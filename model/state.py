"""What a stream remembers between two steps: preallocated tensors with a leading slot dimension.

The caller owns the state; `step` updates it in place. Addresses never change, so a CUDA graph
captured over a state stays valid for its life. A slot of zeros is a stream that has not begun.
"""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Window:
    """What one step computes and remembers, in encoder frames (20 ms).

    A step takes ``chunk`` frames of new audio and emits ``chunk`` frames. It computes those and
    ``right`` frames of look-ahead, which the next step computes again, against ``left`` cached
    frames. Algorithmic latency: ``chunk + right`` frames and the rest of the last frame's
    receptive field.

    Attributes:
        chunk: new frames a step, at least 1.
        left: frames of cached keys and values.
        right: frames of look-ahead.
        warm_up: frames after which running normalisation statistics freeze.
    """

    chunk: int
    left: int
    right: int = 0
    warm_up: int = 1500

    def __post_init__(self) -> None:
        for name, least in (("chunk", 1), ("left", 0), ("right", 0), ("warm_up", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"{name}: expected at least {least} frame(s), got {value}")


class Slots:
    """Mixin of state dataclasses: every tensor field has the slot as its first dimension."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor with a name that is stable between runs, nested states included."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # only dataclasses mix it in
            yield from _named(field.name, getattr(self, field.name))

    @property
    def slots(self) -> int:
        """How many streams the state has room for."""
        return next(iter(self.tensors()))[1].shape[0]

    def reset(self, slots: Tensor) -> None:
        """Return slots to the beginning of a stream. slots: [n] int64, or [S] bool."""
        for _, tensor in self.tensors():
            tensor[slots] = 0

    def save(self, slot: int) -> bytes:
        """One slot → bytes, which `load` restores bit for bit on any device."""
        return self.freeze(slot)()

    def freeze(self, slot: int) -> Callable[[], bytes]:
        """A copy of one slot, for `save` while the next step goes on.

        Returns:
            Makes the bytes of it, on any thread.
        """
        self._check(slot)
        copied = {
            name: tensor[slot].detach().to("cpu", copy=True).contiguous()
            for name, tensor in self.tensors()
        }
        return lambda: save_tensors(copied)

    def load(self, slot: int, data: bytes) -> None:
        """Restore a slot that `save` wrote, from a state of the same model and window.

        Raises:
            ValueError: not the bytes of a slot, or of another model or window; names the tensor.
        """
        self._check(slot)
        try:
            saved = load_tensors(data)
        except SafetensorError as error:
            raise ValueError(f"expected the bytes of a saved slot ({error})") from error
        own = dict(self.tensors())
        for name, tensor in own.items():
            if name not in saved:
                raise ValueError(f"saved slot has no tensor {name!r}: another model wrote it")
            shape, dtype = tensor.shape[1:], tensor.dtype
            if saved[name].shape != shape or saved[name].dtype != dtype:
                raise ValueError(
                    f"saved slot, {name}: expected {tuple(shape)} {dtype}, "
                    f"got {tuple(saved[name].shape)} {saved[name].dtype}"
                )
        if extra := saved.keys() - own.keys():
            raise ValueError(
                f"saved slot has unknown tensors {sorted(extra)}: another model wrote it"
            )
        for name, tensor in own.items():
            tensor[slot].copy_(saved[name])

    def _check(self, slot: int) -> None:
        if not 0 <= slot < self.slots:
            raise ValueError(f"expected a slot in 0…{self.slots - 1}, got {slot}")


def _named(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Slots):
        for inner, tensor in value.tensors():
            yield f"{name}.{inner}", tensor
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):  # pyright: ignore[reportUnknownArgumentType]
            yield from _named(f"{name}.{i}", item)


Rows = slice | Tensor
"""The slots of a step's rows: a slice reads them in place, an index tensor [B] copies them."""


def rows_for(slots: Tensor | None, rows: int, capacity: int) -> Rows:
    """Which slots ``rows`` rows belong to; refuses a row without a slot of its own.

    A wrong cache is worse than an error. Slots that follow one another become a slice.

    Raises:
        ValueError: an index out of range, twice the same slot, or not one slot a row.
    """
    if slots is None:
        if rows != capacity:
            raise ValueError(f"expected {capacity} rows, one a slot, got {rows}")
        return slice(None)
    if slots.shape != (rows,):
        raise ValueError(f"slots: expected [{rows}], one a row, got {tuple(slots.shape)}")
    if slots.device.type != "cpu":
        return slots  # reading them would stall the device; whoever moved them there checked them
    wanted: list[int] = slots.tolist()
    for slot in wanted:
        if not 0 <= slot < capacity:
            raise ValueError(f"slots: expected 0…{capacity - 1}, got {slot}")
    if len(set(wanted)) != len(wanted):
        raise ValueError(f"slots: expected each once, got {wanted}")
    if wanted == list(range(wanted[0], wanted[0] + rows)):
        return slice(wanted[0], wanted[0] + rows)
    return slots


@dataclass
class RunningMoments(Slots):
    """Count, mean and sum of squared deviations, merged chunk by chunk (Chan et al., 1983).

    count: [S, 1] int64; mean, m2: [S, K] float32
    """

    count: Tensor
    mean: Tensor
    m2: Tensor

    @classmethod
    def zeros(
        cls, slots: int, channels: int, device: torch.device | None = None
    ) -> "RunningMoments":
        """Moments of nothing."""
        return cls(
            torch.zeros(slots, 1, dtype=torch.int64, device=device),
            torch.zeros(slots, channels, device=device),
            torch.zeros(slots, channels, device=device),
        )

    def step(self, x: Tensor, exists: Tensor, limit: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Merge a chunk and give the moments to normalise it with. x: [B, K, N] → [B, K] twice.

        Args:
            x: the chunk.
            exists: [B, N] bool, False for positions before or after the stream.
            limit: a row that has counted this many positions is frozen.
            rows: the slots of the B rows.

        Returns:
            mean and (biased) variance; variance 1 where nothing has been counted.
        """
        count, mean, m2 = self.count[rows], self.mean[rows], self.m2[rows]
        weight = exists.unsqueeze(1).to(torch.float32)
        n = exists.sum(1, keepdim=True)
        x = x.to(torch.float32)
        new_mean = (x * weight).sum(2) / n.clamp(min=1)
        new_m2 = ((x - new_mean.unsqueeze(2)).square() * weight).sum(2)
        total = count + n
        share = n / total.clamp(min=1)
        delta = new_mean - mean
        merge = (n > 0) & (count < limit)
        mean = torch.where(merge, mean + delta * share, mean)
        m2 = torch.where(merge, m2 + new_m2 + delta.square() * count * share, m2)
        count = torch.where(merge, total, count)
        self.count[rows], self.mean[rows], self.m2[rows] = count, mean, m2
        variance = torch.where(count > 0, m2 / count.clamp(min=1), torch.ones_like(m2))
        return mean, variance


@dataclass
class EncoderState(Slots):
    """Everything one encoder remembers of S streams.

    received:  [S] int64, samples of audio fed so far
    steps:     [S] int64, steps taken so far
    wave:      running moments of the waveform (used when the checkpoint wants normalised input)
    conv:      a layer's last unread input samples, [S, channels, carry] each
    group:     running moments of the first convolution (GroupNorm checkpoints)
    projected: [S, history + right, D] projected frames before the next chunk
    keys, values: [S, left + chunk + right, heads, head_dim] a layer: a ring with frame p at entry
                  p mod left, then room for the frames of the step under way
    """

    received: Tensor
    steps: Tensor
    wave: RunningMoments
    conv: list[Tensor]
    group: RunningMoments
    projected: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    window: Window
    normalize: bool


def ring_positions(end: Tensor, capacity: int) -> Tensor:
    """The frame each ring entry holds when frames before ``end`` were written; < 0 is none.

    end: [B] int64 → [B, capacity] int64
    """
    entry = torch.arange(capacity, device=end.device)
    last = end.unsqueeze(1) - 1
    return last - (last - entry) % max(capacity, 1)
