"""Checkpoints: the only file access of this package.

A checkpoint is a folder with ``config.json`` and its weights (``model.safetensors``,
``pytorch_model.bin``, or an ``*.index.json`` naming shards), a hub repository of that layout, or
one weights file, the original authors' ``.pt`` among them. Whatever their spelling, tensors are
brought to the published names first and fitted to the model second, so one rule says what may be
missing or left over. Nothing in a file is ever executed: pickles are read with ``weights_only``.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import pickle
import re
import struct
import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, overload

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from model.config import UniSpeechSatConfig
from model.fairseq import config_of, is_fairseq, published_name, training_options

if TYPE_CHECKING:
    from model.encoder import PreTrainedModel

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="PreTrainedModel")
State = dict[str, Tensor]

WEIGHTS: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Weights files of a checkpoint folder, first choice first."""

BASE: Final = "unispeech_sat"
"""The attribute under which every head class keeps its encoder."""

_HEADS: Final = frozenset(
    {
        *("lm_head", "layer_weights", "projector", "classifier", "tdnn", "feature_extractor"),
        *("objective", "quantizer", "project_q", "project_hid", "speaker_proj"),
        *("label_embeddings_concat", "layer_norm_for_extract", "target_glu"),
    }
)
"""First name of every tensor that some head of the family has beside its encoder."""

_TRAINING_ONLY: Final = frozenset({"masked_spec_embed", "objective", "layer_norm_for_extract"})
"""Not needed to run a model; some published files lack them."""

_ENCODER_NAME: Final = re.compile(
    r"feature_extractor\.conv_layers\.|feature_projection\.|encoder\.|masked_spec_embed$"
)
_ADAPTER_NAME: Final = re.compile(r"encoder\.layers\.\d+\.adapter_layer\.")


class CheckpointError(ValueError):
    """A checkpoint cannot be found, read, or fitted to the model. The message names the file."""


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What `load_model` did not take from, or did not find in, a checkpoint.

    Only heads can appear here; an encoder that differs in any tensor is a `CheckpointError`.
    """

    new: tuple[str, ...] = ()
    """Tensors that keep their random initialisation: train them before use."""
    unused: tuple[str, ...] = ()
    """Tensors of other heads, left in the file."""


# ---------------------------------------------------------------------------------------------
# Finding files


def resolve(path_or_id: str | Path) -> Path:
    """A local path, or a hub id whose JSON files are downloaded → the folder or file.

    Weights of a hub repository are fetched by `find`, so reading a config downloads no weights.

    Raises:
        CheckpointError: no such path, no such repository, the hub is out of reach, or the
            ``hub`` extra is not installed.
    """
    local = Path(path_or_id).expanduser()
    if local.exists():
        return local
    with _hub(path_or_id) as hub:
        return Path(hub.snapshot_download(str(path_or_id), allow_patterns=["*.json"]))


def find(path_or_id: str | Path, *names: str) -> Path | None:
    """The first of ``names`` that the folder or hub repository has, else ``None``.

    Raises:
        CheckpointError: as `resolve`.
    """
    local = Path(path_or_id).expanduser()
    if local.exists():
        folder = local if local.is_dir() else local.parent
        return next((folder / name for name in names if (folder / name).is_file()), None)
    with _hub(path_or_id) as hub:
        for name in names:
            with contextlib.suppress(hub.errors.RemoteEntryNotFoundError):
                return Path(hub.hf_hub_download(str(path_or_id), name))
    return None


@contextlib.contextmanager
def _hub(path_or_id: str | Path) -> Generator[Any]:
    """The hub client, its failures turned into one clear `CheckpointError` each."""
    name = str(path_or_id)
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
        raise CheckpointError(f"{name}: no such file or folder")
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise CheckpointError(
            f"{name}: no such file or folder; to load it as a hub id, "
            "install huggingface_hub (pip install 'livesat[hub]')"
        ) from error
    errors: Any = huggingface_hub.errors
    try:
        yield huggingface_hub
    except errors.LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"{name}: no such file or folder, and not in the local hub cache; "
            "the hub cannot be reached (offline?)"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(f"{name}: no such file or folder, and no such hub id") from error
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, OSError) as error:
        raise CheckpointError(
            f"{name}: no such file or folder, and the hub cannot be reached ({_brief(error)})"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: unreadable, or not a JSON object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: expected a JSON object ({_brief(error)})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, got {type(values).__name__}")
    return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object, keys sorted, as the published files are; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def _brief(error: BaseException) -> str:
    """The first line of an error, for the end of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


