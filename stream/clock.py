"""Samples, frames and seconds: the one home of 16,000 and 320.

Inside the house time is an integer count of samples since the stream opened; seconds exist only on
the wire. Frame ``t`` begins at sample ``320 t``.
"""

from typing import Final

SAMPLE_RATE: Final = 16_000
"""Samples a second of every stream behind its source."""

HOP: Final = 320
"""Samples from one encoder frame to the next (20 ms)."""

FRAME_RATE: Final = SAMPLE_RATE // HOP
"""Encoder frames a second."""


def seconds(samples: int) -> float:
    """Samples → seconds, rounded to the microsecond so that JSON stays readable."""
    return round(samples / SAMPLE_RATE, 6)


def samples(seconds: float) -> int:
    """Seconds → the nearest sample."""
    return round(seconds * SAMPLE_RATE)


def frames(seconds: float) -> int:
    """Seconds → the nearest whole number of frames."""
    return round(seconds * FRAME_RATE)


def frame_start(frame: int) -> int:
    """The sample at which a frame begins."""
    return frame * HOP
