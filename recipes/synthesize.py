"""Stage 0: a corpus of synthetic readings: the characters see more text than six hours hold.

Sentences come from the language model's text, voices from two synthesisers whose output may be
redistributed: hibari-tts (PyPI, Apache-2.0; the voice in its wheel) and Flite's ``rms`` (Debian's
`flite`). Each reading is resampled by a factor of its own, which moves pitch, formants and speed
together. The result is an archive and a manifest like those of the other corpora; its speakers are
unknown, so nothing is learnt from them about telling voices apart.
"""

import gzip
import json
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

from recipes.corpus import RATE
from recipes.settings import Settings, from_arguments

Floats = NDArray[np.float32]


class Synthesize(Settings):
    """How much is read, and of what.

    Attributes:
        text: gzipped lines of upper-case words.
        target: folder of ``synthetic.tar`` and ``synthetic.jsonl``.
        readings: how many utterances.
        words: shortest and longest of them.
        flite: share of utterances read by Flite.
        resample: range of the factor by which a reading is slowed down.
        seed: of all choices.
    """

    text: Path
    target: Path
    readings: int
    words: tuple[int, int] = (3, 14)
    flite: float = 0.25
    resample: tuple[float, float] = (0.85, 1.2)
    seed: int = 1


def hibari() -> Callable[[str], tuple[Floats, int]]:
    """The voice in the wheel of hibari-tts.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        from hibari import Hibari
    except ImportError as error:
        raise SystemExit("recipes.synthesize needs hibari-tts: pip install hibari-tts") from error
    voice = Hibari()
    return lambda text: (np.asarray(voice(text, seed=0), np.float32), 24_000)


def flite(text: str) -> tuple[Floats, int]:
    """Flite's ``rms``, a program of its own."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as out:
        subprocess.run(["flite", "-voice", "rms", "-t", text, "-o", out.name], check=True)
        wave, rate = sf.read(out.name, dtype="float32")
    return wave, rate


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Synthesize, "synthesize", "read sentences aloud")
    rng = np.random.default_rng(settings.seed)
    with gzip.open(settings.text, "rt") as file:
        lines = [words for line in file if len(words := line.split()) > settings.words[0]]
    settings.target.mkdir(parents=True, exist_ok=True)
    voices = (hibari(), flite)
    with (
        tarfile.open(settings.target / "synthetic.tar", "w") as archive,
        (settings.target / "synthetic.jsonl").open("w") as manifest,
    ):
        for number in range(settings.readings):
            line = lines[int(rng.integers(len(lines)))]
            length = int(rng.integers(settings.words[0], settings.words[1] + 1))
            first = int(rng.integers(max(len(line) - length, 0) + 1))
            text = " ".join(line[first : first + length])
            wave, rate = voices[int(rng.random() < settings.flite)](text.lower())
            factor = rng.uniform(*settings.resample)
            wave = soxr.resample(wave, rate, RATE * factor)
            wave *= 0.3 / max(float(np.abs(wave).max()), 1e-4)
            data = BytesIO()
            sf.write(data, wave, RATE, format="FLAC", subtype="PCM_16")
            member = tarfile.TarInfo(f"sy_{number:05d}.flac")
            member.size = len(data.getvalue())
            data.seek(0)
            archive.addfile(member, data)
            entry = {
                "id": f"sy_{number:05d}",
                "file": member.name,
                "split": "train",
                "dur": round(len(wave) / RATE, 2),
                "speaker": "",
                "text": text,
            }
            manifest.write(json.dumps(entry) + "\n")
            if number % 200 == 199:
                print(f"{number + 1} readings", flush=True)


if __name__ == "__main__":
    main()
