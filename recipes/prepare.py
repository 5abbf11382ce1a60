"""Stage 1: archives of Opus → memory-mapped audio, activity and teacher rows.

Decoding takes about a minute; the teacher about an hour of audio a minute on one core.
"""

import json
import time
from pathlib import Path

import numpy as np
import torch

from recipes.corpus import (
    EMBEDDING_CHANNELS,
    VOICE_CHANNELS,
    Corpus,
    Writer,
    read_tar,
    write_noises,
)
from recipes.settings import Settings, from_arguments
from recipes.teachers import Campplus


class Prepare(Settings):
    """Where the data is, where it goes, and the teacher's weights.

    Attributes:
        source: folder of the archives and manifests.
        target: work folder of the arrays.
        corpora: names of the archives, in order.
        noise: archive of noises.
        campplus: the teacher's state dict.
        bfloat16: run the teacher in bfloat16 (fast on machines with AMX).
        threads: compute threads.
    """

    source: Path
    target: Path
    corpora: list[str]
    noise: str
    campplus: Path
    bfloat16: bool = True
    threads: int = 1


def decode_corpora(settings: Prepare) -> None:
    """Writes audio, activity and the index of every corpus."""
    settings.target.mkdir(parents=True, exist_ok=True)
    with Writer(settings.target) as writer:
        for corpus in settings.corpora:
            lines = (settings.source / f"{corpus}.jsonl").read_text().splitlines()
            manifest = {entry["file"]: entry for entry in map(json.loads, lines)}
            for name, samples in read_tar(settings.source / f"{corpus}.tar"):
                entry = manifest[name]
                verbatim = "speaker" in entry  # a corpus without speakers has no verbatim text
                record = {
                    "id": entry["id"],
                    "corpus": corpus,
                    "split": entry["split"],
                    "speaker": entry.get("speaker") or "",
                    "text": (entry.get("text") or "").upper() if verbatim else "",
                }
                writer.add(record, samples)
            print(f"decoded {corpus}: {writer.hops / 180_000:.2f} h so far", flush=True)
    noises = [noise for _, noise in read_tar(settings.source / settings.noise)]
    write_noises(settings.target, noises)


def label(settings: Prepare) -> None:
    """Runs the teacher over every utterance; starts over where a run was cut."""
    corpus = Corpus(settings.target)
    dtype = torch.bfloat16 if settings.bfloat16 else torch.float32
    teacher = Campplus(settings.campplus, dtype)
    shape = (len(corpus.audio), VOICE_CHANNELS)
    rows = np.memmap(settings.target / "voice.partial", np.float16, "w+", shape=shape)
    embeddings = np.zeros((len(corpus.utterances), EMBEDDING_CHANNELS), np.float32)
    began, done = time.monotonic(), 0
    # by length: the teacher's kernels are compiled for each length they meet
    order = sorted(range(len(corpus.utterances)), key=lambda index: corpus.utterances[index].hops)
    for count, index in enumerate(order, start=1):
        item = corpus.utterances[index]
        wave = torch.from_numpy(corpus.wave(index))
        voice = teacher.voice(wave)
        embeddings[index] = teacher.embed(voice).numpy()
        # the teacher has one row less than hops at most: its last window needs 400 samples
        row = torch.cat([voice, voice[-1:].expand(item.hops - len(voice), -1)])
        rows[item.start : item.start + item.hops] = row.half().numpy()
        done += item.hops
        if count % 200 == 0:
            speed = done / 50 / (time.monotonic() - began)
            print(f"{count} utterances, {speed:.0f}× real time", flush=True)
    rows.flush()
    (settings.target / "voice.partial").rename(settings.target / "voice.f16")
    np.save(settings.target / "embeddings.npy", embeddings)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Prepare, "prepare", "decode the archives and run the teacher")
    torch.set_num_threads(settings.threads)
    if not (settings.target / "noise.i16").exists():
        decode_corpora(settings)
    if not (settings.target / "voice.f16").exists():
        label(settings)


if __name__ == "__main__":
    main()
