"""Stage 2: the joint run. One encoder, three heads, every loss in every step.

A step is two batches: whole utterances (speaker, text, activity) and simulated conversations
(speaker, activity). Everything a step uses is drawn from (seed, step), so a run that was cut and
resumed makes the same steps as one that was not.
"""

import math
import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, fields
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from model.state import Window
from recipes.corpus import CONTENT_CHANNELS, EMBEDDING_CHANNELS, HOP, Corpus
from recipes.export import load_student
from recipes.grow import start_from
from recipes.loop import ALONE, World, average_gradients, device_of, ramp, train, world
from recipes.mixing import Mixer
from recipes.objectives import (
    VoiceTargets,
    ctc_loss,
    hint_loss,
    pit_loss,
    presence_loss,
    reading_loss,
    softened,
)
from recipes.reader import content_statistics
from recipes.rooms import load as load_rooms
from recipes.settings import Settings, from_arguments, override
from recipes.simulate import Acoustics, Conversation, Scene, Simulator
from recipes.student import Outputs, Shape, Student
from recipes.teachers import Campplus, Segmentation, filterbank, mel_filters


class Weights(Settings):
    """Weight of each loss; ``mel`` fades out over ``mel_steps``."""

    dense: float = 4.0
    cosine: float = 1.0
    nce: float = 0.2
    content: float = 1.0
    reading: float = 1.0
    activity: float = 3.0
    hint: float = 3.0
    presence: float = 0.5
    ctc: float = 0.5
    mel: float = 0.5
    mel_steps: int = 600


class Finetune(Settings):
    """Settings of the joint run.

    Attributes:
        data: folder of stage 1.
        campplus: the teacher's state dict: its last layer starts ours; none, and it is random.
        segmentation: the activity teacher's state dict; none, and activity is the exact one alone.
        soft: its share of the activity to be learnt.
        run: folder of the checkpoint and the log.
        start: exported folder or checkpoint whose weights the run starts from, but for the x-vector
            head's last layer, which starts from the teacher; none, and it starts anew. Layers that
            it does not have begin as the identity.
        first_step: number of the first step from there.
        seed: of everything.
        steps: length of the run.
        decay_steps: the learning rate falls to nothing over the last ones.
        warm_up_steps: and rises over the first ones.
        rate: learning rate in between.
        kept_rate: the share of it for what starts right already: the first convolution's filters
            and, from the teacher, the x-vector head's last layer.
        weight_decay: of matrices.
        dropout: of every layer.
        masked: share of the frames of utterances that the layers do not see, ten at a time.
        average: decay of the running average of the weights, which is what is exported.
        utterance_hops: lengths of the utterance batches, drawn evenly.
        talk_hops: lengths of the conversation batches, drawn evenly.
        utterance_batch_hops: audio in the batch of utterances.
        talk_batch_hops: audio in the batch of conversations.
        sources: probability of each corpus to give an utterance.
        nobody: share of rows without speech.
        windows: (chunk, right) pairs of streaming batches, frames.
        left: their left contexts.
        stream_from: first step with streaming batches.
        whole: share of batches with full context from then on.
        keep: steps whose checkpoint stays.
        device: cpu, cuda, or auto.
        save_s: seconds between checkpoints.
        log_steps: steps between lines of the log.
        bfloat16: autocast to bfloat16.
        phases: step → dotted keys that change from there on, for a run whose settings do.
        threads: compute threads.
        mix: the device makes the sound of the scenes (`recipes.mixing`), the processes only draw.
        workers: processes that make the scenes ahead of the steps; 0 makes them in between.
    """

    data: Path
    campplus: Path | None
    segmentation: Path | None = None
    soft: float = 0.5
    run: Path
    start: Path | None = None
    first_step: int = 0
    seed: int = 1
    steps: int
    decay_steps: int
    warm_up_steps: int = 300
    rate: float = 1.0e-3
    kept_rate: float = 0.03
    weight_decay: float = 0.02
    dropout: float = 0.0
    masked: float = 0.0
    average: float = 0.998
    utterance_hops: list[int]
    talk_hops: list[int]
    utterance_batch_hops: int
    talk_batch_hops: int
    sources: dict[str, float]
    nobody: float = 0.1
    windows: list[tuple[int, int]]
    left: list[int]
    stream_from: int
    whole: float = 0.25
    keep: list[int] = []  # noqa: RUF012  (pydantic copies defaults)
    device: str = "auto"
    save_s: float = 120
    log_steps: int = 20
    bfloat16: bool = True
    phases: dict[int, dict[str, Any]] = Field(default_factory=dict[int, dict[str, Any]])
    threads: int = 1
    mix: bool = False
    workers: int = 1
    weights: Weights = Weights()
    shape: Shape = Shape()
    acoustics: Acoustics = Acoustics()
    conversation: Conversation = Conversation()

    def at(self, step: int) -> "Finetune":
        """The settings of a step, by the phases that have begun."""
        begun = [change for first, change in sorted(self.phases.items()) if first <= step]
        if not begun:
            return self
        tree = self.model_dump()
        for change in begun:
            tree = override(tree, change)
        return Finetune.model_validate(tree)


