"""What microphones and lines do to speech: colour, telephone bands, codecs; nothing moves in time.

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
from scipy.signal import correlate, firwin2

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


def microphone(rng: np.random.Generator, deviation_db: float) -> Floats:
    """How one microphone in one place colours what it hears: a zero-phase filter.  → [513] taps

    Bells, tables and casings: gains of this deviation at ten places from 60 Hz up, 0.7 octaves
    apart. Half of them lose the bass below 60…300 Hz, half the treble above 3…7.5 kHz, by 6…24 dB
    an octave. The teachers take a recording's mean spectrum away, so their targets stay right.
    """
    grid = np.linspace(0, RATE / 2, 513)
    octaves = np.log2(np.maximum(grid, 30.0))
    places = np.log2(60.0) + 0.78 * np.arange(10)
    gain_db = np.interp(octaves, places, deviation_db * rng.standard_normal(10))
    bass, treble = np.log2(rng.uniform(60, 300)), np.log2(rng.uniform(3000, 7500))
    steep = rng.uniform(6, 24, 2) * (rng.random(2) < 0.5)
    gain_db -= steep[0] * np.maximum(bass - octaves, 0) + steep[1] * np.maximum(octaves - treble, 0)
    return firwin2(513, grid, 10 ** (gain_db / 20), fs=RATE).astype(np.float32)
