"""Stage 1b: a reader of the content teacher's rows, which says the characters frame by frame.

Whisper's encoder knows what is said, its decoder spells it; we want characters every 20 ms. A small
network on the teacher's rows learns them from the verbatim texts by CTC, and then writes its
posteriors for every utterance, those without a text too. The student imitates them frame by frame:
it need not find the alignment, which is what keeps CTC on a plateau when it starts from nothing.
"""

import random
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.corpus import CHARACTERS, CONTENT_CHANNELS, Corpus
from recipes.loop import device_of
from recipes.objectives import ctc_loss, edit_distance, encode
from recipes.settings import Settings, from_arguments
from recipes.student import VOCABULARY


class Read(Settings):
    """How the reader is trained.

    Attributes:
        data: folder of stage 1, where the posteriors go, too.
        weights: file of the reader; trained where it does not exist.
        width: of its layers.
        epochs: passes over the texts.
        batch: utterances a step, of about one length.
        rate: highest learning rate.
        dropout: of inputs and layers.
        longest_hops: longer utterances are left out of the training.
        seed: of everything.
        threads: compute threads.
        device: cpu, cuda, or auto.
    """

    data: Path
    weights: Path
    width: int = 320
    epochs: int = 6
    batch: int = 24
    rate: float = 1.5e-3
    dropout: float = 0.15
    longest_hops: int = 900
    seed: int = 0
    threads: int = 1
    device: str = "auto"


class Reader(nn.Module):
    """A projection and two residual convolutions of five frames.  [B, T, 384] → [B, T, 32]."""

    def __init__(self, mean: Tensor, deviation: Tensor, width: int, dropout: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.project = nn.Linear(CONTENT_CHANNELS, width)
        self.convolve = nn.ModuleList(nn.Conv1d(width, width, 5, padding=2) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.out = nn.Linear(width, CHARACTERS)
        self.dropout = nn.Dropout(dropout)
        with torch.no_grad():
            self.out.bias[0] = 2.0  # most frames are blank

    def forward(self, rows: Tensor) -> Tensor:
        """rows: [B, T, 384] → logits [B, T, 32]"""
        x = F.gelu(self.project(self.dropout((rows.float() - self.mean) / self.deviation)))
        for conv, norm in zip(self.convolve, self.norms, strict=True):
            x = norm(x + self.dropout(F.gelu(conv(x.transpose(1, 2)).transpose(1, 2))))
        return self.out(x)


def content_statistics(corpus: Corpus) -> tuple[Tensor, Tensor]:
    """Mean and deviation of the content teacher's channels, with a floor. → [384] twice"""
    assert corpus.content is not None, "run recipes.prepare first: the content rows are missing"
    rows = np.array(corpus.content[:: max(1, len(corpus.content) // 10_000)], np.float32)
    deviation = rows.std(0)
    floor = np.maximum(deviation, 0.25 * np.median(deviation))
    return torch.from_numpy(rows.mean(0)), torch.from_numpy(floor)


def rows_of(corpus: Corpus, indices: Sequence[int]) -> Tensor:
    """The content rows of utterances, padded to the longest.  → [B, T, 384] float16"""
    assert corpus.content is not None
    items = [corpus.utterances[index] for index in indices]
    rows = np.zeros((len(items), max(item.hops for item in items), CONTENT_CHANNELS), np.float16)
    for row, item in zip(rows, items, strict=True):
        row[: item.hops] = corpus.content[item.start : item.start + item.hops]
    return torch.from_numpy(rows)


@torch.inference_mode()
def error(reader: Reader, corpus: Corpus) -> float:
    """Greedy character error rate on the development texts, in per cent."""
    reader.eval()
    device = reader.out.weight.device
    wrong = total = 0
    for index, item in enumerate(corpus.utterances):
        if item.split != "dev" or not item.text:
            continue
        best = reader(rows_of(corpus, [index]).to(device))[0].argmax(-1)
        said = [i for i, _ in groupby(best.tolist()) if i > VOCABULARY.index("<unk>")]
        meant = encode(item.text).tolist()
        wrong += edit_distance(said, meant)
        total += len(meant)
    reader.train()
    return 100 * wrong / max(total, 1)


def train(reader: Reader, corpus: Corpus, settings: Read) -> None:
    """Learns the characters of the training texts."""
    usable = [
        index
        for index, item in enumerate(corpus.utterances)
        if item.text
        and item.split == "train"
        and 1.15 * len(item.text) < item.hops < settings.longest_hops
    ]
    usable.sort(key=lambda index: corpus.utterances[index].hops)
    batches = [usable[at : at + settings.batch] for at in range(0, len(usable), settings.batch)]
    order = random.Random(settings.seed)
    optimizer = torch.optim.AdamW(reader.parameters(), settings.rate, weight_decay=0.02)
    device = reader.out.weight.device
    steps, step, began = settings.epochs * len(batches), 0, time.monotonic()
    for epoch in range(settings.epochs):
        order.shuffle(batches)
        for indices in batches:
            rise, fall = min(1.0, (step + 1) / 100), max(0.02, 1 - step / steps)
            for group in optimizer.param_groups:
                group["lr"] = settings.rate * rise * fall
            with torch.autocast(device.type, torch.bfloat16):
                logits = reader(rows_of(corpus, indices).to(device))
            lengths = torch.tensor([corpus.utterances[index].hops for index in indices])
            texts = [corpus.utterances[index].text for index in indices]
            loss = ctc_loss(logits, texts, lengths)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(reader.parameters(), 5.0)
            optimizer.step()
            step += 1
        seconds = time.monotonic() - began
        print(f"epoch {epoch + 1}: CER {error(reader, corpus):.1f} %, {seconds:.0f} s", flush=True)


@torch.inference_mode()
def write(reader: Reader, corpus: Corpus, folder: Path) -> None:
    """Writes the posteriors of every frame: ``characters.f16``, [hops, 32]."""
    assert corpus.content is not None
    reader.eval()
    device = reader.out.weight.device
    path = folder / "characters.f16"
    shape = (len(corpus.content), CHARACTERS)
    rows = np.memmap(path.with_suffix(".partial"), np.float16, "w+", shape=shape)
    for indices in corpus.of_one_length(range(len(corpus.utterances))):
        posteriors = reader(rows_of(corpus, indices).to(device)).softmax(-1).half().cpu().numpy()
        for index, posterior in zip(indices, posteriors, strict=True):
            item = corpus.utterances[index]
            rows[item.start : item.start + item.hops] = posterior
    rows.flush()
    path.with_suffix(".partial").rename(path)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Read, "reader", "learn to read the content teacher's rows")
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    corpus = Corpus(settings.data)
    reader = Reader(*content_statistics(corpus), settings.width, settings.dropout)
    if settings.weights.exists():
        reader.load_state_dict(torch.load(settings.weights, weights_only=True))
    else:
        train(reader.to(device_of(settings.device)), corpus, settings)
        settings.weights.parent.mkdir(parents=True, exist_ok=True)
        torch.save(reader.state_dict(), settings.weights)
    write(reader.to(device_of(settings.device)), corpus, settings.data)


if __name__ == "__main__":
    main()
