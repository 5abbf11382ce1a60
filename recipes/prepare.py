"""Stage 1: archives of Opus → memory-mapped audio, activity and teacher rows.

Decoding takes about a minute, each teacher a quarter of an hour on one core for ten hours, on a GPU
some seconds. A corpus that is added to the settings later is appended to the arrays, and labelled
where it is not yet.

A recording played faster or slower is that of another voice, and the teacher labels it as one: so
speakers become up to three times as many (Ko et al., "Audio augmentation for speech
recognition", Interspeech 2015; as speakers of their own: Yamamoto et al., "Speaker augmentation and
bandwidth extension for deep speaker embedding", Interspeech 2019).
"""

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soxr
import torch
from numpy.typing import NDArray

from recipes.corpus import (
    CONTENT_CHANNELS,
    EMBEDDING_CHANNELS,
    OTHER_SPEEDS,
    RATE,
    VOICE_CHANNELS,
    Corpus,
    Samples,
    Writer,
    decode,
    read_tar,
    write_noises,
)
from recipes.loop import device_of
from recipes.settings import Settings, from_arguments
from recipes.teachers import Campplus, StandIn, WhisperEncoder

B = TypeVar("B")


class Prepare(Settings):
    """Where the data is, where it goes, and the teachers' weights.

    Attributes:
        target: work folder of the arrays.
        corpora: archives without their ending; a manifest of the same name lies beside each. An
            entry without a ``speaker`` has no verbatim text either.
        other_speeds: corpora of known speakers whose training speakers are heard slower and faster
            as well, as two more speakers each, of the corpus ``NAME, other speeds``.
        slower, faster: where a speaker's two factors are drawn from.
        at_both: each utterance is heard at both, else half of them slower and half faster.
        noise: archive of noises.
        campplus: the voice teacher's state dict; none, and a stand-in of its shapes labels the
            audio, to try the recipes out.
        whisper: folder of the content teacher, in CTranslate2's format; none, and there is none.
        bfloat16: run the voice teacher in bfloat16.
        threads: compute threads.
        workers: processes that decode and resample; 0 does it in between.
        device: of the teachers: cpu, cuda, or auto.
    """

    target: Path
    corpora: list[Path]
    other_speeds: list[str] = []  # noqa: RUF012  (pydantic copies defaults)
    slower: tuple[float, float] = (0.82, 0.94)
    faster: tuple[float, float] = (1.07, 1.2)
    at_both: bool = False
    noise: Path
    campplus: Path | None
    whisper: Path | None = None
    bfloat16: bool = True
    threads: int = 1
    workers: int = 0
    device: str = "auto"


def side_by_side(settings: Prepare, work: Callable[..., B], *todo: Iterable[Any]) -> Iterator[B]:
    """``work`` of everything in its order, by the workers there are."""
    if not settings.workers:
        yield from map(work, *todo)
        return
    with ProcessPoolExecutor(settings.workers, get_context("spawn")) as pool:
        yield from pool.map(work, *todo, chunksize=16)


def decode_corpora(settings: Prepare) -> None:
    """Writes audio, activity and the index of every corpus that is not there yet."""
    with Writer(settings.target) as writer:
        for path in settings.corpora:
            if path.name in writer.corpora:
                continue
            lines = path.with_suffix(".jsonl").read_text().splitlines()
            manifest = {entry["file"]: entry for entry in map(json.loads, lines)}
            members = list(read_tar(path.with_suffix(".tar")))
            names = [name for name, _ in members]
            decoded = side_by_side(settings, decode, [data for _, data in members])
            for name, samples in zip(names, decoded, strict=True):
                entry = manifest[name]
                record = {
                    "id": entry["id"],
                    "corpus": path.name,
                    "split": entry["split"],
                    "speaker": entry.get("speaker") or "",
                    "text": (entry.get("text") or "").upper() if "speaker" in entry else "",
                }
                writer.add(record, samples)
            print(f"decoded {path.name}: {writer.hops / 180_000:.2f} h so far", flush=True)
    if not (settings.target / "noise.i16").exists():
        write_noises(settings.target, [decode(data) for _, data in read_tar(settings.noise)])


def at_speed(samples: Samples, factor: float) -> Samples:
    """Plays a recording ``factor`` times as fast, pitch and formants too.  [N] → [N / factor]"""
    wave = soxr.resample(samples.astype(np.float32), RATE * factor, RATE)
    return np.clip(np.round(wave), -32768, 32767).astype(np.int16)


def change_speeds(settings: Prepare) -> None:
    """Adds the corpora at other speeds that are not there yet.

    A speaker's factors are drawn from the name, so that they do not depend on who else is there.
    """
    corpus = Corpus(settings.target)
    with Writer(settings.target) as writer:
        for name in settings.other_speeds:
            added = name + OTHER_SPEEDS
            if added in writer.corpora:
                continue
            todo = [
                (index, _factor(settings, item.speaker, fast))
                for index, item in enumerate(corpus.utterances)
                if item.corpus == name and item.split == "train" and item.speaker
                for fast in ((0, 1) if settings.at_both else (index % 2,))
            ]
            heard = (np.array(corpus.samples(index)) for index, _ in todo)
            changed = side_by_side(settings, at_speed, heard, [factor for _, factor in todo])
            for (index, factor), samples in zip(todo, changed, strict=True):
                item = corpus.utterances[index]
                record = {
                    "id": f"{item.id} × {factor}",
                    "corpus": added,
                    "split": item.split,
                    "speaker": f"{item.speaker} × {factor}",
                    "text": item.text,
                }
                writer.add(record, samples)
            print(f"{added}: {writer.hops / 180_000:.2f} h so far", flush=True)


