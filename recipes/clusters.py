"""Cluster targets of pre-training: k-means over cepstra, as HuBERT's first iteration has them.

Source: HuBERT (arXiv 2106.07447), section IV-B: 39 MFCC features, k-means. Here 13 cepstra of the
80 log-mel energies with their first and second differences, at the student's 50 frames a second.
"""

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from recipes.corpus import HOP, Corpus
from recipes.teachers import filterbank, mel_filters

CEPSTRA = 13


def cepstra(wave: Tensor, filters: Tensor, frames: int) -> Tensor:
    """Cepstra and their differences, two windows a frame.  wave: [N] → [frames, 39]"""
    if len(wave) < 2 * HOP:
        return torch.zeros(frames, 3 * CEPSTRA)
    energies = filterbank(wave, filters)
    bins = energies.shape[1]
    angle = torch.arange(CEPSTRA)[:, None] * (torch.arange(bins) + 0.5) * torch.pi / bins
    x = energies @ angle.cos().T / bins**0.5
    x = x[: len(x) // 2 * 2].view(-1, 2, CEPSTRA).mean(1)
    x = torch.cat([x, x[-1:].expand(max(frames - len(x), 0), -1)])[:frames]
    first = torch.gradient(x, dim=0)[0] if len(x) > 1 else torch.zeros_like(x)
    second = torch.gradient(first, dim=0)[0] if len(x) > 1 else torch.zeros_like(x)
    return torch.cat([x, first, second], 1)


def k_means(points: Tensor, count: int, rounds: int, seed: int) -> Tensor:
    """Lloyd's algorithm from points drawn by k-means++.  points: [N, D] → centres [count, D]

    A centre that loses all its points moves to the point farthest from its own.
    """
    generator = torch.Generator().manual_seed(seed)
    first = int(torch.randint(len(points), (), generator=generator))
    centres = [points[first]]
    distance = ((points - centres[0]) ** 2).sum(1)
    for _ in range(count - 1):
        chosen = int(torch.multinomial(distance.clamp(min=1e-12), 1, generator=generator))
        centres.append(points[chosen])
        distance = torch.minimum(distance, ((points - points[chosen]) ** 2).sum(1))
    found = torch.stack(centres)
    for _ in range(rounds):
        distances = torch.cdist(points, found)
        nearest = distances.argmin(1)
        sums = torch.zeros_like(found).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)
        found = sums / sizes.clamp(min=1)[:, None]
        for empty in torch.nonzero(sizes == 0).flatten().tolist():
            farthest = int(distances.min(1).values.argmax())
            found[empty] = points[farthest]
            distances[farthest] = 0
    return found


def cluster(corpus: Corpus, folder: Path, count: int, seed: int) -> NDArray[np.int16]:
    """Cluster of every hop of the corpus, computed once.  → int16 [hops]"""
    path = folder / f"clusters-{count}.i16"
    hops = len(corpus.audio)
    if not path.exists() or path.stat().st_size != 2 * hops:
        filters = mel_filters()
        features = np.zeros((hops, 3 * CEPSTRA), np.float16)
        for index, item in enumerate(corpus.utterances):
            rows = cepstra(torch.from_numpy(corpus.wave(index)), filters, item.hops)
            features[item.start : item.start + item.hops] = rows.half().numpy()
        train = np.concatenate(
            [np.arange(i.start, i.start + i.hops) for i in corpus.utterances if i.split == "train"]
        )
        sample = np.random.default_rng(seed).choice(train, min(len(train), 50_000), replace=False)
        points = torch.from_numpy(features[np.sort(sample)]).float()
        mean, deviation = points.mean(0), points.std(0) + 1e-3
        centres = k_means((points - mean) / deviation, count, 20, seed)
        labels = np.zeros(hops, np.int16)
        for at in range(0, hops, 100_000):
            part = torch.from_numpy(features[at : at + 100_000]).float()
            nearest = torch.cdist((part - mean) / deviation, centres).argmin(1)
            labels[at : at + 100_000] = nearest.short().numpy()
        labels.tofile(path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return np.memmap(path, np.int16, "r")
