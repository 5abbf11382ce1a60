"""The model and its slots: what an `Engine` drives, on a thread of it or in another process.

Torch is imported here, and only when something is opened: everything around it stays quick to
import.
"""

import hashlib
import re
import struct
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import structlog
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from stream.batcher import Ready
from stream.clock import FRAME_RATE, HOP
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import NAMES

if TYPE_CHECKING:
    import torch

    from model.encoder import PreTrainedModel
    from model.streaming import Pass, StreamingModel

log = structlog.get_logger(__name__)

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
    """The engine cannot be opened, or cannot go on: what there is and what was expected."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What is known once the checkpoints are loaded.

    Attributes:
        chunk_samples: Samples a step takes from each stream.
        lead: Frames still under way when their audio is in: what a flush brings out.
        receptive: Samples the first frame needs.
        names: Checkpoints, as a subscriber reads them.
        vocabulary: Symbols of the CTC head, if one is loaded.
        voice_delay: Frames by which `Frames.voice` lags.
        voice_id: Content id of the speaker checkpoint: embeddings compare only under the same one.
        pooled: Weight [E, 2 D] and bias [E] of the layer behind statistics pooling.
        labels: Sequence-classification head → its class names.
        tracks_file: `tracks.json` beside the first checkpoint that has one.
        cohort: [N, E] voices to measure scores by, from `cohort.npy` beside the speaker checkpoint.
        language_file: The language model beside the CTC checkpoint, if it has one.
        device: Where it computes.
        encoders: Encoder passes a step takes.
        warnings: What the user should know of the checkpoints.
    """

    chunk_samples: int
    lead: int
    receptive: int
    names: list[str]
    vocabulary: Vocabulary | None
    voice_delay: int
    voice_id: str | None
    pooled: tuple[Floats, Floats] | None
    labels: dict[str, tuple[str, ...]]
    tracks_file: Path | None
    cohort: Floats | None
    language_file: Path | None
    device: str
    encoders: int
    warnings: tuple[str, ...]


