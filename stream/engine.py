"""The one owner of the model, the slots and the inference thread.

Torch is imported here, and only when an engine opens: everything around it stays quick to import.
"""

import asyncio
import contextlib
import hashlib
import queue
import re
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from stream.batcher import Ready
from stream.clock import FRAME_RATE, HOP, SAMPLE_RATE
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import NAMES

if TYPE_CHECKING:
    import torch

    from model.encoder import PreTrainedModel
    from model.state import Window
    from model.streaming import Pass, PassState, StreamingModel

log = structlog.get_logger(__name__)

T = TypeVar("T")
Floats = NDArray[np.float32]

EMBEDDED: Final = "embedded"
"""In `EngineSettings.checkpoint`: the checkpoint that came with the package."""

LOUDEST: Final = 1e6
"""A sample beyond this is no audio: it is treated as non-finite before it overflows the model."""

WARM: Final = 16
"""Every size of batch up to this is warmed up, and the largest."""

_DEVICE: Final = re.compile(r"auto|cpu|cuda(:\d+)?")
_ORIGIN: Final = struct.Struct("<q")


class EngineError(Exception):
    """The engine cannot be opened: what was given and what was expected."""


class EngineFull(EngineError):
    """Every slot is taken."""


class EngineSettings(BaseModel):
    """Which checkpoints run, where, and in which steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: tuple[str, ...] = Field(
        default=(EMBEDDED,),
        min_length=1,
        description='Folders or hub ids, one a head; "embedded" is the one in the package.',
    )
    chunk_ms: int = Field(default=500, ge=20, le=30_000, description="New audio a step.")
    lookahead_ms: int = Field(default=240, ge=0, le=10_000, description="Audio a step may look at.")
    left_ms: int = Field(default=10_000, ge=0, le=120_000, description="Audio it remembers.")
    device: str = Field(default="auto", description="auto, cpu, cuda or cuda:N.")
    threads: int | None = Field(
        default=None,
        ge=1,
        le=256,
        description="Compute threads; null is one a core, less one for a daemon's event loop.",
    )
    slots: int | None = Field(
        default=None, ge=1, le=4096, description="Streams at a time; null is one a source."
    )
    max_batch: int = Field(default=16, ge=1, le=1024, description="Streams a batch.")
    batch_wait_ms: float = Field(
        default=8.0, ge=0, le=1000, description="How long a chunk waits for others' to join it."
    )

    @field_validator("chunk_ms", "lookahead_ms", "left_ms")
    @classmethod
    def _whole_frames(cls, value: int) -> int:
        if value % (1000 // FRAME_RATE):
            raise ValueError(f"expected a multiple of {1000 // FRAME_RATE} ms, got {value}")
        return value

    @field_validator("device")
    @classmethod
    def _known_device(cls, value: str) -> str:
        if not _DEVICE.fullmatch(value):
            raise ValueError(f"expected auto, cpu, cuda or cuda:N, got {value!r}")
        return value


@dataclass(slots=True)
class EngineStats:
    """What the engine did since it opened.

    Attributes:
        compute_s: Seconds the inference thread spent in steps.
        audio_s: Seconds of audio in them, summed over streams.
        last_s: Seconds of the latest step.
        batches: Batch size → how many batches had it.
    """

    compute_s: float = 0.0
    audio_s: float = 0.0
    last_s: float = 0.0
    batches: Counter[int] = field(default_factory=Counter[int])

    @property
    def realtime_factor(self) -> float:
        """Compute seconds for a second of audio."""
        return self.compute_s / self.audio_s if self.audio_s else 0.0


class Engine:
    """`async with Engine(settings) as engine` loads, warms up, and runs batches until it closes.

    Everything of torch happens on one thread of its own, so the event loop never computes and
    batches never overlap; `embed` alone is for the caller's thread, and is a few lines of numpy.

    Args:
        settings: What to load, where, in which steps.
        streams: Slots when the settings leave their number open.
    """

    chunk_samples: int
    """Samples a step takes from each stream."""
    window: "Window"
    """Chunk, look-ahead and left context in frames."""
    lead: int
    """Frames still under way when their audio is in: what a flush brings out."""
    receptive: int
    """Samples the first frame needs."""
    names: list[str]
    """Checkpoints, as a subscriber reads them."""
    vocabulary: Vocabulary | None
    """Symbols of the CTC head, if one is loaded."""
    voice_delay: int
    """Frames by which `Frames.voice` lags."""
    voice_id: str | None
    """Content id of the speaker checkpoint: embeddings compare only under the same one."""
    labels: dict[str, tuple[str, ...]]
    """Sequence-classification head → its class names."""
    tracks_file: Path | None
    """`tracks.json` beside the first checkpoint that has one."""
    cohort: Floats | None
    """[N, E] voices to measure scores by, from `cohort.npy` beside the speaker checkpoint."""
    language_file: Path | None
    """The language model beside the CTC checkpoint, if it has one."""

    def __init__(self, settings: EngineSettings, streams: int = 1) -> None:
        self.settings = settings
        self.stats = EngineStats()
        self.slots = settings.slots or max(streams, 1)
        self._thread: _Thread | None = None
        self._model: StreamingModel
        self._state: PassState
        self._device: torch.device
        self._pooled: tuple[Floats, Floats] | None = None  # the layer behind statistics pooling
        self._free: list[int] = []
        self._taken: set[int] = set()
        self._origin = [0] * self.slots  # stream-clock sample of each slot's frame 0

    async def __aenter__(self) -> Self:
        """Load and warm up.

        Raises:
            EngineError: a checkpoint, a device or a combination of them that cannot run.
        """
        thread = _Thread("inference")
        try:
            await thread.run(self._open)
        except BaseException:
            await thread.stop()
            raise
        self._thread = thread
        self._free = list(range(self.slots - 1, -1, -1))
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._thread is not None:
            await self._thread.stop()
            self._thread = None

    def acquire(self) -> int:
        """A free slot. Its state is reset by the first chunk (`Ready.first`).

        Raises:
            EngineFull: there is none.
        """
        if not self._free:
            raise EngineFull(f"all {self.slots} slots are taken; engine.slots sets their number")
        slot = self._free.pop()
        self._taken.add(slot)
        return slot

    def release(self, slot: int) -> None:
        """Give a slot back."""
        assert slot in self._taken, f"slot {slot} is not taken"
        self._taken.remove(slot)
        self._free.append(slot)

    async def alive(self) -> None:
        """Return once the inference thread has done what it was doing."""
        await self._call(lambda: None)

    @property
    def active(self) -> int:
        """Slots in use."""
        return len(self._taken)

    async def run(self, batch: Sequence[Ready]) -> list[Frames]:
        """One step for every stream of the batch → their frames, in the batch's order.

        Frames that do not exist (before a stream's first, after its last) are left out. A chunk
        with a sample that is not finite, or beyond any audio, is heard as silence and begins the
        slot's stream afresh (`Frames.nonfinite`); its neighbours notice nothing.

        Raises:
            ValueError: a slot that is not taken, or taken twice, or a chunk of another length.
        """
        slots = [ready.slot for ready in batch]
        if unknown := [slot for slot in slots if slot not in self._taken]:
            raise ValueError(f"expected slots that are taken, got {unknown}")
        if len(set(slots)) != len(slots):
            raise ValueError(f"expected every slot once, got {slots}")
        for ready in batch:
            if ready.samples.shape != (self.chunk_samples,):
                raise ValueError(
                    f"expected samples [{self.chunk_samples}], got {ready.samples.shape}"
                )
        return await self._call(lambda: self._step(batch)) if batch else []

    def embed(self, mass: NDArray[Any], first: NDArray[Any], second: NDArray[Any]) -> Floats:
        """Weighted moments of `Frames.voice` → embeddings, as `UniSpeechSatForXVector.embed`.

        Args:
            mass: […] sum of weights.
            first: […, D] weighted sum.
            second: […, D] weighted sum of squares.

        Returns:
            […, E].
        """
        assert self._pooled is not None, "no speaker head is loaded"
        weight, bias = self._pooled
        n = np.asarray(mass, np.float64)[..., None]
        mean = np.asarray(first, np.float64) / np.maximum(n, 1e-6)
        spread = (np.asarray(second, np.float64) - n * np.square(mean)) / np.maximum(n - 1, 1e-6)
        pooled = np.concatenate([mean, np.sqrt(np.maximum(spread, 0))], axis=-1)
        # Neither torch nor BLAS: their thread pools cost this thread milliseconds for microseconds.
        return np.einsum("...d,ed->...e", pooled.astype(np.float32), weight) + bias

    @property
    def has_voice(self) -> bool:
        """Whether a speaker head is loaded."""
        return self._pooled is not None

    async def freeze(self, slot: int) -> Callable[[], bytes]:
        """A slot's state as it is now.

        Returns:
            Makes bytes of it, on any thread, which `load` restores bit for bit in an engine of the
            same settings.
        """
        origin = _ORIGIN.pack(self._origin[slot])
        saved = await self._call(lambda: self._state.freeze(slot))
        return lambda: origin + saved()

    async def load(self, slot: int, data: bytes) -> None:
        """Restore what `freeze` gave.

        Raises:
            ValueError: not the bytes of a slot, or of another checkpoint or window.
        """
        if len(data) < _ORIGIN.size:
            raise ValueError(f"expected the bytes of a saved slot, got {len(data)} bytes")
        await self._call(lambda: self._state.load(slot, data[_ORIGIN.size :]))
        self._origin[slot] = _ORIGIN.unpack_from(data)[0]

    async def _call(self, call: Callable[[], T]) -> T:
        assert self._thread is not None, "the engine is not open"
        return await self._thread.run(call)

    # -- on the inference thread ------------------------------------------------------------

    def _open(self) -> None:
        import torch

        from model.checkpoint import CheckpointError
        from model.state import Window
        from model.streaming import StreamingModel

        settings = self.settings
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._device = _device(settings.device)
        paths = _expand(settings.checkpoint)
        try:
            loaded = [_load(path, self._device) for path in paths]
            frame_ms = 1000 // FRAME_RATE
            self.window = Window(
                chunk=settings.chunk_ms // frame_ms,
                left=settings.left_ms // frame_ms,
                right=settings.lookahead_ms // frame_ms,
            )
            model = StreamingModel(
                [each.model for each in loaded],
                self.window,
                normalize=[each.normalize for each in loaded],
            )
        except (CheckpointError, ValueError) as error:
            raise EngineError(str(error)) from error
        if model.config.inputs_to_logits_ratio != HOP:
            raise EngineError(
                f"{paths[0]}: expected {HOP} samples from frame to frame, "
                f"got {model.config.inputs_to_logits_ratio}"
            )
        self._model = model
        self.chunk_samples = model.chunk_samples
        self.lead = model.lead
        self.receptive = model.config.receptive_field
        self.voice_delay = model.voice_delay
        self.names = [each.name for each in loaded]
        self.vocabulary = next((each.vocabulary for each in loaded if each.vocabulary), None)
        if model.voice is not None:
            layer = model.voice.feature_extractor
            self._pooled = (_numpy(layer.weight.detach()), _numpy(layer.bias.detach()))
        self.voice_id = None if model.voice is None else _content_id(model.voice)
        self.labels = {each.name: each.classes for each in loaded if each.model is model.labels}
        self.tracks_file = next((each.tracks for each in loaded if each.tracks), None)
        beside = next((each.cohort for each in loaded if each.model is model.voice), None)
        self.cohort = None if beside is None else _cohort(beside, model)
        self.language_file = next((each.language for each in loaded if each.vocabulary), None)
        self._state = model.zeros(self.slots)
        self._warm_up()
        log.info(
            "engine ready",
            checkpoint=self.names,
            device=str(self._device),
            encoders=model.encoders,
            slots=self.slots,
        )

    def _warm_up(self) -> None:
        """Steps of silence: allocators and kernels are ready before the first stream.

        A size of batch that is new costs time and, from then on, memory for its kernels; a slot
        that is new costs its state. A machine with too little of it shows it now and not when the
        last caller comes, and later streams make the process no larger.
        """
        import torch

        largest = min(self.slots, self.settings.max_batch)
        for streams in (1, *range(1, min(largest, WARM) + 1), largest):
            silence = torch.zeros(streams, self.chunk_samples)
            self._model.step(silence, self._state, torch.arange(streams))
        # Zeros that were never written are no memory yet.
        self._state.reset(torch.arange(self.slots, device=self._device))

    def _step(self, batch: Sequence[Ready]) -> list[Frames]:
        import torch

        began = perf_counter()
        with torch.inference_mode():
            frames = self._advance(batch)
        self.stats.last_s = perf_counter() - began
        self.stats.compute_s += self.stats.last_s
        self.stats.audio_s += sum(ready.valid for ready in batch) / SAMPLE_RATE
        self.stats.batches[len(batch)] += 1
        return frames

    def _advance(self, batch: Sequence[Ready]) -> list[Frames]:
        import torch

        slots = torch.tensor([ready.slot for ready in batch])
        fresh = [ready.slot for ready in batch if ready.first]
        if fresh:
            self._state.reset(torch.tensor(fresh, device=self._device))
        for ready in batch:
            if ready.first:
                self._origin[ready.slot] = ready.start
        samples = np.stack([ready.samples for ready in batch])
        with np.errstate(invalid="ignore"):
            samples[~(np.abs(samples) <= LOUDEST)] = np.nan  # also what is NaN already
        valid = torch.tensor([ready.valid for ready in batch])
        result = self._model.step(torch.from_numpy(samples), self._state, slots, valid)
        heads = _Heads.of(result, self._model)
        starts, reset = result.start.tolist(), result.reset.tolist()
        mask = result.mask.cpu().numpy()
        return [
            self._frames(ready, heads.row(row), starts[row], reset[row], mask[row])
            for row, ready in enumerate(batch)
        ]

    def _frames(
        self, ready: Ready, heads: "_Heads", start: int, reset: bool, mask: NDArray[np.bool_]
    ) -> Frames:
        """One row of a pass → its frames on the stream's clock, those that exist."""
        import torch

        if reset:
            self._origin[ready.slot] = ready.start
        exist = np.flatnonzero(mask)
        begin, end = (int(exist[0]), int(exist[-1]) + 1) if len(exist) else (0, 0)
        # Without any: the next frame there would be.
        first = start + begin if len(exist) else max(start, 0)
        heads = heads.cut(begin, end)
        if not heads.finite:
            # An overflow inside the model: nothing of this slot can be trusted any more.
            self._state.reset(torch.tensor([ready.slot], device=self._device))
            self._origin[ready.slot] = ready.start + self.chunk_samples
            heads = heads.cut(0, 0)
            return heads.frames(self._origin[ready.slot], self.voice_delay, nonfinite=True)
        at = self._origin[ready.slot] + first * HOP
        return heads.frames(at, self.voice_delay, nonfinite=reset)


@dataclass(frozen=True, slots=True)
class _Heads:
    """Head outputs of a pass as numpy: [B, C, …] of the batch, [T, …] of a row."""

    activity: Floats | None
    voice: Floats | None
    ctc: Floats | None
    labels: dict[str, Floats]

    @classmethod
    def of(cls, result: "Pass", model: "StreamingModel") -> Self:
        labels: dict[str, Floats] = {}
        if result.labels is not None:
            assert model.labels is not None
            # The published head averages, then classifies; both are linear and may change places.
            labels[_name_of(model.labels)] = _numpy(model.labels.classifier(result.labels))
        return cls(
            activity=None if result.activity is None else _numpy(result.activity.sigmoid()),
            voice=None if result.voice is None else _numpy(result.voice),
            ctc=None if result.ctc is None else _numpy(result.ctc.float().log_softmax(-1)),
            labels=labels,
        )

    def row(self, row: int) -> "_Heads":
        return self._each(lambda array: array[row])

    def cut(self, begin: int, end: int) -> "_Heads":
        return self._each(lambda array: array[begin:end])

    def _each(self, part: Callable[[Floats], Floats]) -> "_Heads":
        return _Heads(
            None if self.activity is None else part(self.activity),
            None if self.voice is None else part(self.voice),
            None if self.ctc is None else part(self.ctc),
            {name: part(array) for name, array in self.labels.items()},
        )

    @property
    def finite(self) -> bool:
        arrays = (self.activity, self.voice, self.ctc, *self.labels.values())
        return all(array is None or bool(np.isfinite(array).all()) for array in arrays)

    def frames(self, start: int, voice_delay: int, *, nonfinite: bool) -> Frames:
        return Frames(
            start=start,
            activity=self.activity,
            voice=self.voice,
            ctc=self.ctc,
            nonfinite=nonfinite,
            voice_delay=voice_delay,
            labels=self.labels or None,
        )


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One checkpoint and what lies beside its weights."""

    name: str
    model: "PreTrainedModel"
    normalize: bool
    vocabulary: Vocabulary | None
    classes: tuple[str, ...]
    tracks: Path | None
    language: Path | None
    cohort: Path | None


def embedded() -> list[Path]:
    """The folders of the checkpoint in the package; empty when this build has none."""
    weights = resources.files("model") / "weights"
    if not isinstance(weights, Path):  # a zipped package has no folder torch could read from
        return []
    folders = (weights / name for name in ("diarization", "speaker", "ctc"))
    return [folder for folder in folders if (folder / "config.json").is_file()]


def _expand(checkpoint: Sequence[str]) -> list[str]:
    paths: list[str] = []
    for each in checkpoint:
        if each != EMBEDDED:
            paths.append(each)
            continue
        folders = embedded()
        if not folders:
            raise EngineError(
                "this build has no embedded checkpoint; expected --checkpoint or engine.checkpoint"
            )
        paths += [str(folder) for folder in folders]
    return paths


def _load(path: str, device: "torch.device") -> _Loaded:
    from model.checkpoint import find, load_pretrained, read_json
    from model.heads import UniSpeechSatForCTC, UniSpeechSatForSequenceClassification

    model = load_pretrained(path, device=device)
    model.source = path
    processor = find(path, "preprocessor_config.json")
    if processor is None:
        log.warning("no preprocessor_config.json, assuming do_normalize", checkpoint=path)
    vocabulary = None
    if isinstance(model, UniSpeechSatForCTC):
        vocabulary = _vocabulary(path, model.config.vocab_size or 0, model.config.pad_token_id)
    classes: tuple[str, ...] = ()
    if isinstance(model, UniSpeechSatForSequenceClassification):
        classes = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    folder = Path(path).expanduser()
    tracks = (folder / "tracks.json", folder.parent / "tracks.json")
    return _Loaded(
        name=_name(path),
        model=model,
        normalize=True
        if processor is None
        else bool(read_json(processor).get("do_normalize", True)),
        vocabulary=vocabulary,
        classes=classes,
        tracks=next((file for file in tracks if file.is_file()), None),
        language=next((folder / name for name in NAMES if (folder / name).is_file()), None),
        cohort=cohort if (cohort := folder / "cohort.npy").is_file() else None,
    )


def _cohort(path: Path, model: "StreamingModel") -> Floats:
    """Voices beside a speaker checkpoint.

    Raises:
        EngineError: not an array of its embeddings.
    """
    assert model.voice is not None
    size = model.voice.config.xvector_output_dim
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise EngineError(f"{path}: expected an array of numpy's ({error})") from error
    if vectors.ndim != 2 or vectors.shape[1] != size or not np.isfinite(vectors).all():
        raise EngineError(f"{path}: expected finite embeddings [N, {size}], got {vectors.shape}")
    return vectors.astype(np.float32)


def _content_id(model: "PreTrainedModel") -> str:
    """Of all weights that count towards an embedding, encoder and head."""
    import torch

    from model.checkpoint import content_hash

    state = model.state_dict()
    digest = hashlib.sha256(content_hash(state).encode())
    for name in sorted(state):
        if name.startswith(("layer_weights", "projector.", "tdnn.", "feature_extractor.")):
            value = state[name].detach().cpu().contiguous().flatten()
            digest.update(f"{name} {value.dtype}\n".encode())
            digest.update(value.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _vocabulary(path: str, size: int, blank: int) -> Vocabulary:
    from model.checkpoint import find, read_json

    file = find(path, "vocab.json")
    if file is None:
        raise EngineError(f"{path}: expected a vocab.json beside a CTC head, found none")
    tokens = [""] * size
    for token, index in read_json(file).items():
        if not isinstance(index, int) or not 0 <= index < size:
            raise EngineError(
                f"{file}: {token!r}: expected an index below vocab_size ({size}), got {index!r}"
            )
        tokens[index] = token
    settings = find(path, "tokenizer_config.json")
    delimiter = read_json(settings).get("word_delimiter_token", "|") if settings else "|"
    return Vocabulary(tuple(tokens), blank, delimiter if delimiter in tokens else None)


def _name(path: str) -> str:
    """What a subscriber reads: "embedded/ctc", a hub id, or a folder's name."""
    folder = Path(path).expanduser()
    if folder in embedded():
        return f"{EMBEDDED}/{folder.name}"
    return folder.resolve().name if folder.exists() else path


def _name_of(model: "PreTrainedModel") -> str:
    return _name(str(model.source))


def _device(name: str) -> "torch.device":
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise EngineError(f"device: {name} is not here ({count} CUDA device(s)); expected cpu")
    return device


def _numpy(tensor: "torch.Tensor") -> Floats:
    return tensor.float().cpu().numpy()


class _Thread:
    """Runs calls one after another on a thread of its own.

    A daemon thread: a call that hangs in a driver must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        # Bound: every caller awaits its call, so one a caller.
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name=name, daemon=True)
        self._thread.start()

    async def run(self, call: Callable[[], T]) -> T:
        """Await ``call()`` on the thread. Cancelled, it still runs, and its result is dropped."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(result: Callable[[], None]) -> None:
            if not future.done():
                result()

        def serve() -> None:
            try:
                value = call()
            except BaseException as error:  # noqa: BLE001 - it is the awaiting task's to raise
                raised = error
                answer = lambda: future.set_exception(raised)  # noqa: E731
            else:
                answer = lambda: future.set_result(value)  # noqa: E731
            # The loop may be gone when the process ends amid a call: nobody waits then.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle, answer)

        self._calls.put(serve)
        return await future

    async def stop(self) -> None:
        """Let the current call finish, within reason."""
        self._calls.put(None)
        await asyncio.to_thread(self._thread.join, 5.0)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
