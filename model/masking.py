"""Span masks over time or features: for SpecAugment and for masked prediction."""

import torch
from torch import Tensor


def compute_mask_indices(
    shape: tuple[int, int],
    mask_prob: float,
    mask_length: int,
    attention_mask: Tensor | None = None,
    min_masks: int = 0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw spans of ``mask_length`` positions to mask in every row.

    The counting rule of the published ``_compute_mask_indices``: a row of length ``n`` gets
    ``int(mask_prob * n / mask_length + u)`` spans with one uniform ``u`` for the whole batch, at
    least ``min_masks``, and never more than fit; their starts are drawn without replacement, so
    spans may overlap and the masked share ends up a little below ``mask_prob``.

    Args:
        shape: ``(B, T)`` of the mask.
        mask_prob: Share of the positions that spans cover before overlap, 0 to 1.
        mask_length: Positions a span, 1 to ``T``.
        attention_mask: ``[B, T]``, non-zero where a row has frames (padding on the right); spans
            stay inside it. ``None``: every row has ``T``.
        min_masks: Least number of spans a row, where they fit.
        generator: Source of randomness (CPU); ``None`` uses torch's default.

    Returns:
        ``[B, T]`` bool on the device of ``attention_mask`` (else CPU), true where masked.

    Raises:
        ValueError: ``mask_length`` is not within 1 and ``T``, ``mask_prob`` is not within 0 and 1,
            or the attention mask has another shape.
    """
    B, T = shape
    if not 1 <= mask_length <= T:
        raise ValueError(f"expected mask_length between 1 and {T} (the frames), got {mask_length}")
    if not 0 <= mask_prob <= 1:
        raise ValueError(f"expected mask_prob between 0 and 1, got {mask_prob}")
    if attention_mask is not None and tuple(attention_mask.shape) != (B, T):
        raise ValueError(f"expected attention_mask [{B}, {T}], got {list(attention_mask.shape)}")

    if attention_mask is None:
        attention_mask = torch.ones(B, T)
    length = attention_mask.ne(0).sum(1).cpu()

    places = (length - (mask_length - 1)).clamp(min=0)  # starts that keep a span inside the row
    jitter = torch.rand((), dtype=torch.float64, generator=generator)
    spans = (mask_prob * length.double() / mask_length + jitter).long().clamp(min=min_masks)
    spans = torch.where(spans * mask_length > T, T // mask_length, spans).minimum(places)

    # the `spans` smallest of one random score a place: a draw without replacement, all rows at once
    score = torch.rand(B, T, generator=generator)
    score = score.masked_fill(torch.arange(T) >= places[:, None], torch.inf)
    start = score.argsort(1).argsort(1) < spans[:, None]

    opened = start.cumsum(1)
    closed = torch.nn.functional.pad(opened, (mask_length, 0))[:, :T]
    return (opened > closed).to(attention_mask.device)