class Inference:
    """Checkpoints, loaded and warmed up, and the state of their streams. Blocks; one call a time.

    Args:
        settings: What to load, where, in which steps.
        slots: How many streams there is room for.

    Raises:
        EngineError: a checkpoint, a device or a combination of them that cannot run. From every
            method: the device failed, and nothing can be computed any more.
    """

    def __init__(self, settings: EngineSettings, slots: int) -> None:
        import torch

        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._device = _device(settings.device)
        self._origin = [0] * slots  # stream-clock sample of each slot's frame 0
        self._fits = settings.max_batch  # streams that the device has the memory to step at a time
        with self._device_errors():
            self._set_up(settings)

    def _set_up(self, settings: EngineSettings) -> None:
        from model.checkpoint import CheckpointError
        from model.state import Window
        from model.streaming import StreamingModel

        paths = _expand(settings.checkpoint)
        try:
            opened = [_open(path, self._device) for path in paths]
            frame_ms = 1000 // FRAME_RATE
            window = Window(
                chunk=settings.chunk_ms // frame_ms,
                left=settings.left_ms // frame_ms,
                right=settings.lookahead_ms // frame_ms,
            )
            model = StreamingModel(
                [each.model for each in opened],
                window,
                normalize=[each.normalize for each in opened],
            )
        except (CheckpointError, ValueError) as error:
            raise EngineError(str(error)) from error
        if model.config.inputs_to_logits_ratio != HOP:
            raise EngineError(
                f"{paths[0]}: expected {HOP} samples from frame to frame, "
                f"got {model.config.inputs_to_logits_ratio}"
            )
        self._model = model
        self.loaded = _facts(opened, model, self._device)
        self._state = model.zeros(len(self._origin))
        self._tensors = [tensor for _, tensor in self._state.tensors()]
        self._no_frame = self._warm_up(min(len(self._origin), settings.max_batch))

    def step(self, batch: Sequence[Ready]) -> tuple[list[Frames], float]:
        """One step for every stream of the batch → their frames, and the seconds it took.

        Several steps, where the device has not enough memory for one. Who was in a step that broke
        off when it had begun to write loses this chunk, and begins afresh (`Frames.nonfinite`).
        """
        import torch

        began = perf_counter()
        with self._device_errors(), torch.inference_mode():
            self._begin(batch)
            frames = self._in_parts(batch)
        return frames, perf_counter() - began

    def freeze(self, slot: int) -> Callable[[], bytes]:
        """See `Engine.freeze`."""
        origin = _ORIGIN.pack(self._origin[slot])
        with self._device_errors():
            saved = self._state.freeze(slot)
        return lambda: origin + saved()

    def load(self, slot: int, data: bytes) -> None:
        """See `Engine.load`."""
        if len(data) < _ORIGIN.size:
            raise ValueError(f"expected the bytes of a saved slot, got {len(data)} bytes")
        with self._device_errors():
            self._state.load(slot, data[_ORIGIN.size :])
        self._origin[slot] = _ORIGIN.unpack_from(data)[0]

    def alive(self) -> None:
        """Returns: who can call this does not wait for a step that hangs."""

    @contextmanager
    def _device_errors(self) -> Generator[None]:
        """What torch raises when the device cannot go on → one sentence."""
        import torch

        try:
            yield
        except torch.OutOfMemoryError as error:
            raise EngineError(
                f"{self._device} has not enough memory for {len(self._origin)} streams; "
                "lower server.max_streams or engine.slots, or set engine.device: cpu"
            ) from error
        except RuntimeError as error:
            # The type since torch 2.8, the text before.
            fatal = isinstance(error, getattr(torch, "AcceleratorError", ()))
            if not fatal and not str(error).startswith("CUDA error"):
                raise
            what = str(error).partition("\n")[0]
            raise EngineError(f"{self._device} cannot compute any more ({what})") from error

    def _warm_up(self, largest: int) -> "_Heads":
        """Steps of silence: allocators and kernels are ready before the first stream.

        A size of batch that is new costs time and, from then on, memory for its kernels; a slot
        that is new costs its state. A machine with too little of it shows it now and not when the
        last caller comes, and later streams make the process no larger.

        Returns:
            What the heads say of no frame.
        """
        import torch

        def heard(streams: int) -> _Heads:
            silence = torch.zeros(streams, self._model.chunk_samples)
            result = self._model.step(silence, self._state, torch.arange(streams))
            return _Heads.of(result, self._model)

        with torch.inference_mode():
            for streams in (1, *range(1, min(largest, WARM) + 1)):
                heard(streams)
            heads = heard(largest)
            # Zeros that were never written are no memory yet.
            self._state.reset(torch.arange(len(self._origin), device=self._device))
        return heads.row(0).cut(0, 0)

    def _begin(self, batch: Sequence[Ready]) -> None:
        """Reset the slots whose streams begin."""
        import torch

        fresh = [ready.slot for ready in batch if ready.first]
        if fresh:
            self._state.reset(torch.tensor(fresh, device=self._device))
        for ready in batch:
            if ready.first:
                self._origin[ready.slot] = ready.start

    def _in_parts(self, batch: Sequence[Ready]) -> list[Frames]:
        """A step, or one for each half of the batch where the device has no memory for the whole.

        How many streams it had memory for is remembered: a step that breaks off may cost all of
        them a chunk, and the next batch as large would break off as well.
        """
        import torch

        if len(batch) == 1 or len(batch) <= self._fits:
            written = self._written()
            try:
                return self._advance(batch)
            except torch.OutOfMemoryError:
                fits = len(batch) // 2
            # Not above: the error holds the tensors of the step.
            torch.cuda.empty_cache()
            if fits < self._fits:
                self._fits = fits
                log.warning("not enough memory on the device", streams=len(batch), at_a_time=fits)
            if len(batch) == 1 or self._written() != written:
                return [self._lost(ready) for ready in batch]
        half = len(batch) // 2
        return self._in_parts(batch[:half]) + self._in_parts(batch[half:])

    def _written(self) -> int:
        """Another number after every write into the state; a step writes all along its way."""
        return sum(tensor._version for tensor in self._tensors)

    def _lost(self, ready: Ready) -> Frames:
        """Nothing of this slot can be trusted: its stream begins afresh after the chunk."""
        import torch

        self._state.reset(torch.tensor([ready.slot], device=self._device))
        at = self._origin[ready.slot] = ready.start + self._model.chunk_samples
        return self._no_frame.frames(at, self._model.voice_delay, nonfinite=True)

    def _advance(self, batch: Sequence[Ready]) -> list[Frames]:
        import torch

        slots = torch.tensor([ready.slot for ready in batch])
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
        if reset:
            self._origin[ready.slot] = ready.start
        exist = np.flatnonzero(mask)
        begin, end = (int(exist[0]), int(exist[-1]) + 1) if len(exist) else (0, 0)
        # Without any: the next frame there would be.
        first = start + begin if len(exist) else max(start, 0)
        heads = heads.cut(begin, end)
        if not heads.finite:
            return self._lost(ready)  # an overflow inside the model
        at = self._origin[ready.slot] + first * HOP
        return heads.frames(at, self._model.voice_delay, nonfinite=reset)


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
class _Opened:
    """One checkpoint and what lies beside its weights."""

    name: str
    model: "PreTrainedModel"
    normalize: bool
    vocabulary: Vocabulary | None
    classes: tuple[str, ...]
    tracks: Path | None
    language: Path | None
    cohort: Path | None
    warnings: tuple[str, ...]


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