def _factor(settings: Prepare, speaker: str, fast: int) -> float:
    low, high = settings.faster if fast else settings.slower
    share = zlib.crc32(f"{speaker} {fast}".encode()) / 2**32
    return round(low + share * (high - low), 3)


def missing_rows(path: Path, corpus: Corpus, channels: int) -> tuple[NDArray[np.float16], int]:
    """Opens an array of rows with room for the whole corpus; gives it and the first hop to fill.

    A run that was cut has left ``.partial`` behind, which is begun again.
    """
    partial, done = path.with_suffix(".partial"), 0
    if path.exists():
        done = path.stat().st_size // (2 * channels)
        path.rename(partial)
    size = len(corpus.audio) * channels * 2
    with partial.open("r+b" if partial.exists() else "wb") as file:
        file.truncate(size)
    return np.memmap(partial, np.float16, "r+", shape=(len(corpus.audio), channels)), done


def label_voices(settings: Prepare) -> None:
    """Runs the voice teacher over every utterance that has no rows yet."""
    corpus = Corpus(settings.target)
    if corpus.voice is not None and len(corpus.voice) == len(corpus.audio):
        return
    dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
    weights, device = settings.campplus, device_of(settings.device)
    teacher = StandIn(device) if weights is None else Campplus(weights, dtype, device)
    embeddings = np.zeros((len(corpus.utterances), EMBEDDING_CHANNELS), np.float32)
    if corpus.voice is not None and corpus.embeddings is not None:
        embeddings[: len(corpus.embeddings)] = corpus.embeddings
    path = settings.target / "voice.f16"
    rows, done = missing_rows(path, corpus, VOICE_CHANNELS)
    progress = Progress("voices")
    todo = [index for index, item in enumerate(corpus.utterances) if item.start >= done]
    for indices in corpus.of_one_length(todo):
        waves = np.stack([corpus.wave(index) for index in indices])
        voices = teacher.voices(torch.from_numpy(waves).to(device))
        embeddings[indices] = teacher.embeds(voices).cpu().numpy()
        hops = corpus.utterances[indices[0]].hops
        # the teacher has one row less than hops at most: its last window needs 400 samples
        voices = torch.cat([voices, voices[:, -1:].expand(-1, hops - voices.shape[1], -1)], 1)
        for index, voice in zip(indices, voices.half().cpu().numpy(), strict=True):
            start = corpus.utterances[index].start
            rows[start : start + hops] = voice
        progress(hops * len(indices))
    rows.flush()
    np.save(settings.target / "embeddings.npy", embeddings)
    path.with_suffix(".partial").rename(path)


def label_content(settings: Prepare) -> None:
    """Runs the content teacher over every utterance that has no rows yet, many in a window."""
    corpus = Corpus(settings.target)
    if settings.whisper is None:
        return
    if corpus.content is not None and len(corpus.content) == len(corpus.audio):
        return
    teacher = WhisperEncoder(settings.whisper, device_of(settings.device))
    path = settings.target / "content.f16"
    rows, done = missing_rows(path, corpus, CONTENT_CHANNELS)
    progress = Progress("content")
    todo = [index for index, item in enumerate(corpus.utterances) if item.start >= done]
    for packed in pack([corpus.utterances[index].hops for index in todo], teacher.hops):
        waves = [corpus.wave(todo[i]) for i in packed]
        for i, row in zip(packed, teacher.rows(waves), strict=True):
            start = corpus.utterances[todo[i]].start
            rows[start : start + len(row)] = row
        progress(sum(corpus.utterances[todo[i]].hops for i in packed))
    rows.flush()
    path.with_suffix(".partial").rename(path)


def pack(lengths: Sequence[int], room: int, gap: int = 10) -> list[list[int]]:
    """Fills windows of ``room`` hops with utterances in order, ``gap`` hops apart.

    An utterance longer than a window has one of its own; its end is cut by the teacher.
    """
    windows: list[list[int]] = []
    used = room
    for index, length in enumerate(lengths):
        if used + length > room:
            windows.append([])
            used = 0
        windows[-1].append(index)
        used += length + gap
    return windows


class Progress:
    """Prints how far a teacher is, every ten minutes of audio."""

    def __init__(self, name: str) -> None:
        self.name, self.done, self.began = name, 0, time.monotonic()

    def __call__(self, hops: int) -> None:
        """Counts ``hops`` more."""
        before, self.done = self.done, self.done + hops
        if self.done // 30_000 > before // 30_000:
            speed = self.done / 50 / (time.monotonic() - self.began)
            print(f"{self.name}: {self.done / 3000:.0f} min, {speed:.0f}× real time", flush=True)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Prepare, "prepare", "decode the archives and run the teachers")
    torch.set_num_threads(settings.threads)
    stages: list[Callable[[Prepare], None]] = [
        decode_corpora,
        change_speeds,
        label_content,
        label_voices,
    ]
    for stage in stages:
        stage(settings)


if __name__ == "__main__":
    main()
