"""`UniSpeechSatConfig`: the published ``config.json``, read and written unchanged."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final, Literal, Self, overload

from torch import Tensor

AttentionImplementation = Literal["eager", "sdpa", "flash_attention_2"]

ATTENTION_IMPLEMENTATIONS: Final = ("eager", "sdpa", "flash_attention_2")

# Keys that describe the file or the caller's wishes rather than the network.
_NOT_WRITTEN: Final = frozenset({"attn_implementation", "extra"})


class UniSpeechSatConfig:
    """Shape of a UniSpeech-SAT network, with the published keys and their published defaults.

    Keys this class does not know are kept in ``extra`` and written back, so that a file read and
    saved again loses nothing.

    Source: ``UniSpeechSatConfig`` of transformers; UniSpeech-SAT (arXiv 2110.05752), section 4.

    Raises:
        ValueError: a value of the wrong type, three convolution lists of different lengths, heads
            that do not divide the width, or an unknown norm, activation or attention.
    """

    model_type: ClassVar[str] = "unispeech-sat"

    vocab_size: int | None = 32
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout: float = 0.1
    activation_dropout: float = 0.1
    attention_dropout: float = 0.1
    feat_proj_dropout: float = 0.0
    feat_quantizer_dropout: float = 0.0
    final_dropout: float = 0.1
    layerdrop: float = 0.1
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-5
    feat_extract_norm: str = "group"
    feat_extract_activation: str = "gelu"
    conv_dim: tuple[int, ...] = (512, 512, 512, 512, 512, 512, 512)
    conv_stride: tuple[int, ...] = (5, 2, 2, 2, 2, 2, 2)
    conv_kernel: tuple[int, ...] = (10, 3, 3, 3, 3, 2, 2)
    conv_bias: bool = False
    num_conv_pos_embeddings: int = 128
    num_conv_pos_embedding_groups: int = 16
    do_stable_layer_norm: bool = False
    apply_spec_augment: bool = True
    mask_time_prob: float = 0.05
    mask_time_length: int = 10
    mask_time_min_masks: int = 2
    mask_feature_prob: float = 0.0
    mask_feature_length: int = 10
    mask_feature_min_masks: int = 0
    num_codevectors_per_group: int = 320
    num_codevector_groups: int = 2
    contrastive_logits_temperature: float = 0.1
    num_negatives: int = 100
    codevector_dim: int = 256
    proj_codevector_dim: int = 256
    diversity_loss_weight: float = 0.1
    ctc_loss_reduction: str = "mean"
    ctc_zero_infinity: bool = False
    use_weighted_layer_sum: bool = False
    classifier_proj_size: int = 256
    tdnn_dim: tuple[int, ...] = (512, 512, 512, 512, 1500)
    tdnn_kernel: tuple[int, ...] = (5, 3, 3, 1, 1)
    tdnn_dilation: tuple[int, ...] = (1, 2, 3, 1, 1)
    xvector_output_dim: int = 512
    pad_token_id: int = 0
    bos_token_id: int = 1
    eos_token_id: int = 2
    num_clusters: int = 504
    adapter_attn_dim: int | None = None
    add_adapter: bool = False
    output_hidden_states: bool = False
    output_attentions: bool = False
    return_dict: bool = True
    architectures: list[str] | None = None
    id2label: dict[int, str]
    attn_implementation: AttentionImplementation

    def __init__(self, **kwargs: Any) -> None:
        kwargs = dict(kwargs)
        kwargs.pop("model_type", None)
        implementation = kwargs.pop("attn_implementation", None) or "sdpa"
        if implementation not in ATTENTION_IMPLEMENTATIONS:
            expected = ", ".join(ATTENTION_IMPLEMENTATIONS)
            raise ValueError(
                f"attn_implementation: expected one of {expected}, got {implementation!r}"
            )
        self.attn_implementation = implementation
        labels: Mapping[Any, str] | None = kwargs.pop("id2label", None)
        kwargs.pop("label2id", None)
        num_labels = kwargs.pop("num_labels", None)
        if labels is None:
            count = 2 if num_labels is None else int(num_labels)
            labels = {i: f"LABEL_{i}" for i in range(count)}
        elif num_labels is not None and len(labels) != int(num_labels):
            labels = {i: f"LABEL_{i}" for i in range(int(num_labels))}
        self.id2label = {int(i): str(name) for i, name in labels.items()}
        kwargs.pop("num_feat_extract_layers", None)
        self.extra: dict[str, Any] = {}
        for key, value in kwargs.items():
            if key in _KEYS:
                setattr(self, key, _checked(key, value))
            else:
                self.extra[key] = value
        self._validate()

    def _validate(self) -> None:
        lengths = {len(self.conv_dim), len(self.conv_stride), len(self.conv_kernel)}
        if len(lengths) != 1 or not self.conv_dim:
            raise ValueError(
                "conv_dim, conv_stride and conv_kernel: expected three lists of one length, got "
                f"{len(self.conv_dim)}, {len(self.conv_stride)} and {len(self.conv_kernel)}"
            )
        if not len(self.tdnn_dim) == len(self.tdnn_kernel) == len(self.tdnn_dilation):
            raise ValueError(
                "tdnn_dim, tdnn_kernel and tdnn_dilation: expected three lists of one length, got "
                f"{len(self.tdnn_dim)}, {len(self.tdnn_kernel)} and {len(self.tdnn_dilation)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size: expected a multiple of num_attention_heads "
                f"({self.num_attention_heads}), got {self.hidden_size}"
            )
        if self.feat_extract_norm not in ("group", "layer"):
            raise ValueError(
                f"feat_extract_norm: expected group or layer, got {self.feat_extract_norm!r}"
            )

    @property
    def num_feat_extract_layers(self) -> int:
        """Layers of the convolutional front end."""
        return len(self.conv_dim)

    @property
    def num_labels(self) -> int:
        """Outputs of a classification head."""
        return len(self.id2label)

    @property
    def label2id(self) -> dict[str, int]:
        """Label name → output index."""
        return {name: i for i, name in self.id2label.items()}

    @property
    def inputs_to_logits_ratio(self) -> int:
        """Samples from one frame to the next (320 in every published checkpoint)."""
        return math.prod(self.conv_stride)

    @property
    def receptive_field(self) -> int:
        """Samples that one frame covers (400 in every published checkpoint)."""
        field, hop = 1, 1
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            field += (kernel - 1) * hop
            hop *= stride
        return field

    @property
    def frame_delay(self) -> int:
        """Frames that whole hops of audio leave incomplete: ⌈receptive field / hop⌉ − 1.

        After ``n · hop`` samples ``n − frame_delay`` frames are complete: 1 for every published
        checkpoint, whose frames cover 400 samples at a hop of 320.
        """
        return -(-self.receptive_field // self.inputs_to_logits_ratio) - 1

    @overload
    def frames(self, samples: int) -> int: ...
    @overload
    def frames(self, samples: Tensor) -> Tensor: ...
    def frames(self, samples: int | Tensor) -> int | Tensor:
        """Samples → complete frames (0 where the wave is shorter than one frame)."""
        n = samples
        for kernel, stride in zip(self.conv_kernel, self.conv_stride, strict=True):
            n = (n - kernel) // stride + 1
        return max(n, 0) if isinstance(n, int) else n.clamp(min=0)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], **overrides: Any) -> Self:
        """A parsed ``config.json`` → config; ``overrides`` win.

        Raises:
            ValueError: ``model_type`` names another architecture.
        """
        found = values.get("model_type")
        if found is not None and found != cls.model_type:
            raise ValueError(f"model_type: expected {cls.model_type!r}, got {found!r}")
        merged = dict(values)
        if "num_labels" in overrides:
            merged.pop("id2label", None)
        return cls(**{**merged, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every key, published and extra, ready for JSON."""
        values: dict[str, Any] = dict(self.extra)
        for key in _KEYS:
            value = getattr(self, key)
            values[key] = list(value) if isinstance(value, tuple) else value
        values["model_type"] = self.model_type
        values["num_feat_extract_layers"] = self.num_feat_extract_layers
        values["id2label"] = {str(i): name for i, name in self.id2label.items()}
        values["label2id"] = self.label2id
        return values

    @classmethod
    def from_json_file(cls, path: str | Path, **overrides: Any) -> Self:
        """Read ``config.json``.

        Raises:
            ValueError: the file is not a JSON object, or holds a bad value; the path is named.
            FileNotFoundError: there is no such file.
        """
        path = Path(path)
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: expected a JSON object ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a JSON object, got {type(values).__name__}")
        try:
            return cls.from_dict(values, **overrides)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **overrides: Any) -> "UniSpeechSatConfig":
        """Read the config of a local folder, a hub repository, or the authors' ``.pt``."""
        from model.checkpoint import read_config

        return read_config(path_or_id, **overrides)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``config.json`` into ``folder``, which is made if it is absent."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.to_dict(), indent=2, sort_keys=True, ensure_ascii=False)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")

    def __repr__(self) -> str:
        return f"UniSpeechSatConfig({json.dumps(self.to_dict(), sort_keys=True)})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UniSpeechSatConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable: a caller may set attn_implementation


