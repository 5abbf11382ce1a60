"""Waveform → frames: the convolutional front end, whole and in steps."""

from collections.abc import Callable
from typing import Final

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from model.config import UniSpeechSatConfig
from model.linear import Linear
from model.state import EncoderState, Rows, RunningMoments, Window

ACTIVATIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "selu": F.selu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}

WAVE_VARIANCE_FLOOR: Final = 1e-7
"""Added to the variance before the root, as `Wav2Vec2FeatureExtractor` does."""


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The published name of an activation → the function.

    Raises:
        ValueError: unknown name.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


class ConvLayer(nn.Module):
    """One layer of the front end: convolution, the norm its checkpoint has, activation.

    Source: ``UniSpeechSat{NoLayerNorm,LayerNorm,GroupNorm}ConvLayer``.
    """

    def __init__(self, config: UniSpeechSatConfig, index: int) -> None:
        super().__init__()
        inputs = config.conv_dim[index - 1] if index else 1
        outputs = config.conv_dim[index]
        self.conv = nn.Conv1d(
            inputs,
            outputs,
            config.conv_kernel[index],
            stride=config.conv_stride[index],
            bias=config.conv_bias,
        )
        self.layer_norm: nn.LayerNorm | nn.GroupNorm | None = None
        if config.feat_extract_norm == "layer":
            self.layer_norm = nn.LayerNorm(outputs)
        elif index == 0:
            self.layer_norm = nn.GroupNorm(outputs, outputs)
        self.activation = activation(config.feat_extract_activation)

    def forward(self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """x: [B, C_in, N] → [B, C_out, M]; see `normalized` for ``moments``."""
        return self.normalized(self.conv(x), moments)

    def normalized(self, x: Tensor, moments: tuple[Tensor, Tensor] | None = None) -> Tensor:
        """Norm and activation of the convolution's output. x: [B, C, M] → [B, C, M]

        ``moments`` replaces the GroupNorm's own mean and variance over time ([B, C] each): a
        stream knows only the running ones.
        """
        norm = self.layer_norm
        if isinstance(norm, nn.LayerNorm):
            x = norm(x.transpose(1, 2)).transpose(1, 2)
        elif norm is not None and moments is None:
            x = norm(x)
        elif norm is not None and moments is not None:
            mean, variance = moments
            scale = norm.weight * torch.rsqrt(variance + norm.eps).to(x.dtype)
            x = x * scale.unsqueeze(2) + (norm.bias - mean.to(x.dtype) * scale).unsqueeze(2)
        return self.activation(x)


def carries(config: UniSpeechSatConfig) -> list[int]:
    """Input samples each layer keeps between steps, so that windows fall where `forward`'s do.

    A layer that has ``offset`` outputs of no stream before its first true one keeps c samples,
    kernel − stride ≤ c < kernel, with offset + c a multiple of the stride. The published
    front end keeps (5, 1, 1, 1, 1, 1, 1); the last offset is `frame_delay`.
    """
    kept: list[int] = []
    offset = 0
    for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
        least = kernel - stride
        if least < 0:
            raise ValueError(
                f"conv_kernel, conv_stride: expected kernel ≥ stride, got {kernel} < {stride}"
            )
        carry = least + (-(offset + least)) % stride
        kept.append(carry)
        offset = (offset + carry) // stride
    return kept


class FeatureEncoder(nn.Module):
    """Raw audio → features at the encoder's frame rate.

    Source: ``UniSpeechSatFeatureEncoder``; wav2vec 2.0 (arXiv 2006.11477), section 2.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.config = config
        self.conv_layers = nn.ModuleList(
            [ConvLayer(config, i) for i in range(config.num_feat_extract_layers)]
        )
        self.gradient_checkpointing = False

    def forward(self, wave: Tensor, streaming: Window | None = None) -> Tensor:
        """wave: [B, N] → [B, C, T]; ``streaming`` gives GroupNorm the statistics of a stream."""
        x = wave.unsqueeze(1)
        for index, layer in enumerate(self.conv_layers):
            assert isinstance(layer, ConvLayer)
            if index == 0 and streaming is not None and isinstance(layer.layer_norm, nn.GroupNorm):
                x = self._group_normalized(layer, layer.conv(x), streaming)
            elif self.gradient_checkpointing and self.training:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            else:
                x = layer(x)
        return x

    def _group_normalized(self, layer: ConvLayer, x: Tensor, window: Window) -> Tensor:
        """First layer under running statistics, chunk by chunk. x: [B, C, M] → [B, C, M]"""
        B, C, M = x.shape
        per_chunk = window.chunk * self.config.inputs_to_logits_ratio // self.config.conv_stride[0]
        offset = carries(self.config)[0] // self.config.conv_stride[0]
        moments = RunningMoments.zeros(B, C, x.device)
        limit = self._group_limit(window)
        out: list[Tensor] = []
        begin = 0
        while begin < M:
            end = min(len(out) * per_chunk + per_chunk - offset, M)
            part = x[:, :, begin:end]
            exists = torch.ones(B, end - begin, dtype=torch.bool, device=x.device)
            out.append(
                layer.normalized(part, moments.step(part.detach(), exists, limit, slice(None)))
            )
            begin = end
        return torch.cat(out, dim=2)

    def _group_limit(self, window: Window) -> int:
        return window.warm_up * self.config.inputs_to_logits_ratio // self.config.conv_stride[0]

    def step(self, wave: Tensor, state: EncoderState, total: Tensor, rows: Rows) -> Tensor:
        """A chunk of a stream → its frames. wave: [B, C·hop] → [B, channels, C]

        The frames are those of `forward`, ``frame_delay`` frames later: the first ones of a
        stream precede it and mean nothing.

        Args:
            wave: new samples.
            state: updated in place.
            total: [B] samples of the stream, this chunk included.
            rows: the slots of the B rows.
        """
        x = wave.unsqueeze(1)
        for index, (layer, carry) in enumerate(zip(self.conv_layers, state.conv, strict=True)):
            assert isinstance(layer, ConvLayer)
            kept = carry.shape[2]
            x = torch.cat([carry[rows], x], dim=2)
            carry[rows] = x[:, :, x.shape[2] - kept :]
            if isinstance(layer.layer_norm, nn.GroupNorm):
                x = layer.conv(x)
                x = layer.normalized(x, self._group_step(x, kept, state, total, rows))
            else:
                x = layer(x)
            assert index or x.shape[2] == wave.shape[1] // self.config.conv_stride[0]
        return x

    def _group_step(
        self, x: Tensor, kept: int, state: EncoderState, total: Tensor, rows: Rows
    ) -> tuple[Tensor, Tensor]:
        kernel, stride = self.config.conv_kernel[0], self.config.conv_stride[0]
        first = state.steps[rows] * x.shape[2] - kept // stride
        position = first.unsqueeze(1) + torch.arange(x.shape[2], device=x.device)
        outputs = (total - kernel) // stride + 1
        exists = (position >= 0) & (position < outputs.unsqueeze(1))
        return state.group.step(x, exists, self._group_limit(state.window), rows)


class FeatureProjection(nn.Module):
    """Features → encoder width. Source: ``UniSpeechSatFeatureProjection``."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(config.conv_dim[-1], eps=config.layer_norm_eps)
        self.projection = Linear(config.conv_dim[-1], config.hidden_size)
        self.dropout = nn.Dropout(config.feat_proj_dropout)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x: [B, T, C] → projected [B, T, D], and normalised [B, T, C] for quantisation."""
        normed = self.layer_norm(x)
        return self.dropout(self.projection(normed)), normed


def normalize_step(wave: Tensor, exists: Tensor, state: EncoderState, rows: Rows) -> Tensor:
    """Zero mean and unit variance by the stream's running moments. wave: [B, N] → [B, N]

    An approximation of ``do_normalize``, which knows the whole utterance: moments grow until
    ``window.warm_up`` frames were heard, then freeze, so that a level once learnt stays.
    """
    hop = wave.shape[1] // state.window.chunk
    mean, variance = state.wave.step(wave.unsqueeze(1), exists, state.window.warm_up * hop, rows)
    normed = (wave - mean) * torch.rsqrt(variance + WAVE_VARIANCE_FLOOR)
    return torch.where(exists, normed.to(wave.dtype), torch.zeros_like(wave))


def normalize_running(wave: Tensor, window: Window, hop: int) -> Tensor:
    """What `normalize_step` makes of a whole stream. wave: [B, N] → [B, N]"""
    B, N = wave.shape
    moments = RunningMoments.zeros(B, 1, wave.device)
    out: list[Tensor] = []
    for part in wave.split(window.chunk * hop, dim=1):
        exists = torch.ones_like(part, dtype=torch.bool)
        mean, variance = moments.step(part.unsqueeze(1), exists, window.warm_up * hop, slice(None))
        out.append((part - mean) * torch.rsqrt(variance + WAVE_VARIANCE_FLOOR))
    return torch.cat(out, dim=1) if out else wave.new_zeros(B, N)
