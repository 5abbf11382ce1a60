"""Every stage on a tiny made-up corpus: `make train-smoke`.

Six "speakers" are buzzes of their own pitch, whose letters are their own formants; the teachers'
weights are replaced by a stand-in of the same shapes. Nothing here is worth anything as a model:
what is checked is that each stage runs from the last one's files, that every loss falls, and that
every number is finite.
"""

import json
import math
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray
from scipy.signal import lfilter

from recipes.corpus import RATE

FORMANTS = {"A": (750, 1200), "E": (500, 1900), "I": (300, 2300), "O": (450, 850), "U": (320, 700)}
PITCHES = (95, 120, 150, 185, 215, 240)
DEVELOPMENT = 2
"""The last so many speakers."""


def letter(pitch: float, formants: tuple[int, int], seconds: float) -> NDArray[np.float64]:
    """A pulse train through two resonances.  → [N]"""
    wave = np.zeros(int(seconds * RATE))
    wave[:: int(RATE / pitch)] = 1.0
    for centre in formants:
        radius, turn = 0.985, 2 * np.pi * centre / RATE
        wave = lfilter([1 - radius], [1, -2 * radius * np.cos(turn), radius**2], wave)
    return wave * np.hanning(len(wave))


def reading(rng: np.random.Generator, pitch: float, text: str) -> NDArray[np.float32]:
    """A text of vowels and spaces, with silence around it."""
    parts = [np.zeros(RATE // 4)]
    for symbol in text:
        length = rng.uniform(0.14, 0.2)
        if symbol == " ":
            parts.append(np.zeros(int(0.1 * RATE)))
        else:
            parts.append(letter(pitch * rng.uniform(0.97, 1.03), FORMANTS[symbol], length))
    wave = np.concatenate([*parts, np.zeros(RATE // 4)])
    wave = 0.2 * wave / np.abs(wave).max() + 1e-4 * rng.standard_normal(len(wave))
    return wave.astype(np.float32)


def archive(path: Path, files: dict[str, NDArray[np.float32]]) -> None:
    """Writes waves as FLAC into a tar."""
    with tarfile.open(path, "w") as tar:
        for name, wave in files.items():
            data = BytesIO()
            sf.write(data, wave, RATE, format="FLAC")
            member = tarfile.TarInfo(name)
            member.size = len(data.getvalue())
            data.seek(0)
            tar.addfile(member, data)


def make_corpus(folder: Path) -> None:
    """Archives and manifests as `recipes.prepare` reads them."""
    rng = np.random.default_rng(0)
    files: dict[str, NDArray[np.float32]] = {}
    lines: list[str] = []
    for speaker, pitch in enumerate(PITCHES):
        for number in range(8):
            words = ["".join(rng.choice(list(FORMANTS), rng.integers(2, 5))) for _ in range(3)]
            text = " ".join(words)
            name = f"s{speaker}_{number}.flac"
            files[name] = reading(rng, pitch, text)
            entry = {
                "id": name.removesuffix(".flac"),
                "file": name,
                "split": "dev" if speaker >= len(PITCHES) - DEVELOPMENT else "train",
                "speaker": f"s{speaker}",
                "text": text,
            }
            lines.append(json.dumps(entry))
    archive(folder / "vowels.tar", files)
    (folder / "vowels.jsonl").write_text("\n".join(lines) + "\n")
    noises = {f"n{n}.flac": (0.05 * rng.standard_normal(RATE)).astype(np.float32) for n in range(4)}
    archive(folder / "noise.tar", noises)


def stage(name: str, config: dict[str, Any], folder: Path) -> None:
    """Runs a stage's command with a configuration of its own."""
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    began = time.monotonic()
    command = [sys.executable, "-m", f"recipes.{name}", "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)


def falls(log: Path, names: list[str]) -> None:
    """Checks that each loss is lower at the end of a run than at its beginning.

    Raises:
        SystemExit: one is not, or is not finite.
    """
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    for name in names:
        values = [line[name] for line in lines if name in line]
        if not values or not all(math.isfinite(value) for value in values):
            raise SystemExit(f"{log.parent.name}: {name} is {values}, expected finite numbers")
        few = max(1, len(values) // 4)
        begin, end = sum(values[:few]) / few, sum(values[-few:]) / few
        if end >= begin:
            raise SystemExit(f"{log.parent.name}: {name} went from {begin:.4f} to {end:.4f}")
        print(f"  {name}: {begin:.3f} → {end:.3f}", flush=True)


def finite(value: Any, where: str = "report") -> int:
    """Counts the numbers of a report, all of which must be finite.

    Raises:
        SystemExit: one is not.
    """
    if isinstance(value, dict):
        return sum(finite(item, f"{where}.{key}") for key, item in value.items())
    if isinstance(value, list):
        return sum(finite(item, where) for item in value)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return 0
    if not math.isfinite(value):
        raise SystemExit(f"{where}: got {value}, expected a finite number")
    return 1


SHAPE = {
    "layers": 2,
    "width": 64,
    "heads": 2,
    "feed_forward": 128,
    "positions": 16,
    "position_groups": 4,
    "conv_dim": [320, 64],
    "tdnn": [64, 512],
}
"""Small, but with what must fit together: the Gabor front end, the teacher's channels."""


def main() -> None:
    """Runs all stages in a folder of their own."""
    folder = Path(tempfile.mkdtemp(prefix="train-smoke-"))
    data = folder / "data"
    make_corpus(folder)
    sources = {"vowels": 1.0}
    try:
        run_stages(folder, data, sources)
    finally:
        shutil.rmtree(folder)


def run_stages(folder: Path, data: Path, sources: dict[str, float]) -> None:
    """The stages in order, each from the files of those before."""
    stage(
        "prepare",
        {
            "target": str(data),
            "corpora": [str(folder / "vowels")],
            "other_speeds": ["vowels"],
            "noise": str(folder / "noise.tar"),
            "campplus": None,
            "bfloat16": False,
        },
        folder,
    )
    stage("rooms", {"target": str(data / "rooms.npy"), "rooms": 2, "longest_s": 0.2}, folder)
    stage(
        "pretrain",
        {
            "data": str(data),
            "run": str(folder / "pretrain"),
            "steps": 60,
            "decay_steps": 20,
            "warm_up_steps": 10,
            "rate": 2e-3,
            "clusters": 16,
            "hops": 60,
            "batch_hops": 480,
            "sources": sources,
            "log_steps": 5,
            "bfloat16": False,
            "device": "cpu",
            "shape": SHAPE,
        },
        folder,
    )
    falls(folder / "pretrain" / "log.jsonl", ["loss", "prediction", "contrastive"])
    run = folder / "finetune"
    stage(
        "finetune",
        {
            "data": str(data),
            "campplus": None,
            "run": str(run),
            "steps": 80,
            "decay_steps": 30,
            "warm_up_steps": 10,
            "utterance_hops": [150],
            "talk_hops": [200],
            "utterance_batch_hops": 900,
            "talk_batch_hops": 800,
            "sources": sources,
            "conversation": {"sources": sources, "transfer_s": [0.0, 0.5]},
            "acoustics": {"reverb": 0.3, "rooms": 0.5, "codec": 0.1, "level_db": [-30, -20]},
            "windows": [[25, 12]],
            "left": [100],
            "stream_from": 40,
            "nobody": 0.05,
            "log_steps": 5,
            "bfloat16": False,
            "device": "cpu",
            "shape": SHAPE,
        },
        folder,
    )
    losses = ["u.activity", "c.activity", "c.presence", "u.ctc", "u.dense", "u.cosine", "u.nce"]
    falls(run / "log.jsonl", losses)
    checkpoint = str(run / "checkpoint.pt")
    weights = folder / "weights"
    normalised = str(run / "normalised.pt")
    stage(
        "normalise",
        {
            "checkpoint": checkpoint,
            "target": normalised,
            "data": str(data),
            "scenes": 40,
            "sources": sources,
        },
        folder,
    )
    stage("export", {"checkpoint": normalised, "target": str(weights)}, folder)
    stage(
        "cohort",
        {
            "checkpoint": str(weights),
            "data": str(data),
            "target": str(weights / "speaker" / "cohort.npy"),
            "clips": 2,
            "least_s": 0.0,
        },
        folder,
    )
    talks = folder / "talks"
    stage(
        "conversations",
        {
            "data": str(data),
            "target": str(talks),
            "meetings": {"speakers": [2], "each": 2, "seconds": 12, "whole": True},
        },
        folder,
    )
    shared = {"checkpoint": str(weights), "data": str(data), "conversations": str(talks)}
    tracks = weights / "tracks.json"
    stage(
        "calibrate",
        shared
        | {
            "target": str(tracks),
            "simulated": {"speakers": [2], "each": 1, "seconds": 12},
            "conversations": {str(talks): 0.5},
            "simulated_share": 0.5,
            "trials": 6,
            "rounds": 1,
            "candidates": {"turns.onset": [0.5, 0.7], "turns.min_off_ms": [300, 700]},
        },
        folder,
    )
    report = folder / "score.json"
    stage(
        "score",
        shared
        | {
            "tracks": str(tracks),
            "report": str(report),
            "meetings": {"speakers": [2], "each": 1, "seconds": 12},
            "open_set": {"splits": 2, "clips": 2},
        },
        folder,
    )
    print(f"  {finite(json.loads(report.read_text()))} numbers, all of them finite", flush=True)
    return


if __name__ == "__main__":
    main()