_KEYS: Final[dict[str, str]] = {
    key: str(kind)
    for key, kind in UniSpeechSatConfig.__annotations__.items()
    if key not in {"model_type", "id2label", *_NOT_WRITTEN}
}


def _checked(key: str, value: Any) -> Any:
    """A value of ``config.json`` → the attribute, or a ValueError that names the key."""
    default = getattr(UniSpeechSatConfig, key)
    if isinstance(default, tuple):
        if isinstance(value, Sequence) and not isinstance(value, str):
            items: list[Any] = list(value)
            if all(isinstance(i, int) and not isinstance(i, bool) and i > 0 for i in items):
                return tuple(items)
        raise ValueError(f"{key}: expected a list of positive integers, got {value!r}")
    if default is None or value is None:
        if value is None and key not in _MAY_BE_NULL:
            raise ValueError(f"{key}: expected {type(default).__name__}, got null")
        return value
    if isinstance(default, bool):
        good = isinstance(value, bool)
    elif isinstance(default, int):
        good = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(default, float):
        good = isinstance(value, int | float) and not isinstance(value, bool)
    else:
        good = isinstance(value, type(default))
    if not good:
        raise ValueError(f"{key}: expected {type(default).__name__}, got {value!r}")
    return value


_MAY_BE_NULL: Final = frozenset(
    {
        "vocab_size",
        "adapter_attn_dim",
        "architectures",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    }
)
