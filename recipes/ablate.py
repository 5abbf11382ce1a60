"""Do the paper's two additions help at this size? Short pre-trainings and the same probes.

With and without the utterance-wise contrastive loss, with and without utterance mixing: one budget,
one seed, one order of data. The encoder is then frozen, and two small probes read a learnt weighted
sum of its layers, as SUPERB's do (arXiv 2105.01051):

- speaker: mean and deviation over time, one linear layer, additive-margin softmax over the
  training speakers; equal error rate over all pairs of utterances of the development speakers;
- diarization: one bidirectional LSTM and three outputs under permutation-invariant loss; frame
  error (missed, false, confused) on simulated conversations of the development speakers.

An arm that was finished is not run again; the table is written after each.
"""

import json
import statistics
import time
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.encoder import UniSpeechSatModel
from recipes.corpus import HOP, Corpus
from recipes.objectives import pit_loss
from recipes.pretrain import Pretrain, pretrain
from recipes.settings import Settings, from_arguments
from recipes.simulate import LOCAL_SPEAKERS, Acoustics, Conversation, Simulator
from recipes.teachers import equal_error_rate


class Ablate(Settings):
    """What is compared.

    Attributes:
        pretraining: settings that all arms share.
        report: JSON file of the results.
        table: markdown file of the table.
        utterances: of each speaker, for the speaker probe.
        scenes: simulated conversations, to train the diarization probe and to measure it.
        scene_hops: length of a scene.
        probe_seeds: runs of each probe; the table has their mean and spread.
        probe_steps: steps of the speaker probe and of the diarization probe.
    """

    pretraining: Pretrain
    report: Path
    table: Path
    utterances: int = 6
    scenes: tuple[int, int] = (200, 80)
    scene_hops: int = 400
    probe_seeds: int = 3
    probe_steps: tuple[int, int] = (400, 200)


ARMS = {
    "masked prediction alone": {"contrastive": False, "mixing": 0.0},
    "+ contrastive": {"contrastive": True, "mixing": 0.0},
    "+ mixing": {"contrastive": False, "mixing": 0.2},
    "+ contrastive + mixing": {"contrastive": True, "mixing": 0.2},
    "+ contrastive at a tenth of the weight": {
        "contrastive": True,
        "contrastive_weight": 0.1,
        "mixing": 0.0,
    },
}
"""The arms by name, and what each changes."""


@torch.inference_mode()
def layers_of(encoder: UniSpeechSatModel, wave: Tensor) -> Tensor:
    """All hidden states.  wave: [B, N] → [B, L + 1, T, D]"""
    with torch.autocast("cpu", torch.bfloat16):
        return torch.stack(encoder(wave, output_hidden_states=True).hidden_states, 1).float()


class SpeakerProbe(nn.Module):
    """Weighted means and deviations of the layers → a unit embedding.  [B, L, 2, D] → [B, 128]"""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.norm = nn.BatchNorm1d(2 * width, affine=False)
        self.embed = nn.Linear(2 * width, 128)

    def forward(self, pooled: Tensor) -> Tensor:
        """See the class."""
        x = torch.einsum("l,blsd->bsd", self.weights.softmax(0), pooled).flatten(1)
        return F.normalize(self.embed(self.norm(x)), dim=1)


