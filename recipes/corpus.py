"""Speech and noise on disk: flat memory-mapped arrays and one index line an utterance.

Everything is on the model's 50 Hz grid: an utterance is cut to whole hops of 320 samples, and its
activity and teacher rows are one a hop, so a piece cut at a hop boundary keeps exact labels.
"""

import json
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from itertools import groupby, pairwise
from pathlib import Path
from typing import Self

import numpy as np
import soundfile as sf
import soxr
from numpy.typing import NDArray

RATE = 16_000
HOP = 320
VOICE_CHANNELS = 512
EMBEDDING_CHANNELS = 192
CONTENT_CHANNELS = 384
CHARACTERS = 32

OTHER_SPEEDS = ", other speeds"
"""Ending of the name of a corpus that is another one, played slower and faster."""

Samples = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording of one speaker.

    Attributes:
        id: unique name.
        corpus: which data set it is from.
        split: ``train`` or ``dev``; no speaker is in both.
        speaker: name of the speaker, or "" where it is unknown.
        text: verbatim transcript in upper case, or "" where there is none.
        start: first hop in the flat arrays.
        hops: length in hops of 320 samples.
    """

    id: str
    corpus: str
    split: str
    speaker: str
    text: str
    start: int
    hops: int

    @property
    def recorded(self) -> bool:
        """Whether the voice is as it was recorded."""
        return not self.corpus.endswith(OTHER_SPEEDS)


def speech_activity(samples: Samples, *, bridge_hops: int = 12) -> NDArray[np.bool_]:
    """Marks the hops of a clean single-speaker recording that hold speech.  [N] → [N // 320].

    A hop speaks if its energy is within 32 dB of the loud hops and 9 dB above the quiet ones;
    pauses of up to ``bridge_hops`` (0.24 s) belong to the speech and bursts under 3 hops do not.
    """
    hops = len(samples) // HOP
    wave = samples[: hops * HOP].astype(np.float32).reshape(hops, HOP) / 32768
    wave = wave - wave.mean()
    level = 10 * np.log10((wave**2).mean(1) + 1e-10)
    level = np.convolve(np.pad(level, 1, mode="edge"), np.full(3, 1 / 3), mode="valid")
    loud, quiet = np.percentile(level, 92), np.percentile(level, 4)
    threshold = max(loud - 32, min(quiet + 9, loud - 12))
    active = level > threshold
    active = _close(active, bridge_hops)
    return ~_close(~active, 2)


def _close(mask: NDArray[np.bool_], longest: int) -> NDArray[np.bool_]:
    """Fills the inner runs of False of at most ``longest``."""
    closed = mask.copy()
    edges = np.flatnonzero(np.diff(mask.astype(np.int8)))
    for left, right in pairwise(edges.tolist()):
        if not mask[left + 1] and right - left <= longest:
            closed[left + 1 : right + 1] = True
    return closed


class Corpus:
    """The prepared data of a folder, memory-mapped.

    Attributes:
        utterances: all of them, in the order of the arrays.
        audio: int16 [hops, 320].
        activity: bool as uint8 [hops].
        voice: float16 [hops, 512], the teacher's channels before pooling, or None.
        embeddings: float32 [utterances, 192], the teacher's pooled embeddings, or None.
        content: float16 [hops, 384], the content teacher's encoder output, or None.
        characters: float16 [hops, 32], the reader's posteriors, or None.
        noises: int16 arrays.

    Raises:
        SystemExit: there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not (folder / "index.jsonl").exists():
            raise SystemExit(f"{folder}: no prepared data; python -m recipes.prepare makes it")
        lines = (folder / "index.jsonl").read_text().splitlines()
        self.utterances = [Utterance(**json.loads(line)) for line in lines]
        self.audio = np.memmap(folder / "audio.i16", np.int16, "r").reshape(-1, HOP)
        self.activity = np.memmap(folder / "activity.u8", np.uint8, "r")
        embeddings = folder / "embeddings.npy"
        self.voice = _rows(folder / "voice.f16", VOICE_CHANNELS)
        self.embeddings = np.load(embeddings) if embeddings.exists() else None
        self.content = _rows(folder / "content.f16", CONTENT_CHANNELS)
        self.characters = _rows(folder / "characters.f16", CHARACTERS)
        bounds = np.load(folder / "noise_bounds.npy")
        noise = np.memmap(folder / "noise.i16", np.int16, "r")
        self.noises: list[Samples] = [noise[a:b] for a, b in pairwise(bounds.tolist())]

    def expect(self, key: str, names: Iterable[str]) -> None:
        """Looks whether the corpora that a key of the settings names are there, for training.

        Raises:
            SystemExit: one is not.
        """
        present = sorted({item.corpus for item in self.utterances if item.split == "train"})
        for name in names:
            if name not in present:
                raise SystemExit(f"{key}: got {name!r}, but {self.folder} has {', '.join(present)}")

    def samples(self, index: int) -> Samples:
        """The whole utterance, int16 [hops · 320]."""
        item = self.utterances[index]
        return self.audio[item.start : item.start + item.hops].reshape(-1)

    def wave(self, index: int) -> NDArray[np.float32]:
        """The same in ±1."""
        return self.samples(index).astype(np.float32) / np.float32(32768)

    def of_one_length(self, indices: Iterable[int], hops: int = 24_000) -> Iterator[list[int]]:
        """Batches of utterances as long as each other, from the shortest on, of ``hops`` in all."""

        def length(index: int) -> int:
            return self.utterances[index].hops

        for each, group in groupby(sorted(indices, key=length), key=length):
            equal = list(group)
            size = max(1, hops // max(each, 1))
            yield from (equal[at : at + size] for at in range(0, len(equal), size))


def _rows(path: Path, channels: int) -> NDArray[np.float16] | None:
    return np.memmap(path, np.float16, "r").reshape(-1, channels) if path.exists() else None


@dataclass(slots=True)
class Writer:
    """Appends utterances to the flat arrays of ``folder``, which may hold some already."""

    folder: Path
    hops: int = 0
    corpora: set[str] = field(default_factory=set[str])

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        index = self.folder / "index.jsonl"
        if index.exists():
            found = [Utterance(**json.loads(line)) for line in index.read_text().splitlines()]
            self.hops = found[-1].start + found[-1].hops if found else 0
            self.corpora = {item.corpus for item in found}
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def add(self, record: dict[str, str], samples: Samples) -> None:
        """Appends one utterance; ``record`` holds id, corpus, split, speaker and text."""
        hops = len(samples) // HOP
        samples = samples[: hops * HOP]
        item = Utterance(**record, start=self.hops, hops=hops)  # pyright: ignore[reportArgumentType]
        with (self.folder / "audio.i16").open("ab") as file:
            file.write(samples.tobytes())
        with (self.folder / "activity.u8").open("ab") as file:
            file.write(speech_activity(samples).astype(np.uint8).tobytes())
        with (self.folder / "index.jsonl").open("a") as file:
            file.write(json.dumps(asdict(item)) + "\n")
        self.hops += hops


def decode(data: bytes) -> Samples:
    """Any file libsndfile reads → mono int16 at 16 kHz."""
    wave, rate = sf.read(BytesIO(data), dtype="float32", always_2d=True)
    mono = wave.mean(1)
    if rate != RATE:
        mono = soxr.resample(mono, rate, RATE)
    return np.clip(np.round(mono * 32768), -32768, 32767).astype(np.int16)


def read_tar(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yields (member name, content) of an archive of audio files."""
    with tarfile.open(path) as archive:
        for member in archive:
            file = archive.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read()


def write_noises(folder: Path, noises: Sequence[Samples]) -> None:
    """Stores the noises flat beside the speech; silence is dropped."""
    kept = [noise for noise in noises if np.abs(noise).max(initial=0) > 64]
    np.concatenate(kept).tofile(folder / "noise.i16")
    np.save(folder / "noise_bounds.npy", np.cumsum([0, *map(len, kept)]))