# ---------------------------------------------------------------------------------------------
# Reading tensors


def read_state(path_or_id: str | Path) -> State:
    """All tensors of a checkpoint, under the published names, on the CPU, in the file's dtype.

    ``path_or_id`` is a folder, a hub id, a weights file or an index file.

    Raises:
        CheckpointError: no weights there, a file that is not a checkpoint, is cut short, or holds
            anything but tensors and plain values; a shard or a tensor that the index names is
            missing.
    """
    return published_names(_read_file(_weights_file(path_or_id)))


def _weights_file(path_or_id: str | Path) -> Path:
    if Path(path_or_id).expanduser().is_file():
        return Path(path_or_id).expanduser()
    found = find(path_or_id, *WEIGHTS)
    if found is None:
        raise CheckpointError(f"{path_or_id}: expected one of {', '.join(WEIGHTS)}, found none")
    if found.name.endswith(".index.json") and not Path(path_or_id).expanduser().exists():
        for shard in sorted(set(_weight_map(found).values())):
            if find(path_or_id, shard) is None:
                raise CheckpointError(f"{path_or_id}: {found.name} names {shard}, not found")
    return found


def _read_file(path: Path) -> State:
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return _tensors(read_pickle(path), path)


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: expected a weight_map of tensor names to files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).is_absolute():
            raise CheckpointError(f"{index}: {name}: expected a relative path, got {shard!r}")
    return weight_map


def _read_shards(index: Path) -> State:
    """Tensors that an index names; a shard may lie beside it or elsewhere ("../x.safetensors")."""
    by_shard: dict[str, list[str]] = {}
    for name, shard in _weight_map(index).items():
        by_shard.setdefault(shard, []).append(name)
    state: State = {}
    for shard, names in by_shard.items():
        path = index.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index}: names the shard {shard}, which does not exist")
        if path.suffix == ".safetensors":
            state |= _read_safetensors(path, names)
            continue
        found = _tensors(read_pickle(path), path)
        _require(names, found, path)
        state |= {name: found[name] for name in names}
    return state


def _read_safetensors(path: Path, names: Sequence[str] | None = None) -> State:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            present = list(file.keys())
            _require(names or (), present, path)
            return {name: file.get_tensor(name) for name in names or present}
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{path}: expected a safetensors file; it is another kind of file or is cut short "
            f"({_brief(error)})"
        ) from error


def _require(names: Iterable[str], present: Iterable[str], path: Path) -> None:
    if absent := sorted(set(names) - set(present)):
        raise CheckpointError(f"{path}: the index expects {', '.join(absent)}, not in the file")


# What `torch.load` raises for files it cannot or will not read; a pickle cut or forged anywhere
# can surface as almost any of them.
_UNREADABLE: Final = (
    pickle.UnpicklingError,
    RuntimeError,
    OSError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    OverflowError,
    MemoryError,
    struct.error,
)


def read_pickle(path: Path) -> Any:
    """A ``.bin`` or ``.pt`` file, tensors on the CPU; its pickle may build only plain values.

    ``argparse.Namespace`` is let through: the authors' files keep their training options in one.

    Raises:
        CheckpointError: not a torch file, cut short, or it asks for any other Python object,
            which is named and never built.
    """
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([argparse.Namespace]),
        ):
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # torch's own message advises to load the file with execution allowed: never pass it on
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused is not None:
            raise CheckpointError(
                f"{path}: refused: its pickle asks for {refused[1]}, and a checkpoint may hold "
                "only tensors and plain values; nothing was executed"
            ) from error
        detail = re.search(r"WeightsUnpickler error: (.*)", str(error))
        reason = (
            type(error).__name__ if isinstance(error, pickle.UnpicklingError) else _brief(error)
        )
        raise CheckpointError(
            f"{path}: expected a PyTorch checkpoint; it is another kind of file or is cut short "
            f"({detail[1] if detail else reason})"
        ) from error


