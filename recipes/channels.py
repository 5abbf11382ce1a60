"""What a line does to speech: telephone bands and codecs, without moving it in time.

Codecs delay what they code. Each one's delay is measured once, as the lag at which what comes out
looks most like what went in, and taken back, so that labels stay exact.
"""

from collections.abc import Callable
from functools import cache
from io import BytesIO

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray
from scipy.signal import correlate

from recipes.corpus import RATE

Floats = NDArray[np.float32]

CODECS: dict[str, tuple[int, str, str, float | None]] = {
    "mulaw": (8_000, "WAV", "ULAW", None),
    "gsm": (8_000, "WAV", "GSM610", None),
    "opus-low": (16_000, "OGG", "OPUS", 0.95),
    "opus": (16_000, "OGG", "OPUS", 0.7),
    "mp3": (16_000, "MP3", "MPEG_LAYER_III", 0.9),
}
"""Name → rate, container, coding and libsndfile's compression level (1 is the smallest file)."""


def available() -> list[str]:
    """The codecs this libsndfile has."""
    return [
        name
        for name, (_, container, coding, _) in CODECS.items()
        if container in sf.available_formats() and coding in sf.available_subtypes(container)
    ]


def through(wave: Floats, name: str) -> Floats:
    """wave: [N] at 16 kHz → [N], coded and decoded, in its place.

    Raises:
        ValueError: no such codec here.
    """
    if name not in available():
        raise ValueError(f"codec: expected one of {', '.join(available())}, got {name!r}")
    return _shifted(_coded(wave, name), delay(name), len(wave))


@cache
def delay(name: str) -> int:
    """Samples (at 16 kHz) by which a codec is late."""
    rng = np.random.default_rng(0)
    probe = np.zeros(RATE, np.float32)
    probe[4000:12000] = 0.1 * rng.standard_normal(8000)
    return _lag(_coded(_band(probe), name), _band(probe))


def _lag(late: Floats, early: Floats) -> int:
    likeness = correlate(late[: len(early)], early, "full")
    return int(np.argmax(likeness)) - (len(early) - 1)


def _band(wave: Floats) -> Floats:
    """What a telephone lets through: only that may be compared."""
    return soxr.resample(soxr.resample(wave, RATE, 6400), 6400, RATE).astype(np.float32)


def _coded(wave: Floats, name: str) -> Floats:
    rate, container, coding, level = CODECS[name]
    narrow = wave if rate == RATE else soxr.resample(wave, RATE, rate)
    data = BytesIO()
    more = {} if level is None else {"compression_level": level}
    sf.write(data, np.clip(narrow, -1, 1), rate, format=container, subtype=coding, **more)
    data.seek(0)
    heard, _ = sf.read(data, dtype="float32")
    return heard if rate == RATE else soxr.resample(heard, rate, RATE).astype(np.float32)


def _shifted(wave: Floats, lag: int, length: int) -> Floats:
    wave = wave[lag:] if lag >= 0 else np.concatenate([np.zeros(-lag, np.float32), wave])
    return np.pad(wave[:length], (0, max(length - len(wave), 0)))


def drawn(rng: np.random.Generator) -> Callable[[Floats], Floats]:
    """One of the codecs there are."""
    names = available()
    name = names[int(rng.integers(len(names)))]
    return lambda wave: through(wave, name)
