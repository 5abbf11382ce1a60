"""A filterbank to start from: Gabor filters for the first convolution of the front end."""

import math

import torch
from torch import Tensor

PHASES = 4
"""Filters a centre, a quarter turn apart: GELU over them rectifies whatever the signal's phase."""


def mel_centres(count: int, low: float, high: float) -> Tensor:
    """``count`` frequencies in Hz, equally spaced on the mel scale from ``low`` to ``high``."""
    first, last = (2595 * math.log10(1 + hertz / 700) for hertz in (low, high))
    mel = torch.linspace(first, last, count)
    return 700 * (10 ** (mel / 2595) - 1)


def gabor_filters(
    channels: int = 320,
    kernel: int = 400,
    *,
    rate: int = 16_000,
    low: float = 60.0,
    high: float = 7_600.0,
    gain: float = 150.0,
) -> Tensor:
    """Weights of the first convolution.  → [channels, 1, kernel].

    Centres are mel-spaced; each window is a Hann no longer than the kernel that narrows as the
    distance between centres grows (its main lobe spans four of them). The gain rises with
    frequency as the levels of speech in these bands fall (20 dB a decade, measured on the
    training data), so that no band drowns in the layer norm that follows. ``gain`` is the response
    at 1 kHz to a sine at the centre: it sets the level under which that norm stops lifting the
    background, about speech at −50 dBFS.

    Raises:
        ValueError: ``channels`` is not a multiple of the four phases.
    """
    if channels % PHASES:
        raise ValueError(f"channels: expected a multiple of {PHASES}, got {channels}")
    centres = mel_centres(channels // PHASES, low, high)
    spacing = torch.diff(centres, append=(2 * centres[-1:] - centres[-2:-1]))
    length = (rate * 2.0 / spacing).clamp(max=float(kernel))[:, None]
    offset = torch.arange(kernel) - (kernel - 1) / 2
    window = 0.5 + 0.5 * torch.cos(2 * math.pi * offset / length)
    window = torch.where(offset.abs() <= length / 2, window, torch.zeros(()))
    window = window / window.sum(1, keepdim=True)
    phase = torch.arange(PHASES) * (2 * math.pi / PHASES)
    carrier = torch.cos(2 * math.pi * centres[:, None, None] / rate * offset + phase[:, None])
    level = 2 * gain * centres / 1_000
    filters = level[:, None, None] * window[:, None] * carrier
    return filters.reshape(channels, 1, kernel)
