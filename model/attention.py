"""Self-attention: eager, SDPA and flash, over a whole utterance or a window and its cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import UniSpeechSatConfig
from model.linear import Linear

FEW_QUERIES = 64
"""Up to here two plain products beat the fused kernel of a CPU, by a fifth at 37 queries."""


class Attention(nn.Module):
    """Multi-head self-attention. Source: ``UniSpeechSatAttention``.

    ``head_mask`` scales a head's output, which needs no attention matrix, so all three
    implementations honour it; the published code does so in eager alone.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.config = config
        self.heads = config.num_attention_heads
        self.head_dim = D // self.heads
        self.dropout = config.attention_dropout
        self.k_proj = Linear(D, D)
        self.v_proj = Linear(D, D)
        self.q_proj = Linear(D, D)
        self.out_proj = Linear(D, D)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        queries: int | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, D] → [B, Q, D], and the attention [B, H, Q, K] or None.

        Args:
            x: frames.
            mask: [B or 1, 1, Q or 1, K] bool, True where a key may be seen.
            head_mask: [H] or [B, H, 1, 1], the factor of each head's output.
            cache: keys and values, [B, L + T, H, head_dim] each: L that are cached, then room for
                x's own, which are written there. K = L + T; without a cache K = T.
            queries: how many of the first frames to compute; None is all.
            output_attentions: return the matrix (always computed eagerly).
        """
        B, T, D = x.shape
        Q = T if queries is None else queries
        query = self.q_proj(x[:, :Q]).view(B, Q, self.heads, self.head_dim)
        key = self.k_proj(x).view(B, T, self.heads, self.head_dim)
        value = self.v_proj(x).view(B, T, self.heads, self.head_dim)
        if cache is not None:
            room = cache[0].shape[1] - T
            cache[0][:, room:] = key
            cache[1][:, room:] = value
            key, value = cache
        context, weights = attend(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            mask,
            implementation="eager" if output_attentions else self.config.attn_implementation,
            dropout=self.dropout if self.training else 0.0,
        )
        if head_mask is not None:
            factor = head_mask.view(1, -1, 1, 1) if head_mask.dim() == 1 else head_mask
            context = context * factor.to(context.dtype)
        out = self.out_proj(context.transpose(1, 2).reshape(B, Q, D))
        return out, weights if output_attentions else None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    implementation: str,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor | None]:
    """query: [B, H, T, d]; key, value: [B, H, K, d] → [B, H, T, d], and the matrix if eager.

    A query whose every key is masked gives finite numbers of no meaning, never NaN.

    Raises:
        ValueError: flash attention on a device or dtype that has none.
    """
    bias = None
    if mask is not None:
        lowest = torch.finfo(query.dtype).min
        bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
        bias.masked_fill_(~mask, lowest)
    if implementation == "eager" or (implementation == "sdpa" and _few(query)):
        scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3))
        if bias is not None:
            scores = scores + bias
        weights = scores.softmax(dim=-1)
        return torch.matmul(F.dropout(weights, dropout), value), weights
    if implementation == "flash_attention_2":
        if query.device.type != "cuda" or query.dtype not in (torch.float16, torch.bfloat16):
            raise ValueError(
                "flash_attention_2: expected float16 or bfloat16 on a CUDA device, got "
                f"{str(query.dtype).removeprefix('torch.')} on {query.device.type}; "
                "use attn_implementation='sdpa' here"
            )
        # torch's flash kernel takes no mask; padded batches go to the memory-efficient kernel
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]):
            return F.scaled_dot_product_attention(query, key, value, bias, dropout), None
    return F.scaled_dot_product_attention(query, key, value, bias, dropout), None


def _few(query: Tensor) -> bool:
    """A live stream's step on a CPU. query: [B, H, T, d]"""
    return (
        query.device.type == "cpu" and query.shape[2] <= FEW_QUERIES and not torch.is_grad_enabled()
    )