@dataclass(slots=True)
class Batch:
    """Scenes of one length as tensors; T is the student's number of frames.

    Attributes:
        wave: [B, N]; [B, 0] of scenes that are only drawn.
        sound: [B, S, hops], see `recipes.simulate.Scene`.
        spoken: [B, hops, S] bool, who talks in the hops of ``sound``.
        clean: [B] bool.
        activity: [B, T, 3] bool.
        rows: [B, T] the teacher's row where just one speaker talks, else −1.
        owner: [B, T] that speaker, else −1.
        utterances: [B, 3] whose embedding each local speaker should have, or −1.
        texts: transcripts, "" for none.
    """

    wave: Tensor
    sound: Tensor
    spoken: Tensor
    clean: Tensor
    activity: Tensor
    rows: Tensor
    owner: Tensor
    utterances: Tensor
    texts: list[str]

    def to(self, device: torch.device) -> "Batch":
        """The same on another device."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return Batch(
            **{
                name: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part
                for name, part in parts.items()
            }
        )

    @staticmethod
    def of(scenes: list[Scene], frames: int) -> "Batch":
        """Stacks scenes of one length and cuts the labels to the student's frames."""
        spoken = torch.from_numpy(np.stack([s.activity for s in scenes]))
        activity = spoken[:, :frames]
        rows = torch.from_numpy(np.stack([s.rows for s in scenes]))[:, :frames]
        alone = activity.sum(-1) == 1
        owner = torch.where(alone, activity.int().argmax(-1), -1)
        return Batch(
            wave=torch.from_numpy(np.stack([s.wave for s in scenes])),
            sound=torch.from_numpy(np.stack([s.sound for s in scenes])),
            spoken=spoken,
            clean=torch.tensor([s.clean for s in scenes]),
            activity=activity,
            rows=torch.where(alone, rows.max(-1).values, -1),
            owner=owner,
            utterances=torch.tensor([s.utterances for s in scenes]),
            texts=[s.text for s in scenes],
        )


Drawn = list[tuple[Batch, Window | None]]
"""The batches of a step, each with the window it is seen through: utterances, conversations."""


