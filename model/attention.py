"""Self-attention: eager, SDPA and flash, over a whole utterance or a window and its cache."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model.config import UniSpeechSatConfig


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
        self.k_proj = nn.Linear(D, D)
        self.v_proj = nn.Linear(D, D)
        self.q_proj = nn.Linear(D, D)
        self.out_proj = nn.Linear(D, D)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """x: [B, T, D] → [B, T, D], attention [B, H, T, K] or None, keys and values of x.

        Args:
            x: frames.
            mask: [B or 1, 1, T or 1, K] bool, True where a key may be seen.
            head_mask: [H] or [B, H, 1, 1], the factor of each head's output.
            past: cached keys and values, [B, L, H, head_dim] each; they stand before x's own, so
                K = L + T. Without it K = T.
            output_attentions: return the matrix (always computed eagerly).
        """
        B, T, D = x.shape
        shape = (B, T, self.heads, self.head_dim)
        query = self.q_proj(x).view(shape)
        key = self.k_proj(x).view(shape)
        value = self.v_proj(x).view(shape)
        keys, values = key, value
        if past is not None and past[0].shape[1]:
            keys = torch.cat([past[0].to(key.dtype), key], dim=1)
            values = torch.cat([past[1].to(value.dtype), value], dim=1)
        context, weights = attend(
            query.transpose(1, 2),
            keys.transpose(1, 2),
            values.transpose(1, 2),
            mask,
            implementation="eager" if output_attentions else self.config.attn_implementation,
            dropout=self.dropout if self.training else 0.0,
        )
        if head_mask is not None:
            factor = head_mask.view(1, -1, 1, 1) if head_mask.dim() == 1 else head_mask
            context = context * factor.to(context.dtype)
        out = self.out_proj(context.transpose(1, 2).reshape(B, T, D))
        return out, weights if output_attentions else None, key, value


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
    if implementation == "eager":
        scores = torch.matmul(query, key.transpose(2, 3)) * query.shape[-1] ** -0.5
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