def _tensors(loaded: Any, path: Path) -> State:
    """The state dict within what a pickle held: itself, or fairseq's ``["model"]``."""
    for key in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise CheckpointError(f"{path}: expected tensors by name, got {type(loaded).__name__}")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(f"{path}: {name}: expected a tensor, got {type(value).__name__}")
    return dict(loaded)


# ---------------------------------------------------------------------------------------------
# Names


def published_names(state: Mapping[str, Tensor]) -> State:
    """Any spelling of a family checkpoint → the names that today's transformers writes.

    Understood are the authors' fairseq names (pre-trained and fine-tuned), the ``wav2vec2.``
    prefix for the encoder, and ``weight_g``/``weight_v`` for the weight-normed convolution. A
    bare encoder keeps its bare names.
    """
    fairseq = is_fairseq(state)
    return {_published_name(name, fairseq=fairseq): value for name, value in state.items()}


def _published_name(name: str, *, fairseq: bool) -> str:
    if fairseq:
        name = published_name(name)
        name = f"{BASE}.{name}" if _ENCODER_NAME.match(name) else name
    name = re.sub(r"^wav2vec2\.", f"{BASE}.", name)
    name = re.sub(r"\.weight_g$", ".parametrizations.weight.original0", name)
    return re.sub(r"\.weight_v$", ".parametrizations.weight.original1", name)