def draw(settings: Finetune, simulator: Simulator, step: int, rank: int = 0) -> Drawn:
    """The two batches of a step and the window each is seen through.

    Drawn from the seed, the step and the process's rank.
    """
    s = settings.at(step)
    if simulator.acoustics != s.acoustics or simulator.conversation != s.conversation:
        simulator.acoustics, simulator.conversation = s.acoustics, s.conversation
    config = s.shape.config()
    rng = np.random.default_rng([s.seed, step, rank] if rank else [s.seed, step])
    drawn: Drawn = []
    for lengths, total in (
        (s.utterance_hops, s.utterance_batch_hops),
        (s.talk_hops, s.talk_batch_hops),
    ):
        hops = int(rng.choice(lengths))
        scenes: list[Scene] = []
        for _ in range(max(1, total // hops)):
            if rng.random() < s.nobody:
                scenes.append(simulator.nobody(rng, hops))
            elif lengths is s.utterance_hops:
                scenes.append(simulator.single(rng, hops, s.sources))
            else:
                scenes.append(simulator.talk(rng, hops))
        window = None
        if step >= s.stream_from and rng.random() >= s.whole:
            chunk, right = s.windows[int(rng.integers(len(s.windows)))]
            window = Window(chunk=chunk, left=int(rng.choice(s.left)), right=right)
        drawn.append((Batch.of(scenes, int(config.frames(hops * HOP))), window))
    return drawn


def simulator_of(settings: Finetune) -> Simulator:
    """The scenes of a run, in the rooms of its data folder."""
    return Simulator(
        Corpus(settings.data),
        settings.acoustics,
        settings.conversation,
        rooms=load_rooms(settings.data),
        silent=settings.mix,
    )


_simulator: Simulator
"""A worker process's own."""


def _start_worker(settings: Finetune) -> None:
    global _simulator
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _simulator = simulator_of(settings)


def _draw_in_worker(settings: Finetune, step: int, rank: int) -> Drawn:
    return draw(settings, _simulator, step, rank)


class Feed:
    """Batches of a run's steps, made ahead of them by other processes."""

    def __init__(self, settings: Finetune, rank: int = 0, ahead: int = 6) -> None:
        self.settings, self.rank, self.ahead = settings, rank, ahead
        self.pending: dict[int, Future[Drawn]] = {}
        self.pool: ProcessPoolExecutor | None = None
        if settings.workers:
            self.pool = ProcessPoolExecutor(
                settings.workers, get_context("spawn"), _start_worker, (settings,)
            )
        else:
            self.simulator = simulator_of(settings)

    def __call__(self, step: int) -> Drawn:
        """The batches of ``step``; those of the next ones are begun."""
        if self.pool is None:
            return draw(self.settings, self.simulator, step, self.rank)
        for wanted in range(step, min(step + self.ahead, self.settings.steps)):
            if wanted not in self.pending:
                future = self.pool.submit(_draw_in_worker, self.settings, wanted, self.rank)
                self.pending[wanted] = future
        return self.pending.pop(step).result()

    def close(self) -> None:
        """Ends the processes."""
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)


class Rows:
    """A teacher's rows: on disk, or for a GPU in its memory.

    Attributes:
        device: where what is taken out goes.
    """

    def __init__(self, rows: NDArray[np.float16], device: torch.device) -> None:
        self.device = device
        self.disk = rows
        self.memory = None
        if device.type != "cpu":
            self.memory = torch.from_numpy(np.array(rows)).to(device)

    def __len__(self) -> int:
        return len(self.disk)

    def __getitem__(self, at: Tensor) -> Tensor:
        """at: [N] → [N, C] float32"""
        if self.memory is not None:
            return self.memory[at].float()
        return torch.from_numpy(self.disk[at.cpu().numpy()]).to(self.device).float()


class Run:
    """Everything that changes while training; see `recipes.loop.Trainable`."""

    def __init__(self, settings: Finetune, who: World = ALONE) -> None:
        self.settings = settings
        self.device = device_of(settings.device)
        torch.manual_seed(settings.seed)
        self.corpus = Corpus(settings.data)
        for step in (0, *settings.phases):
            then = settings.at(step)
            self.corpus.expect("sources", then.sources)
            self.corpus.expect("conversation.sources", then.conversation.sources)
        self.rank = who.rank
        self.generator = torch.Generator(self.device)
        self.feed = Feed(settings, who.rank, ahead=max(6, 2 * settings.workers))
        self.targets = voice_targets(self.corpus)
        self.speaker_rows = torch.tensor(
            [self.targets.names.get(item.speaker, -1) for item in self.corpus.utterances]
        ).to(self.device)
        self.mixer = None
        if settings.mix:
            rooms = load_rooms(settings.data)
            self.mixer = Mixer(self.corpus, settings.acoustics, rooms, self.device)
        self.voice, self.teacher_content, self.teacher_characters = (
            None if rows is None else Rows(rows, self.device)
            for rows in (self.corpus.voice, self.corpus.content, self.corpus.characters)
        )
        self.student = Student(settings.shape)
        if settings.dropout or settings.masked:
            self.student.drop(settings.dropout)
        if self.device.type == "cuda":
            self.student.encoder.config.attn_implementation = "sdpa"
            # its plans are made anew for every shape, which takes longer than the product
            torch.backends.cuda.enable_cudnn_sdp(enabled=False)
        self.mel = nn.Linear(settings.shape.conv_dim[-1], 80)
        self.mel_filters = mel_filters()
        self.segmentation = (
            None
            if settings.segmentation is None
            else Segmentation(settings.segmentation, self.device)
        )
        self.content = nn.Linear(settings.shape.width, CONTENT_CHANNELS)
        if self.corpus.content is not None:
            self.content_statistics = [
                part.to(self.device) for part in content_statistics(self.corpus)
            ]
        if settings.start is None:
            start_voice(self.student, self.targets)
        else:
            start_from(self.student, load_student(settings.start))
        if settings.campplus is not None:
            start_from_teacher(self.student, self.targets, settings.campplus)
        for module in (self.student, self.mel, self.content):
            module.to(self.device)
        self.targets.to(self.device)
        self.average = {name: p.detach().clone() for name, p in self.student.named_parameters()}
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.98), fused=True)
        self.step = settings.first_step

    def _groups(self) -> Iterator[dict[str, Any]]:
        kept = [self.student.first_filters, *self.student.speaker.feature_extractor.parameters()]
        rest = [p for p in self.student.parameters() if all(p is not k for k in kept)]
        decay = self.settings.weight_decay
        yield {"params": kept, "scale": self.settings.kept_rate, "weight_decay": 0.0}
        yield {"params": [p for p in rest if p.ndim > 1], "scale": 1.0, "weight_decay": decay}
        yield {"params": [p for p in rest if p.ndim <= 1], "scale": 1.0, "weight_decay": 0.0}
        beside = [*self.mel.parameters(), *self.content.parameters()]
        yield {"params": beside, "scale": 1.0, "weight_decay": 0.0}

    @property
    def steps(self) -> int:
        """Length of the run."""
        return self.settings.steps

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        s = self.settings
        first = s.first_step
        return s.rate * ramp(step - first, s.steps - first, s.warm_up_steps, s.decay_steps)

    def losses(self, batch: Batch, out: Outputs) -> dict[str, Tensor]:
        """Every loss of a batch by name, not yet weighted."""
        targets = self.targets
        activity, wanted = out.activity.float(), self.activity(batch)
        losses = {
            "activity": pit_loss(activity, wanted),
            "hint": hint_loss(activity, wanted, targets.order(batch.utterances)),
            "presence": presence_loss(activity, wanted),
            "ctc": ctc_loss(out.characters, batch.texts),
        }
        where = batch.rows >= 0
        rows = torch.zeros(*where.shape, out.voice.shape[-1], device=self.device)
        assert self.voice is not None
        rows[where] = self.voice[batch.rows[where]]
        losses["dense"] = targets.dense_loss(out.voice, rows, where)
        losses |= self.content_losses(batch, out)
        # one embedding a local speaker who talks alone for at least a second
        mass = F.one_hot(batch.owner + 1, 4)[..., 1:].float()
        row, local = torch.nonzero(mass.sum(1) >= 50, as_tuple=True)
        if len(row):
            embedding = self.student.embed(out.voice[row], mass[row, :, local])
            utterance = batch.utterances[row, local]
            losses["cosine"], losses["nce"] = targets.embedding_losses(
                embedding, utterance, self.speaker_rows[utterance]
            )
        if self.step < self.settings.at(self.step).weights.mel_steps:
            energies = filterbank(batch.wave, self.mel_filters.to(self.device))
            energies = F.avg_pool1d(energies.transpose(1, 2), 2).transpose(1, 2)
            energies = energies[:, : out.features.shape[1]] / 4
            losses["mel"] = F.mse_loss(self.mel(out.features).float(), energies)
        return losses

    def activity(self, batch: Batch) -> Tensor:
        """Who talks, as it is to be learnt.  → [B, T, 3]

        The teacher hears ten seconds at a time, so what is longer is cut into equal pieces.
        """
        exact = batch.activity.float()
        if self.segmentation is None:
            return exact
        frames = exact.shape[1]
        pieces = math.ceil(frames * HOP / Segmentation.samples)
        learnt = list[Tensor]()
        for piece in exact.split(math.ceil(frames / pieces), 1):
            first = sum(part.shape[1] for part in learnt)
            wave = batch.wave[:, first * HOP :][:, : Segmentation.samples]
            taught = self.segmentation.activity(wave, piece.shape[1])
            learnt.append(softened(piece, taught, self.settings.soft))
        return torch.cat(learnt, 1)

    def content_losses(self, batch: Batch, out: Outputs) -> dict[str, Tensor]:
        """Losses to the content teacher and to its reader, where one speaker talks or none.

        content is the mean squared error of the teacher's channels, each in units of its
        deviation.
        """
        if self.teacher_content is None:
            return {}
        # the student's frame t is centred on sample 320 t + 360, the teacher's row t on 320 t
        rows = torch.where(batch.rows >= 0, batch.rows + 1, -1).clamp(
            max=len(self.teacher_content) - 1
        )
        where = rows >= 0
        if not bool(where.any()):
            return {}
        at = rows[where]
        mean, deviation = self.content_statistics
        wanted = (self.teacher_content[at] - mean) / deviation
        losses = {"content": F.mse_loss(self.content(out.hidden[where]).float(), wanted)}
        if self.teacher_characters is not None:
            posteriors = torch.zeros(*where.shape, out.characters.shape[-1], device=self.device)
            posteriors[..., 0] = 1  # nothing is said where nobody talks
            posteriors[where] = self.teacher_characters[at]
            heard = where | ~batch.activity.any(-1)
            losses["reading"] = reading_loss(out.characters[heard], posteriors[heard])
        return losses

    def sound(self, batch: Batch, settings: Finetune) -> None:
        """Makes what is heard of scenes that were only drawn."""
        if self.mixer is not None:
            self.mixer.acoustics = settings.acoustics
            batch.wave = self.mixer(batch.sound, batch.spoken, batch.clean, self.generator)

    def masked(self, batch: Batch) -> Tensor | None:
        """Frames that are hidden, ten at a time.  → [B, T]"""
        share = self.settings.masked
        if not share:
            return None
        starts = torch.rand(batch.owner.shape, generator=self.generator, device=self.device)
        starts = F.pad((starts < share / 10).float(), (9, 0))
        return F.max_pool1d(starts[:, None], 10, 1)[:, 0] > 0

    def advance(self) -> dict[str, float]:
        """Makes one step and gives its losses."""
        s = self.settings.at(self.step)
        torch.manual_seed(s.seed * 1_000_003 + self.step)
        self.generator.manual_seed((s.seed * 1_000_003 + self.step) * 1009 + self.rank)
        self.student.train()
        self.optimizer.zero_grad(set_to_none=True)
        weights = s.weights.model_dump()
        weights["mel"] *= max(0.0, 1 - self.step / max(s.weights.mel_steps, 1))
        seen: dict[str, Tensor] = {}
        for kind, (drawn, window) in zip(("u", "c"), self.feed(self.step), strict=True):
            batch = drawn.to(self.device)
            self.sound(batch, s)
            masked = self.masked(batch) if kind == "u" else None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=s.bfloat16):
                out = self.student(batch.wave, window, masked)
                losses = self.losses(batch, out)
            total = torch.stack([weights[name] * loss for name, loss in losses.items()]).sum()
            total.backward()
            seen |= {f"{kind}.{name}": loss.detach() for name, loss in losses.items()}
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        average_gradients(parameters)
        seen["norm"] = nn.utils.clip_grad_norm_(parameters, 1.0)
        # one wait for the device a step
        said = dict(zip(seen, torch.stack(list(seen.values())).tolist(), strict=True))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(self.step) * group["scale"]
        if math.isfinite(said["norm"]):
            self.optimizer.step()
        self.step += 1
        made = self.step - s.first_step
        keep = min(s.average, made / (made + 10))
        with torch.no_grad():
            # in the order of the parameters, as it was made
            averaged = list(self.average.values())
            torch._foreach_lerp_(averaged, list(self.student.parameters()), 1 - keep)
        return said

    def state(self) -> dict[str, Any]:
        """See `recipes.loop.Trainable.state`."""
        return {
            "shape": self.settings.shape.model_dump(),
            "student": dict(self.student.named_parameters()),
            "mel": self.mel.state_dict(),
            "content": self.content.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """See `recipes.loop.Trainable.load`; settings that have changed since count."""
        for name, parameter in self.student.named_parameters():
            parameter.copy_(state["student"][name])
            self.average[name].copy_(state["average"][name])
        self.mel.load_state_dict(state["mel"])
        self.content.load_state_dict(state["content"])
        scales = [group["scale"] for group in self.optimizer.param_groups]
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, scale, decay in zip(self.optimizer.param_groups, scales, decays, strict=True):
            group["scale"], group["weight_decay"] = scale, decay


def voice_targets(corpus: Corpus) -> VoiceTargets:
    """Normalisation of the teacher, from the training split."""
    assert corpus.voice is not None, "run recipes.prepare first: the teacher's rows are missing"
    assert corpus.embeddings is not None
    recorded = [item.recorded for item in corpus.utterances]
    spans = [(item.start, item.start + item.hops) for item in corpus.utterances if item.recorded]
    hops = np.concatenate([np.arange(first, end) for first, end in spans])
    rows = torch.from_numpy(corpus.voice[hops[:: max(1, len(hops) // 50_000)]])
    names = [item.speaker if item.split == "train" else "" for item in corpus.utterances]
    embeddings = torch.from_numpy(corpus.embeddings)
    return VoiceTargets(rows[rows.abs().sum(1) > 0], embeddings, names, recorded=recorded)


@torch.no_grad()
def start_voice(student: Student, targets: VoiceTargets) -> None:
    """Starts the x-vector head's frame layers at full gain, its outputs near the teacher's mean.

    The published initialisation (0.02) shrinks a signal, and its gradient, thirtyfold in three
    layers of this width. Outputs that start louder than a little noise around the mean are worse:
    the loss silences them within fifty steps by pushing every ReLU below zero, for good.
    """
    linears = [student.speaker.projector, *student.speaker.tdnn.modules()]
    linears = [module for module in linears if isinstance(module, nn.Linear)]
    for linear in linears:
        nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.normal_(linears[-1].weight, std=0.01)
    linears[-1].bias.copy_(targets.mean)


@torch.no_grad()
def start_from_teacher(student: Student, targets: VoiceTargets, campplus: Path) -> None:
    """Starts the x-vector head's last layer as the teacher's own.

    With its frames imitated in units of their deviation, the teacher's dense layer and batch norm,
    less the mean embedding, give its centred embeddings: one linear layer, here multiplied out.
    """
    teacher = Campplus(campplus)
    scale, shift = teacher.norms["xvector.dense.nonlinear.batchnorm"]
    weight = teacher.tensors["xvector.dense.linear.weight"][..., 0] * scale[:, None]
    assert weight.shape[0] == EMBEDDING_CHANNELS
    student.speaker.feature_extractor.weight.copy_(weight * targets.scale.repeat(2))
    student.speaker.feature_extractor.bias.copy_(shift - targets.centre)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Finetune, "finetune", "train the encoder and its heads")
    torch.set_num_threads(settings.threads)
    with world(device_of(settings.device)) as who:
        run = Run(settings, who)
        if who.leads:
            size = sum(p.numel() for p in run.student.parameters())
            print(f"{size / 1e6:.2f} M parameters, {size * 2 / 1e6:.1f} MB as float16", flush=True)
        try:
            train(
                run,
                settings.run,
                name="finetune",
                save_s=settings.save_s,
                log_steps=settings.log_steps,
                keep=settings.keep,
                who=who,
            )
        finally:
            run.feed.close()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
