"""The convolutional position embedding."""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from model.config import UniSpeechSatConfig
from model.features import activation
from model.linear import packs, version

MANY_FRAMES = 640
"""From here on the arithmetic hides what rearranging the weights costs."""


class PositionalConvEmbedding(nn.Module):
    """A grouped, weight-normed convolution over frames stands for position.

    Source: ``UniSpeechSatPositionalConvEmbedding``; wav2vec 2.0 (arXiv 2006.11477), section 2.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        kernel = config.num_conv_pos_embeddings
        conv = nn.Conv1d(
            config.hidden_size,
            config.hidden_size,
            kernel,
            groups=config.num_conv_pos_embedding_groups,
            device="cpu",  # on meta, weight_norm imports half of torch: two seconds of start-up
        )
        # weight_norm gives the layer a class made at run time; its type stays Conv1d
        self.conv: nn.Conv1d = cast("nn.Conv1d", parametrizations.weight_norm(conv, dim=2))
        self.conv.to(torch.get_default_device())
        self.activation = activation(config.feat_extract_activation)
        self.history = kernel // 2
        """Frames before a frame that its embedding sees."""
        self.future = kernel - 1 - kernel // 2
        """Frames after it; one fewer than `history` when the kernel is even."""
        self._weight: _Weight | None = None

    def init_weights(self) -> None:
        """Published initialisation."""
        conv = self.conv
        std = 2 * math.sqrt(1 / (conv.kernel_size[0] * conv.in_channels))
        # assigned, not filled: the weight is computed from its norm and direction
        conv.weight = torch.randn_like(conv.weight) * std  # pyright: ignore[reportAttributeAccessIssue]
        assert conv.bias is not None
        nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Whole utterance: zeros stand before and after it. x: [B, T, D] → [B, T, D]"""
        return self.window(F.pad(x, (0, 0, self.history, 0)))

    def window(self, x: Tensor) -> Tensor:
        """Embeddings of all but the first ``history`` frames; zeros stand after the last.

        x: [B, history + W, D] → [B, W, D]
        """
        x = F.pad(x.transpose(1, 2), (0, self.future))
        conv = self.conv
        assert conv.bias is not None
        if torch.is_grad_enabled():
            x = F.conv1d(x, conv.weight, conv.bias, groups=conv.groups)
        else:
            weight = self._normed()
            if packs(x, conv.bias) and x.shape[0] * x.shape[2] <= MANY_FRAMES:
                x = torch.ops.mkldnn._convolution_pointwise(
                    x.unsqueeze(2),
                    weight.packed_for(x, conv.groups),
                    conv.bias,
                    [0, 0],
                    [1, 1],
                    [1, 1],
                    conv.groups,
                    "none",
                    [],
                    "",
                ).squeeze(2)
            else:
                x = F.conv1d(x, weight.plain, conv.bias, groups=conv.groups)
        return self.activation(x).transpose(1, 2)

    def _normed(self) -> "_Weight":
        """The normed weight, made once for each state of the parameters.

        Norming the published 4.7 M weights costs as much as a step of the convolution.
        """
        key = tuple(version(parameter) for parameter in self.conv.parameters())
        if self._weight is None or self._weight.key != key:
            self._weight = _Weight(key, self.conv.weight.detach().clone())
        return self._weight

    def __getstate__(self) -> dict[str, object]:
        # the packed form is the machine's own: neither copied nor pickled
        return {**self.__dict__, "_weight": None}


@dataclass
class _Weight:
    """A normed weight [D, D / groups, kernel], and how a CPU likes it for a few frames."""

    key: tuple[tuple[int, int], ...]
    plain: Tensor
    packed: Tensor | None = None

    def packed_for(self, x: Tensor, groups: int) -> Tensor:
        """The weight rearranged once, which a convolution of a few frames would do each time."""
        packed = self.packed
        if packed is None:
            with torch.inference_mode():
                packed = self.packed = torch.ops.aten.mkldnn_reorder_conv2d_weight(
                    self.plain.unsqueeze(2).to_mkldnn(),
                    [0, 0],
                    [1, 1],
                    [1, 1],
                    groups,
                    [x.shape[0], x.shape[1], 1, x.shape[2]],
                )
        return packed