def _split(names: Iterable[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Names of one state dict → (encoder, head): name within the bare encoder or head → name."""
    names = list(names)
    prefixed = any(name.startswith(f"{BASE}.") for name in names)
    encoder: dict[str, str] = {}
    head: dict[str, str] = {}
    for name in names:
        if prefixed and name.startswith(f"{BASE}."):
            encoder[name.removeprefix(f"{BASE}.")] = name
        elif not prefixed and _ENCODER_NAME.match(name):
            encoder[name] = name
        else:
            head[name] = name
    return encoder, head


def _trains_only(name: str) -> bool:
    return name.removeprefix(f"{BASE}.").split(".")[0] in _TRAINING_ONLY


def content_hash(state: Mapping[str, Tensor]) -> str:
    """A digest of the encoder's weights: equal for checkpoints that can share one encoder pass.

    Heads, prefixes, the order and the spelling of names do not count, nor does
    ``masked_spec_embed``, which only training reads. Dtypes and values do.
    """
    state = published_names(state)
    encoder, _ = _split(state)
    digest = hashlib.sha256()
    for name in sorted(encoder):
        if _trains_only(name):
            continue
        value = state[encoder[name]].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# ---------------------------------------------------------------------------------------------
# Fitting


def fit(
    state: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    source: str | Path,
    *,
    complete: bool = False,
    ignore_mismatched_sizes: bool = False,
) -> tuple[State, LoadReport]:
    """Match a checkpoint's tensors to a model's, across head and prefix differences.

    The encoders must agree in every name and shape. A head that the checkpoint has no tensor of
    is new (reported; with ``complete`` an error, except where only training needs it); tensors of
    heads that the model does not have are left over (reported). Anything else is an error.

    Args:
        state: Tensors under their published names.
        expected: The model's state dict; only names and shapes are read.
        source: Named in errors.
        complete: The checkpoint says that it is of the model's class.
        ignore_mismatched_sizes: A head of another shape counts as new, as published.

    Returns:
        The tensors under the model's names, and the report.

    Raises:
        CheckpointError: names every missing, extra and mis-shaped tensor, with both shapes.
    """
    have_encoder, have_head = _split(state)
    want_encoder, want_head = _split(expected)
    taken: State = {}
    new: list[str] = []
    problems: list[str] = []

    def take(have: dict[str, str], want: dict[str, str], *, head: bool) -> None:
        present = {name.split(".")[0] for name in have}
        for name, target in want.items():
            if name not in have:
                top = name.split(".")[0]
                fresh = head and top not in present and not complete
                if fresh or _trains_only(name) or _ADAPTER_NAME.match(name):
                    new.append(target)
                else:
                    problems.append(f"missing {target} {list(expected[target].shape)}")
                continue
            value, shape = state[have[name]], expected[target].shape
            if value.shape == shape:
                taken[target] = value
            elif head and ignore_mismatched_sizes:
                new.append(target)
            else:
                problems.append(f"{target}: expected shape {list(shape)}, got {list(value.shape)}")

    take(have_encoder, want_encoder, head=False)
    take(have_head, want_head, head=True)
    own = {name.split(".")[0] for name in want_head}
    unused: list[str] = []
    for name, original in have_encoder.items():
        if name not in want_encoder:
            problems.append(f"unexpected {original} {list(state[original].shape)}")
    for name in have_head:
        if name not in want_head:
            top = name.split(".")[0]
            if top in _HEADS - own:
                unused.append(name)
            else:
                problems.append(f"unexpected {name} {list(state[name].shape)}")
    if problems:
        shown = "; ".join(sorted(problems)[:20])
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{source}: does not fit the model: {shown}{more}")
    return taken, LoadReport(new=tuple(sorted(new)), unused=tuple(sorted(unused)))


# ---------------------------------------------------------------------------------------------
# Loading models


def read_config(path_or_id: str | Path, **overrides: Any) -> UniSpeechSatConfig:
    """The config of a checkpoint: its ``config.json``, else the options in the authors' ``.pt``.

    Raises:
        CheckpointError: neither is there, it is of another architecture, or a value is wrong.
    """
    found = find(path_or_id, "config.json")
    if found is not None:
        values = read_json(found)
        kind = values.get("model_type")
        if kind != UniSpeechSatConfig.model_type:
            raise CheckpointError(
                f"{found}: model_type: expected {UniSpeechSatConfig.model_type!r}, got {kind!r}"
            )
        try:
            return UniSpeechSatConfig.from_dict(values, **overrides)
        except ValueError as error:
            raise CheckpointError(f"{found}: {error}") from error
    path = Path(path_or_id).expanduser()
    if path.is_file() and path.suffix != ".safetensors":
        options = training_options(read_pickle(path))
        if options is not None:
            try:
                return UniSpeechSatConfig(**{**config_of(options), **overrides})
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"{path}: its training options: {error}") from error
    raise CheckpointError(f"{path_or_id}: expected a config.json, found none")


def model_class_of(config: UniSpeechSatConfig) -> "type[PreTrainedModel]":
    """The class that ``architectures`` in a config names.

    Raises:
        CheckpointError: it names none, or one that is not of the family.
    """
    import model.encoder
    import model.heads
    import model.pretraining

    classes: dict[str, type[PreTrainedModel]] = {
        cls.__name__: cls
        for cls in (
            model.encoder.UniSpeechSatModel,
            model.heads.UniSpeechSatForCTC,
            model.heads.UniSpeechSatForSequenceClassification,
            model.heads.UniSpeechSatForAudioFrameClassification,
            model.heads.UniSpeechSatForXVector,
            model.pretraining.UniSpeechSatForPreTraining,
        )
    }
    for name in config.architectures or ():
        if name in classes:
            return classes[name]
    raise CheckpointError(
        f"architectures: expected one of {', '.join(sorted(classes))}, got {config.architectures}"
    )


def load_pretrained(path_or_id: str | Path, **kwargs: Any) -> "PreTrainedModel":
    """`load_model` with the class that the checkpoint's ``architectures`` names."""
    try:
        cls = model_class_of(read_config(path_or_id))
    except CheckpointError as error:
        named = str(error).startswith(str(path_or_id))
        raise error if named else CheckpointError(f"{path_or_id}: {error}") from error
    return load_model(cls, path_or_id, **kwargs)


@overload
def load_model(
    cls: type[Model],
    path_or_id: str | Path,
    *,
    attn_implementation: str = ...,
    dtype: torch.dtype | str | None = ...,
    device: torch.device | str | None = ...,
    target_lang: str | None = ...,
    ignore_mismatched_sizes: bool = ...,
    output_loading_info: Literal[False] = ...,
    **config_overrides: Any,
) -> Model: ...
@overload
def load_model(
    cls: type[Model],
    path_or_id: str | Path,
    *,
    attn_implementation: str = ...,
    dtype: torch.dtype | str | None = ...,
    device: torch.device | str | None = ...,
    target_lang: str | None = ...,
    ignore_mismatched_sizes: bool = ...,
    output_loading_info: Literal[True],
    **config_overrides: Any,
) -> tuple[Model, LoadReport]: ...
def load_model(
    cls: type[Model],
    path_or_id: str | Path,
    *,
    attn_implementation: str = "sdpa",
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    target_lang: str | None = None,
    ignore_mismatched_sizes: bool = False,
    output_loading_info: bool = False,
    **config_overrides: Any,
) -> Model | tuple[Model, LoadReport]:
    """Build ``cls`` from a checkpoint, in evaluation mode.

    A checkpoint without the head of ``cls`` gives a model with a new head and a ``UserWarning``
    that names it, as published: this is how fine-tuning starts. If its ``architectures`` says
    that it is a ``cls``, a missing head is an error instead: the file is damaged.

    Args:
        cls: A class of the family.
        path_or_id: Folder, weights file or hub id.
        attn_implementation: ``eager``, ``sdpa`` or ``flash_attention_2``.
        dtype: Of all parameters; ``"auto"`` takes the file's, ``None`` is float32 (also for files
            in half precision).
        device: Where the model goes; ``None`` is the CPU.
        target_lang: Language whose adapter is loaded on top (``adapter.<lang>.safetensors``).
        ignore_mismatched_sizes: A head of another shape is made anew instead of refused.
        output_loading_info: Also return the `LoadReport`.
        **config_overrides: Config keys that win over ``config.json``.

    Raises:
        CheckpointError: it cannot be found, read or fitted; see `resolve`, `read_state`, `fit`.
    """
    config = read_config(path_or_id, attn_implementation=attn_implementation, **config_overrides)
    complete = cls.__name__ in (config.architectures or ())
    config.architectures = [cls.__name__]
    with torch.device("meta"):
        shell = cls(config)
    taken, report = fit(
        read_state(path_or_id),
        shell.state_dict(),
        path_or_id,
        complete=complete,
        ignore_mismatched_sizes=ignore_mismatched_sizes,
    )
    if heads := [name for name in report.new if not _trains_only(name)]:
        warnings.warn(
            f"{path_or_id}: no tensors for {', '.join(heads)}: newly initialised, train before use",
            UserWarning,
            stacklevel=2,
        )
    if report.unused:
        logger.info("%s: heads left in the file: %s", path_or_id, ", ".join(report.unused))

    target = _dtype(dtype, taken)
    model = cls(config) if report.new or _unnamed_tensors(shell) else shell
    taken = {name: _owned(value, target) for name, value in taken.items()}
    model.load_state_dict(taken, strict=False, assign=True)
    model.to(device=device, dtype=target)
    model.eval()
    model.source = path_or_id
    if target_lang is not None:
        load_adapter(model, target_lang, path_or_id)
    return (model, report) if output_loading_info else model


def _unnamed_tensors(model: nn.Module) -> bool:
    """Whether a model holds tensors that no state dict fills, so that it cannot start empty."""
    named = set(model.state_dict())
    return any(name not in named for name, _ in model.named_buffers())


def _dtype(dtype: torch.dtype | str | None, state: Mapping[str, Tensor]) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype == "auto":
        return next((v.dtype for v in state.values() if v.is_floating_point()), torch.float32)
    named = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype) or not named.is_floating_point:
        raise ValueError(f"dtype: expected a floating-point torch dtype or 'auto', got {dtype!r}")
    return named


def _owned(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in memory of its own: a tensor of a safetensors file maps the file, unaligned."""
    return value.to(dtype if value.is_floating_point() else value.dtype, copy=True)


# ---------------------------------------------------------------------------------------------
# Saving models


def save_model(
    model: "PreTrainedModel", folder: str | Path, *, max_shard_size: int | str | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors`` so that transformers loads them, too.

    Args:
        model: Any class of the family; it becomes the ``architectures`` of the config.
        folder: Made if absent; weights of an earlier save there are replaced.
        max_shard_size: Bytes, or "500MB"; a larger model is split over several files with an
            index. ``None`` never splits.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: v.detach().cpu().contiguous() for name, v in model.state_dict().items()}
    shards = _shards(state, _bytes(max_shard_size))
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    written: set[str] = set()
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else WEIGHTS[0]
        _write_safetensors(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
        written.add(name)
    if len(shards) > 1:
        size = sum(v.nbytes for v in state.values())
        index = {"metadata": {"total_size": size}, "weight_map": weight_map}
        write_json(folder / WEIGHTS[1], index)
        written.add(WEIGHTS[1])
    earlier = {*WEIGHTS, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    for stale in earlier - written:
        (folder / stale).unlink(missing_ok=True)


def _write_safetensors(path: Path, state: State) -> None:
    """Write a file whole or not at all: readers may hold or map the one that it replaces."""
    part = path.with_name(f".{path.name}.part")
    safetensors.torch.save_file(state, part, metadata={"format": "pt"})
    part.replace(path)


def _shards(state: State, limit: int | None) -> list[State]:
    """Tensors in order, a new shard whenever the next would exceed ``limit`` bytes."""
    shards: list[State] = [{}]
    size = 0
    for name, value in state.items():
        if limit is not None and shards[-1] and size + value.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    return shards


def _bytes(size: int | str | None) -> int | None:
    if size is None or isinstance(size, int):
        return size
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)(i?)B", size.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"max_shard_size: expected bytes or a size like '500MB', got {size!r}")
    power = " KMG".index(match[2].upper() or " ")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


# ---------------------------------------------------------------------------------------------
# Language adapters


def adapter_names(model: "PreTrainedModel") -> list[str]:
    """Parameters that belong to one language: the attention adapters and the CTC output layer.

    Raises:
        ValueError: the model was built without ``adapter_attn_dim``.
    """
    if model.config.adapter_attn_dim is None:
        raise ValueError("config.adapter_attn_dim: expected a width, got null: no adapters")
    return [
        name
        for name in model.state_dict()
        if _ADAPTER_NAME.match(name.removeprefix(f"{BASE}.")) or name.startswith("lm_head.")
    ]


def load_adapter(
    model: "PreTrainedModel", target_lang: str, path_or_id: str | Path | None = None
) -> None:
    """Load ``adapter.<lang>.safetensors`` or ``.bin`` into a model with attention adapters.

    ``path_or_id`` is where the model itself was loaded from unless given.

    A language with another vocabulary replaces ``lm_head`` and ``config.vocab_size``, as
    published.

    Raises:
        CheckpointError: no such adapter, or it does not fit.
        ValueError: the model has no adapters.
    """
    names = adapter_names(model)
    path_or_id = model.source if path_or_id is None else path_or_id
    if path_or_id is None:
        raise CheckpointError(f"adapter {target_lang!r}: expected a path: the model has no source")
    file = f"adapter.{target_lang}"
    path = find(path_or_id, f"{file}.safetensors", f"{file}.bin")
    if path is None:
        raise CheckpointError(f"{path_or_id}: expected {file}.safetensors or .bin, found none")
    state = published_names(_read_file(path))
    problems = [f"missing {name}" for name in names if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in names]
    head = getattr(model, "lm_head", None)
    if isinstance(head, nn.Linear) and "lm_head.weight" in state:
        rows = state["lm_head.weight"].shape[0]
        if rows != head.out_features:
            head = nn.Linear(head.in_features, rows, device=head.weight.device).to(head.weight)
    expected = model.state_dict()
    if isinstance(head, nn.Linear):
        expected |= {f"lm_head.{name}": value for name, value in head.state_dict().items()}
    problems += [
        f"{name}: expected shape {list(expected[name].shape)}, got {list(state[name].shape)}"
        for name in names
        if name in state and state[name].shape != expected[name].shape
    ]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model: {'; '.join(sorted(problems))}")
    if isinstance(head, nn.Linear):
        model.lm_head = head
        model.config.vocab_size = head.out_features
    model.load_state_dict(state, strict=False)


def save_adapter(model: "PreTrainedModel", target_lang: str, folder: str | Path) -> None:
    """Write ``adapter.<lang>.safetensors`` beside the checkpoint."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    names = set(adapter_names(model))
    state = model.state_dict()
    _write_safetensors(
        folder / f"adapter.{target_lang}.safetensors",
        {name: v.detach().cpu().contiguous() for name, v in state.items() if name in names},
    )