def _open(path: str, device: "torch.device") -> _Opened:
    from model.checkpoint import find, load_pretrained, read_json
    from model.heads import UniSpeechSatForCTC, UniSpeechSatForSequenceClassification

    model = load_pretrained(path, device=device)
    model.source = path
    processor = find(path, "preprocessor_config.json")
    vocabulary = None
    if isinstance(model, UniSpeechSatForCTC):
        vocabulary = _vocabulary(path, model.config.vocab_size or 0, model.config.pad_token_id)
    classes: tuple[str, ...] = ()
    if isinstance(model, UniSpeechSatForSequenceClassification):
        classes = tuple(model.config.id2label[i] for i in range(model.config.num_labels))
    folder = Path(path).expanduser()
    tracks = (folder / "tracks.json", folder.parent / "tracks.json")
    return _Opened(
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
        warnings=(f"{path}: no preprocessor_config.json, assuming do_normalize",)
        if processor is None
        else (),
    )


def _facts(opened: Sequence[_Opened], model: "StreamingModel", device: "torch.device") -> Loaded:
    pooled = None
    if model.voice is not None:
        layer = model.voice.feature_extractor
        pooled = (_numpy(layer.weight.detach()), _numpy(layer.bias.detach()))
    beside = next((each.cohort for each in opened if each.model is model.voice), None)
    return Loaded(
        chunk_samples=model.chunk_samples,
        lead=model.lead,
        receptive=model.config.receptive_field,
        names=[each.name for each in opened],
        vocabulary=next((each.vocabulary for each in opened if each.vocabulary), None),
        voice_delay=model.voice_delay,
        voice_id=None if model.voice is None else _content_id(model.voice),
        pooled=pooled,
        labels={each.name: each.classes for each in opened if each.model is model.labels},
        tracks_file=next((each.tracks for each in opened if each.tracks), None),
        cohort=None if beside is None else _cohort(beside, model),
        language_file=next((each.language for each in opened if each.vocabulary), None),
        device=str(device),
        encoders=model.encoders,
        warnings=tuple(warning for each in opened for warning in each.warnings),
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