def speaker_error(encoder: UniSpeechSatModel, corpus: Corpus, settings: Ablate) -> list[float]:
    """Equal error rate of the speaker probe in per cent, a seed each."""
    rng = np.random.default_rng(0)
    by_speaker: dict[str, list[int]] = {}
    for index, item in enumerate(corpus.utterances):
        if item.speaker and item.hops >= 60:
            by_speaker.setdefault(item.speaker, []).append(index)
    pooled: dict[str, list[Tensor]] = {"train": [], "dev": []}
    names: dict[str, list[str]] = {"train": [], "dev": []}
    for speaker, indices in sorted(by_speaker.items()):
        split = corpus.utterances[indices[0]].split
        few = settings.utterances if split == "train" else len(indices)
        for index in rng.permutation(indices)[:few].tolist():
            # few lengths: kernels are compiled for each
            hops = min(corpus.utterances[index].hops // 50 * 50, 300)
            wave = torch.from_numpy(corpus.wave(index))[None, : HOP * hops]
            states = layers_of(encoder, wave * (0.05 / (wave.std() + 1e-4)))[0]
            pooled[split].append(torch.stack([states.mean(1), states.std(1)], 1))
            names[split].append(speaker)
    known = sorted(set(names["train"]))
    train, dev = torch.stack(pooled["train"]), torch.stack(pooled["dev"])
    label = torch.tensor([known.index(name) for name in names["train"]])
    person = torch.tensor([sorted(set(names["dev"])).index(name) for name in names["dev"]])
    left, right = torch.triu_indices(len(dev), len(dev), 1)
    found: list[float] = []
    for seed in range(settings.probe_seeds):
        torch.manual_seed(seed)
        probe = SpeakerProbe(train.shape[1], train.shape[-1])
        centres = nn.Parameter(F.normalize(torch.randn(len(known), 128), dim=1))
        optimizer = torch.optim.AdamW([*probe.parameters(), centres], 3e-3, weight_decay=1e-3)
        steps = settings.probe_steps[0]
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - step / steps)
            rows = torch.randint(len(train), (256,))
            cosine = probe(train[rows]) @ F.normalize(centres, dim=1).T
            margin = 0.2 * F.one_hot(label[rows], len(known))
            loss = F.cross_entropy((cosine - margin) * 20, label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probe.eval()
        with torch.inference_mode():
            unit = probe(dev)
        scores = (unit @ unit.T)[left, right]
        found.append(100 * equal_error_rate(scores, person[left] == person[right]))
    return found


class FrameProbe(nn.Module):
    """A weighted sum of the layers and one LSTM.  [B, L, T, D] → logits [B, T, 3]"""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.zeros(layers))
        self.norm = nn.LayerNorm(width)
        self.lstm = nn.LSTM(width, 96, bidirectional=True, batch_first=True)
        self.out = nn.Linear(192, LOCAL_SPEAKERS)

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        x = torch.einsum("l,bltd->btd", self.weights.softmax(0), states)
        return self.out(self.lstm(self.norm(x))[0])


def frame_error(logits: Tensor, target: Tensor) -> tuple[float, float]:
    """Wrong speaker-frames of the best assignment, and spoken ones.  [T, S] twice"""
    said = logits > 0
    errors = [
        float(
            torch.maximum(said.sum(1), target.sum(1)).sum() - (said[:, list(order)] & target).sum()
        )
        for order in permutations(range(target.shape[1]))
    ]
    return min(errors), float(target.sum())


