import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from recipes.corpus import HOP, VOICE_CHANNELS, Corpus, Writer, write_noises
from recipes.simulate import Acoustics, Conversation
from recipes.student import Shape, Student

SPEAKERS = 4
UTTERANCES = 3

DRY = Acoustics(
    level_db=(-20, -20),
    speaker_level_db=0,
    noise=0,
    room_tone_snr_db=(120, 120),
    reverb=0,
    narrow_band=0,
)
"""Speech at one level, and nothing else."""

STYLE = Conversation(sources={"tones": 0.8, "nameless": 0.2})


def voiced(rng, pitch, hops):
    """A buzz of one pitch in the middle of silence, int16 [hops · 320]."""
    time = np.arange(hops * HOP) / 16_000
    wave = sum(np.sin(2 * np.pi * pitch * k * time + rng.uniform(0, 6)) / k for k in range(1, 9))
    wave *= 0.1 * (1 + 0.3 * rng.standard_normal(len(wave)))
    wave[: 20 * HOP] = wave[-20 * HOP :] = 0
    return (wave * 32767 / 4).astype(np.int16)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """A folder as stage 1 makes it: four voices of different pitch, three utterances each."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    with Writer(folder) as writer:
        for speaker in range(SPEAKERS):
            for number in range(UTTERANCES):
                record = {
                    "id": f"s{speaker}_{number}",
                    "corpus": "tones" if speaker < SPEAKERS - 1 else "nameless",
                    "split": "train",
                    "speaker": f"s{speaker}" if speaker < SPEAKERS - 1 else "",
                    "text": "A BUZZ" if speaker < SPEAKERS - 1 else "",
                }
                writer.add(record, voiced(rng, 90 + 60 * speaker, 110 + 30 * number))
    write_noises(folder, [(rng.standard_normal(8000) * 3000).astype(np.int16)])
    lines = [json.loads(line) for line in (folder / "index.jsonl").read_text().splitlines()]
    total = sum(line["hops"] for line in lines)
    prints = np.abs(rng.standard_normal((SPEAKERS, VOICE_CHANNELS)))
    rows = np.zeros((total, VOICE_CHANNELS), np.float16)
    for line in lines:
        own = prints[int(line["id"][1])]
        noise = 0.1 * rng.standard_normal((line["hops"], VOICE_CHANNELS))
        rows[line["start"] : line["start"] + line["hops"]] = np.maximum(own + noise, 0)
    rows.tofile(folder / "voice.f16")
    units = rng.standard_normal((SPEAKERS, 192)).astype(np.float32)
    np.save(folder / "embeddings.npy", np.repeat(units, UTTERANCES, axis=0))
    return folder


@pytest.fixture(scope="session")
def corpus(data):
    return Corpus(data)


@pytest.fixture(scope="session")
def dev(data):
    """The same voices as development speakers."""
    found = Corpus(data)
    found.utterances = [replace(item, split="dev") for item in found.utterances]
    return found


@pytest.fixture(scope="session")
def student():
    """Untrained, and small."""
    torch.manual_seed(0)
    shape = Shape(layers=1, width=32, heads=2, feed_forward=32, positions=4, position_groups=4)
    return Student(shape).eval()
