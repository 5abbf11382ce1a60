"""Stage 0: a corpus of synthetic readings: the characters see more text than six hours hold.

Sentences come from the language model's text, voices from two synthesisers whose output may be
redistributed: hibari-tts (PyPI, Apache-2.0; the voice in its wheel) and Flite (Debian's `flite`).
Each reading has a tempo of its own and is then resampled by a factor of its own, which moves pitch,
formants and tempo together. The result is an archive and a manifest like those of the other
corpora; its speakers are unknown, so nothing is learnt from them about telling voices apart.
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
        target: folder of the archive and its manifest, which have its name.
        readings: how many utterances.
        words: shortest and longest of them.
        flite: share of utterances read by Flite.
        voices: of Flite, drawn evenly.
        tempo: range of what a voice's own tempo is multiplied with.
        resample: range of the factor by which a reading is slowed down.
        seed: of all choices.
    """

    text: Path
    target: Path
    readings: int
    words: tuple[int, int] = (3, 14)
    flite: float = 0.25
    voices: list[str] = ["rms"]  # noqa: RUF012  (pydantic copies defaults)
    tempo: tuple[float, float] = (1.0, 1.0)
    resample: tuple[float, float] = (0.85, 1.2)
    seed: int = 1


Voice = Callable[[str, float], tuple[Floats, int]]
"""Text and tempo → samples and their rate."""


def hibari() -> Voice:
    """The voice in the wheel of hibari-tts.

    Raises:
        SystemExit: it is not installed.
    """
    try:
        from hibari import Hibari
    except ImportError as error:
        raise SystemExit("recipes.synthesize needs hibari-tts: pip install hibari-tts") from error
    voice = Hibari()
    return lambda text, tempo: (np.asarray(voice(text, tempo, seed=0), np.float32), 24_000)


def flite(name: str) -> Voice:
    """One of Flite's voices; it is a program of its own."""

    def read(text: str, tempo: float) -> tuple[Floats, int]:
        with tempfile.NamedTemporaryFile(suffix=".wav") as out:
            slowed = f"duration_stretch={1 / tempo:.3f}"
            subprocess.run(
                ["flite", "-voice", name, "--setf", slowed, "-t", text, "-o", out.name], check=True
            )
            wave, rate = sf.read(out.name, dtype="float32")
        return np.asarray(wave, np.float32), rate

    return read


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Synthesize, "synthesize", "read sentences aloud")
    rng = np.random.default_rng(settings.seed)
    manner = np.random.default_rng([settings.seed, 1])  # what is read does not depend on who reads
    with gzip.open(settings.text, "rt") as file:
        lines = [words for line in file if len(words := line.split()) > settings.words[0]]
    settings.target.mkdir(parents=True, exist_ok=True)
    archive_path = settings.target / f"{settings.target.name}.tar"
    voice, others = hibari(), [flite(name) for name in settings.voices]
    with (
        tarfile.open(archive_path, "w") as archive,
        archive_path.with_suffix(".jsonl").open("w") as manifest,
    ):
        for number in range(settings.readings):
            line = lines[int(rng.integers(len(lines)))]
            length = int(rng.integers(settings.words[0], settings.words[1] + 1))
            first = int(rng.integers(max(len(line) - length, 0) + 1))
            text = " ".join(line[first : first + length])
            read = voice
            if rng.random() < settings.flite:
                read = others[int(manner.integers(len(others)))]
            wave, rate = read(text.lower(), float(manner.uniform(*settings.tempo)))
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
