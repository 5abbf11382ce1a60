"""Stage 2b: what differs between two moments of one voice counts less.

Within-class covariance normalisation (Hatch, Kajarekar & Stolcke, Interspeech 2006) of the voice
embeddings, folded into the x-vector head's last layer: the checkpoint stays an ordinary one. The
covariance is that of short scenes of the training speakers, clean and in rooms and noise. The
encoder has learnt these very speakers, so how much of a sphere to mix in cannot be told from them:
it is a setting.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.corpus import Corpus
from recipes.export import load_student, save_student
from recipes.rooms import load as load_rooms
from recipes.settings import Settings, from_arguments
from recipes.simulate import Acoustics, Conversation, Simulator
from recipes.student import Student
from recipes.teachers import equal_error_rate


class Normalise(Settings):
    """What is normalised, by what.

    Attributes:
        checkpoint: a run's checkpoint.
        target: the checkpoint to write.
        data: folder of stage 1.
        scenes: how many are heard.
        hops: their length, below `recipes.simulate.WHOLE_HOPS`: of whole utterances as short as
            this, few speakers have any.
        acoustics: of the scenes.
        sources: share of each corpus; its speakers must be known.
        shrinkage: share of a sphere in the covariance.
        seed: of the scenes.
        threads: compute threads.
    """

    checkpoint: Path
    target: Path
    data: Path
    scenes: int = 3000
    hops: int = 140
    acoustics: Acoustics = Acoustics()
    sources: dict[str, float]
    shrinkage: float = 0.5
    seed: int = 1
    threads: int = 1


@torch.inference_mode()
def heard(student: Student, settings: Normalise) -> tuple[Tensor, list[str]]:
    """Embeddings of the scenes, and whose they are.  → [N, 192], N names"""
    corpus = Corpus(settings.data)
    corpus.expect("sources", settings.sources)
    simulator = Simulator(
        corpus, settings.acoustics, Conversation(), rooms=load_rooms(settings.data)
    )
    found: list[Tensor] = []
    names: list[str] = []
    batch = 20
    for at in range(0, settings.scenes, batch):
        scenes = [
            simulator.single(
                np.random.default_rng([settings.seed, number]), settings.hops, settings.sources
            )
            for number in range(at, min(at + batch, settings.scenes))
        ]
        voice = student(torch.from_numpy(np.stack([scene.wave for scene in scenes]))).voice
        for scene, rows in zip(scenes, voice, strict=True):
            mass = torch.from_numpy(scene.activity[: len(rows)].any(1)).float()
            if mass.sum() < 40:
                continue
            found.append(student.embed(rows[None], mass[None])[0])
            names.append(corpus.utterances[scene.utterances[0]].speaker)
    return torch.stack(found), names


def centre(voices: Tensor, label: Tensor) -> Tensor:
    """The mean voice, one vote a speaker.  [N, D], [N] → [D]"""
    return torch.stack([voices[label == one].mean(0) for one in label.unique().tolist()]).mean(0)


def within(voices: Tensor, label: Tensor) -> Tensor:
    """Covariance about each speaker's own mean.  voices: [N, D], label: [N] → [D, D]"""
    centred = voices.clone()
    for speaker in label.unique().tolist():
        own = label == speaker
        centred[own] -= voices[own].mean(0)
    return centred.T @ centred / len(voices)


def whitening(covariance: Tensor, share: float) -> Tensor:
    """The inverse square root, ``share`` of a sphere mixed in.  [D, D] → [D, D]"""
    size = len(covariance)
    sphere = torch.eye(size) * covariance.trace() / size
    values, vectors = torch.linalg.eigh((1 - share) * covariance + share * sphere)
    return vectors @ torch.diag(values.clamp(min=1e-12) ** -0.5) @ vectors.T


def error(voices: Tensor, label: Tensor) -> float:
    """Equal error rate over all pairs, per cent."""
    unit = F.normalize(voices, dim=1)
    left, right = torch.triu_indices(len(unit), len(unit), 1)
    scores = (unit @ unit.T)[left, right]
    return 100 * equal_error_rate(scores, label[left] == label[right])


@torch.no_grad()
def fold(student: Student, mean: Tensor, a: Tensor) -> None:
    """Lets the last layer give ``a (x − mean)`` for its former output x, about as large as it."""
    last = student.speaker.feature_extractor
    size = last.weight.norm()
    last.weight.copy_(a @ last.weight)
    last.bias.copy_(a @ (last.bias - mean))
    scale = size / last.weight.norm()
    last.weight *= scale
    last.bias *= scale


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Normalise, "normalise", "normalise the voice embeddings")
    torch.set_num_threads(settings.threads)
    student = load_student(settings.checkpoint)
    voices, names = heard(student, settings)
    known = sorted(set(names))
    label = torch.tensor([known.index(name) for name in names])
    a, mean = whitening(within(voices, label), settings.shrinkage), centre(voices, label)
    print(
        f"{len(known)} training speakers: EER {error(voices, label):.2f} %, "
        f"normalised {error((voices - mean) @ a, label):.2f} %",
        flush=True,
    )
    fold(student, mean, a)
    save_student(student, settings.checkpoint, settings.target)


if __name__ == "__main__":
    main()
