"""Self-supervised pre-training by the paper's objective, at the embedded checkpoint's shape.

Masked prediction of cluster targets, the utterance-wise contrastive loss, and utterance mixing:
UniSpeech-SAT (arXiv 2110.05752), sections 3.1 and 3.2, through `UniSpeechSatForPreTraining`. Each
part has a switch, which is what the ablation turns.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from model.pretraining import UniSpeechSatForPreTraining, mix_utterances
from recipes.clusters import cluster
from recipes.corpus import HOP, Corpus
from recipes.gabor import gabor_filters
from recipes.loop import World, average_gradients, device_of, ramp, train, world
from recipes.settings import Settings, from_arguments
from recipes.student import Shape


class Pretrain(Settings):
    """Settings of pre-training.

    Attributes:
        data: folder of stage 1.
        run: folder of the checkpoint and the log.
        seed: of everything.
        steps: length of the run.
        decay_steps: the learning rate falls to nothing over the last ones.
        warm_up_steps: and rises over the first ones.
        rate: learning rate in between.
        weight_decay: of matrices.
        clusters: how many cluster targets there are.
        hops: length of a piece of an utterance.
        batch_hops: audio in a batch of one process.
        sources: probability of each corpus to give an utterance.
        contrastive: with the utterance-wise contrastive loss and its quantiser.
        contrastive_weight: of that loss and the diversity term; 1 is the paper's.
        mixing: share of utterances another one is mixed into; 0 is without.
        mask_prob: share of frames at which a masked span of ten would begin, times ten.
        temperature: Gumbel temperature at the first and at the last step.
        device: cpu, cuda, or auto.
        save_s: seconds between checkpoints.
        log_steps: steps between lines of the log.
        bfloat16: autocast to bfloat16.
        threads: compute threads.
    """

    data: Path
    run: Path
    seed: int = 1
    steps: int
    decay_steps: int
    warm_up_steps: int = 100
    rate: float = 1.0e-3
    weight_decay: float = 0.01
    clusters: int = 100
    hops: int = 200
    batch_hops: int = 2400
    sources: dict[str, float]
    contrastive: bool = True
    contrastive_weight: float = 1.0
    mixing: float = 0.2
    mask_prob: float = 0.65
    temperature: tuple[float, float] = (2.0, 0.5)
    device: str = "auto"
    save_s: float = 120
    log_steps: int = 20
    bfloat16: bool = True
    threads: int = 1
    shape: Shape = Shape()


class Pretraining:
    """A run of pre-training, see `recipes.loop.Trainable`."""

    def __init__(self, settings: Pretrain, who: World) -> None:
        self.settings, self.who = settings, who
        self.device = device_of(settings.device)
        torch.manual_seed(settings.seed)
        self.corpus = Corpus(settings.data)
        self.corpus.expect("sources", settings.sources)
        self.labels = cluster(self.corpus, settings.data, settings.clusters, settings.seed)
        config = settings.shape.config(
            num_clusters=settings.clusters,
            mask_time_prob=settings.mask_prob,
            codevector_dim=128,
            proj_codevector_dim=128,
            num_codevectors_per_group=64,
        )
        config.apply_spec_augment = True
        self.model = UniSpeechSatForPreTraining(config)
        first = self.model.unispeech_sat.feature_extractor.conv_layers[0]
        with torch.no_grad():
            first.conv.weight.copy_(  # pyright: ignore[reportAttributeAccessIssue]
                gabor_filters(settings.shape.conv_dim[0], settings.shape.conv_kernel[0])
            )
            # The published start gives logits whose softmax is all but one-hot: the diversity loss
            # then has no gradient, and the book stays with the few entries it began with.
            self.model.quantizer.weight_proj.weight.mul_(settings.shape.width**-0.5)
        self.model.to(self.device)
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": decayed, "weight_decay": settings.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self.step = 0
        usable = [
            index
            for index, item in enumerate(self.corpus.utterances)
            if item.split == "train" and item.hops >= 50
        ]
        self.by_corpus = {
            name: np.array([i for i in usable if self.corpus.utterances[i].corpus == name])
            for name in settings.sources
        }

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.settings.steps

    def batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Pieces of utterances and their clusters, drawn from (seed, step, rank).

        → [B, N], [B, T]; −1 where an utterance shorter than the piece has ended
        """
        s = self.settings
        rng = np.random.default_rng([s.seed, self.step, self.who.rank])
        frames = int(s.shape.config().frames(s.hops * HOP))
        names, shares = list(s.sources), np.array(list(s.sources.values()))
        rows = max(2, s.batch_hops // s.hops)
        waves = np.zeros((rows, s.hops * HOP), np.float32)
        labels = np.full((rows, frames), -1, np.int64)
        for row in range(rows):
            name = names[int(rng.choice(len(names), p=shares / shares.sum()))]
            item = self.corpus.utterances[int(rng.choice(self.by_corpus[name]))]
            start = item.start + int(rng.integers(max(item.hops - s.hops, 0) + 1))
            length = min(s.hops, item.hops)
            piece = self.corpus.audio[start : start + length].reshape(-1).astype(np.float32)
            level = 10 ** (rng.uniform(-40, -16) / 20)
            waves[row, : len(piece)] = piece * (level / (np.sqrt((piece**2).mean()) + 1e-3))
            known = min(length, frames)
            labels[row, :known] = self.labels[start : start + known]
        return torch.from_numpy(waves), torch.from_numpy(labels)

    def advance(self) -> dict[str, float]:
        """One step on this process's batch, averaged over all of them."""
        s = self.settings
        # masks, negatives and mixing: another draw on every process
        torch.manual_seed((s.seed * 1_000_003 + self.step) * 4099 + self.who.rank)
        self.model.train()
        high, low = s.temperature
        self.model.set_gumbel_temperature(high * (low / high) ** (self.step / max(s.steps, 1)))
        waves, labels = self.batch()
        if s.mixing:
            waves = mix_utterances(waves, prob=s.mixing)
        waves, labels = waves.to(self.device), labels.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bfloat16):
            output = self.model(waves, labels=labels)
        loss = output.prediction_loss
        if s.contrastive:
            loss = loss + s.contrastive_weight * (output.loss - output.prediction_loss)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.model.parameters())
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), 1.0))
        share = ramp(self.step, s.steps, s.warm_up_steps, s.decay_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = s.rate * share
        if np.isfinite(norm):
            self.optimizer.step()
        self.step += 1
        masked = output.mask_time_indices & (labels >= 0)
        hit = (output.logits.argmax(-1) == labels)[masked].float().mean()
        return {
            "loss": float(loss.detach()),
            "prediction": float(output.prediction_loss.detach()),
            "contrastive": float(output.contrastive_loss.detach()),
            "perplexity": float(output.codevector_perplexity.detach()),
            "accuracy": float(hit),
            "norm": norm,
        }

    def state(self) -> dict[str, Any]:
        """See `recipes.loop.Trainable.state`."""
        return {
            "shape": self.settings.shape.model_dump(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """See `recipes.loop.Trainable.load`."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def pretrain(settings: Pretrain) -> Pretraining:
    """Runs the stage to its end, or until it is told to stop."""
    torch.set_num_threads(settings.threads)
    with world(device_of(settings.device)) as who:
        run = Pretraining(settings, who)
        train(
            run,
            settings.run,
            name="pretrain",
            save_s=settings.save_s,
            log_steps=settings.log_steps,
            who=who,
        )
    return run


def main() -> None:
    """Command line of the stage."""
    pretrain(from_arguments(Pretrain, "pretrain", "pre-train the encoder"))


if __name__ == "__main__":
    main()
