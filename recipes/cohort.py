"""Stage 3b: voices that are nobody's, by which the product measures what a score is worth.

Mean embeddings of training speakers, as the exported checkpoint hears them, in `cohort.npy` beside
the speaker head. They are averages over recordings of published corpora, and are only ever compared
with; whoever is enrolled is not among them.
"""

from pathlib import Path

import numpy as np
import torch

from recipes.corpus import Corpus
from recipes.export import load_student
from recipes.hearing import SHIPPED, listen
from recipes.settings import Settings, from_arguments
from recipes.verification import voice_print


class CohortSettings(Settings):
    """Whose voices, and how many.

    Attributes:
        checkpoint: the exported folder.
        data: folder of stage 1.
        target: the file to write.
        speakers: how many at most.
        clips: recordings of each.
        least_s: clean speech below which a recording does not count.
        seed: of the choice.
        threads: compute threads.
    """

    checkpoint: Path
    data: Path
    target: Path
    speakers: int = 200
    clips: int = 4
    least_s: float = 1.0
    seed: int = 1
    threads: int = 1


def cohort(settings: CohortSettings) -> np.ndarray:
    """→ [N, E] float16"""
    student, corpus = load_student(settings.checkpoint), Corpus(settings.data)
    by_speaker: dict[str, list[int]] = {}
    for index, item in enumerate(corpus.utterances):
        if item.split == "train" and item.speaker and item.recorded:
            by_speaker.setdefault(item.speaker, []).append(index)
    rng = np.random.default_rng(settings.seed)
    names = sorted(by_speaker)
    found: list[np.ndarray] = []
    for name in rng.permutation(names)[: settings.speakers]:
        vectors: list[np.ndarray] = []
        for index in rng.permutation(by_speaker[str(name)])[: settings.clips]:
            heard = listen(student, corpus.wave(int(index)), SHIPPED)
            print_ = voice_print(student, heard, str(name))
            if print_.evidence_s >= settings.least_s:
                vectors.append(print_.vector)
        if vectors:
            found.append(np.mean(vectors, axis=0))
    return np.asarray(found, np.float16)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(CohortSettings, "cohort", "write the cohort of a checkpoint")
    torch.set_num_threads(settings.threads)
    vectors = cohort(settings)
    np.save(settings.target, vectors, allow_pickle=False)
    print(f"{len(vectors)} voices of {vectors.shape[1]} dimensions in {settings.target}")


if __name__ == "__main__":
    main()