def diarization_error(encoder: UniSpeechSatModel, corpus: Corpus, settings: Ablate) -> list[float]:
    """Local frame error of the diarization probe in per cent, a seed each."""
    states: dict[str, Tensor] = {}
    targets: dict[str, Tensor] = {}
    for split, count in zip(("train", "dev"), settings.scenes, strict=True):
        sources = {"speechocean762": 0.5, "librispeech": 0.5} if split == "train" else {}
        present = sorted({item.corpus for item in corpus.utterances if item.split == split})
        sources = {k: v for k, v in sources.items() if k in present} or dict.fromkeys(present, 1.0)
        style = Conversation(speakers=(0.0, 0.6, 0.4), sources=sources)
        acoustics = Acoustics(level_db=(-35, -20), noise_snr_db=(10, 30), narrow_band=0)
        simulator = Simulator(corpus, acoustics, style, split=split)
        heard: list[Tensor] = []
        spoken: list[Tensor] = []
        for number in range(count):
            scene = simulator.talk(np.random.default_rng([7, number]), settings.scene_hops)
            heard.append(layers_of(encoder, torch.from_numpy(scene.wave)[None])[0].half())
            spoken.append(torch.from_numpy(scene.activity)[: heard[-1].shape[1]])
        states[split], targets[split] = torch.stack(heard), torch.stack(spoken)
    found: list[float] = []
    for seed in range(settings.probe_seeds):
        torch.manual_seed(seed)
        probe = FrameProbe(states["train"].shape[1], states["train"].shape[-1])
        optimizer = torch.optim.AdamW(probe.parameters(), 2e-3, weight_decay=1e-3)
        steps = settings.probe_steps[1]
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * (1 - step / steps)
            rows = torch.randint(len(states["train"]), (16,))
            logits = probe(states["train"][rows].float())
            loss = pit_loss(logits, targets["train"][rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            optimizer.step()
        with torch.inference_mode():
            logits = torch.cat([probe(part.float()) for part in states["dev"].split(16)])
        pairs = [frame_error(*pair) for pair in zip(logits, targets["dev"], strict=True)]
        found.append(100 * sum(wrong for wrong, _ in pairs) / sum(total for _, total in pairs))
    return found


def measure(name: str, settings: Ablate) -> dict[str, Any]:
    """Pre-trains one arm and probes it."""
    began = time.monotonic()
    shared = settings.pretraining
    changes = ARMS[name] | {"run": shared.run / name.replace(" ", "-").replace("+", "with")}
    run = pretrain(shared.model_copy(update=changes))
    if run.step < shared.steps:
        raise SystemExit(f"stopped in the arm {name!r}; run it again to go on")
    encoder = run.model.unispeech_sat.eval().cpu()
    encoder.config.apply_spec_augment = False
    result = {
        "EER": speaker_error(encoder, run.corpus, settings),
        "DER": diarization_error(encoder, run.corpus, settings),
        "minutes": (time.monotonic() - began) / 60,
    }
    return {k: [round(x, 2) for x in v] if isinstance(v, list) else v for k, v in result.items()}


def table(report: dict[str, Any], settings: Ablate) -> str:
    """The results in markdown, means of the probes' seeds ± their standard deviation."""

    def cell(values: list[float]) -> str:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return f"{statistics.mean(values):.2f} ± {spread:.2f}"

    s = settings.pretraining
    lines = [
        "# The paper's two additions at this size",
        "",
        "`python -m recipes.ablate`: pre-trainings of the embedded checkpoint's encoder by "
        f"`recipes.pretrain`, {s.steps} steps of {s.batch_hops / 50:.0f} s of audio each, seed "
        f"{s.seed}, the same data in the same order; then the same two probes on the frozen "
        f"encoder, {settings.probe_seeds} seeds each (mean ± standard deviation over the probe's "
        "seeds; the pre-training itself was run once, so differences near the spread say nothing).",
        "",
        "| pre-training | EER, development speakers, % | local diarization error, % |",
        "|---|---|---|",
        *(
            f"| {name} | {cell(report[name]['EER'])} | {cell(report[name]['DER'])} |"
            for name in [*ARMS, UNTRAINED]
            if name in report
        ),
        "",
    ]
    return "\n".join(lines)


UNTRAINED = "no pre-training (Gabor front end, random layers)"
"""What the probes make of an encoder that has learnt nothing."""


def untrained(settings: Ablate) -> dict[str, Any]:
    """The probes on the encoder as it starts."""
    shared = settings.pretraining
    run = pretrain(shared.model_copy(update={"steps": 0, "run": shared.run / "untrained"}))
    encoder = run.model.unispeech_sat.eval().cpu()
    encoder.config.apply_spec_augment = False
    return {
        "EER": [round(x, 2) for x in speaker_error(encoder, run.corpus, settings)],
        "DER": [round(x, 2) for x in diarization_error(encoder, run.corpus, settings)],
    }


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Ablate, "ablate", "compare pre-trainings")
    report: dict[str, Any] = {}
    if settings.report.exists():
        report = json.loads(settings.report.read_text())
    for name in [UNTRAINED, *ARMS]:
        if name not in report:
            report[name] = untrained(settings) if name == UNTRAINED else measure(name, settings)
            settings.report.parent.mkdir(parents=True, exist_ok=True)
            settings.report.write_text(json.dumps(report, indent=2) + "\n")
        print(name, report[name], flush=True)
        text = table(report, settings)
        conclusion = ""
        if settings.table.exists():  # what was concluded by hand stays
            conclusion = settings.table.read_text().partition("\n## ")[2]
        settings.table.write_text(text + (f"\n## {conclusion}" if conclusion else ""))


if __name__ == "__main__":
    main()
