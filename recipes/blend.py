"""Stage 2a: halfway between two runs, one of which went on from the other.

A run that goes on for something new forgets a little of the old; weights on the straight line
between both keep most of either (Wortsman et al., Robust fine-tuning of zero-shot models, CVPR
2022).
"""

from pathlib import Path

import torch

from recipes.export import load_student, save_student
from recipes.settings import Settings, from_arguments
from recipes.student import Student


class Blend(Settings):
    """What is blended.

    Attributes:
        checkpoint: of the later run.
        before: checkpoint or exported folder of the earlier one.
        target: the checkpoint to write.
        share: of the later run.
    """

    checkpoint: Path
    before: Path
    target: Path
    share: float = 0.5


@torch.no_grad()
def blend(later: Student, earlier: Student, share: float) -> None:
    """Moves ``later`` towards ``earlier``.

    The x-vector head's last layer stays: a run that went on began it anew, from the teacher's.
    """
    before = dict(earlier.named_parameters())
    for name, parameter in later.named_parameters():
        if not name.startswith("speaker.feature_extractor."):
            parameter.lerp_(before[name], 1 - share)


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Blend, "blend", "blend two runs")
    student = load_student(settings.checkpoint)
    blend(student, load_student(settings.before), settings.share)
    save_student(student, settings.checkpoint, settings.target)


if __name__ == "__main__":
    main()
