"""A linear layer that keeps its weights packed for a few rows at a time."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW_ROWS = 320
"""Up to here a CPU spends more on rearranging the weights than on multiplying by them."""


class Linear(nn.Linear):
    """`torch.nn.Linear`, faster on a CPU where a live stream is: a few dozen rows.

    A streaming step multiplies some 40 frames by every weight of the model, so a BLAS that
    rearranges the weights in each call does as much moving as arithmetic. The rearranged weights
    are kept beside the parameter instead, which doubles its memory in processes that stream.
    Parameters, names and results (to rounding) are those of the parent class.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self._packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, input: Tensor, gelu: bool = False) -> Tensor:
        """input: […, in] → […, out]; with ``gelu`` the exact GELU of it."""
        x = input
        if not self._packs(x):
            y = F.linear(x, self.weight, self.bias)
            return F.gelu(y) if gelu else y
        after = ("gelu", [], "none") if gelu else ("none", [], "")
        return torch.ops.mkldnn._linear_pointwise(x, self._weights(), self.bias, *after)

    def _packs(self, x: Tensor) -> bool:
        return packs(x, self.weight) and x.numel() <= FEW_ROWS * self.in_features

    def _weights(self) -> Tensor:
        key = version(self.weight)
        if self._packed is None or self._packed[0] != key:
            with torch.inference_mode():
                weight = self.weight.detach()
                packed = torch.ops.mkldnn._reorder_linear_weight(weight, 64)
            self._packed = (key, packed)
        return self._packed[1]

    def __getstate__(self) -> dict[str, object]:
        # the packed form is the machine's own: neither copied nor pickled
        return {**self.__dict__, "_packed": None}


def packs(x: Tensor, parameter: Tensor) -> bool:
    """Whether ``x`` can be multiplied by packed weights: float32 on a CPU, and no gradients."""
    return (
        not torch.is_grad_enabled()
        and x.device.type == "cpu"
        and x.dtype == parameter.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    )


def version(parameter: Tensor) -> tuple[int, int]:
    """A key that changes when a parameter's values do."""
    changes = 0 if parameter.is_inference() else parameter._version  # inference tensors have none
    return parameter.data_ptr(), changes
