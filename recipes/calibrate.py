"""Stage 5: thresholds of the tracks for a checkpoint, found on development data only.

The encoder runs once over every clip. Then a random search moves one to three thresholds at a time
to other candidates and keeps what lowers the error: thresholds depend on each other, and one at a
time gets stuck. A few recorded clips are too few to trust alone: each group of clips has a share of
the error, and simulated conversations of the development speakers are one of them, others than
those that are scored. Each clip is heard through several windows: thresholds found with one alone
fit its accidents (ten points of DER on the six AMI clips were gone with another left context).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch

from model.state import Window
from recipes.conversations import Clip, Meetings, read_clips, simulated_clips
from recipes.corpus import Corpus
from recipes.diarization import diarize, judge_all, percent
from recipes.export import load_student
from recipes.hearing import Heard, listen
from recipes.recognition import beam, word_scores
from recipes.settings import Settings, from_arguments
from recipes.student import Student
from recipes.verification import dev_utterances
from stream.tracks.language import LanguageModel
from stream.tracks.settings import TracksSettings


class Calibrate(Settings):
    """What is tuned, and on what.

    Attributes:
        checkpoint: a run's checkpoint or an exported folder.
        data: folder of stage 1.
        conversations: folders of audio and RTTM pairs, each with its share of the error.
        target: the ``tracks.json`` to write.
        windows: chunk, left and look-ahead frames of each stream; null is the whole recording.
        simulated: simulated conversations of the development speakers.
        simulated_share: theirs of the error.
        candidates: dotted key of `TracksSettings` → values to try for the least diarization error.
        language_model: ARPA file of the beam search; null leaves decoding as it is.
        decoding: as candidates, for the least character error with the language model,
            through the first window.
        start: thresholds to begin with, nested like the file.
        trials: moves that the random search tries.
        rounds: passes over the keys of ``decoding``, one at a time.
        seed: of the search.
        threads: compute threads.
    """

    checkpoint: Path
    data: Path
    conversations: dict[Path, float]
    target: Path
    windows: list[tuple[int, int, int] | None] = [(25, 500, 12)]  # noqa: RUF012
    simulated: Meetings = Meetings(seed=100, each=4)
    simulated_share: float = 0.2
    candidates: dict[str, list[Any]]
    language_model: Path | None = None
    decoding: dict[str, list[Any]] = {}  # noqa: RUF012  (pydantic copies defaults)
    start: dict[str, Any] = {}  # noqa: RUF012  (pydantic copies defaults)
    trials: int = 300
    rounds: int = 2
    seed: int = 1
    threads: int = 1


@dataclass(slots=True)
class Case:
    """A clip and what the student says of it."""

    clip: Clip
    heard: Heard


def error(student: Student, cases: list[Case], tracks: TracksSettings) -> float:
    """Diarization error over the cases, per cent."""
    pairs = (
        (case.clip, diarize(student, case.heard, tracks, len(case.clip.wave))) for case in cases
    )
    return percent(judge_all(pairs).error.rate)


def nested(key: str, value: object) -> Mapping[str, Any]:
    """``a.b`` and a value → ``{"a": {"b": value}}``."""
    for part in reversed(key.split(".")):
        value = {part: value}
    assert isinstance(value, dict)
    return value


def search(
    best: TracksSettings,
    candidates: Mapping[str, list[Any]],
    cost: Callable[[TracksSettings, float], float],
    trials: int,
    seed: int,
) -> TracksSettings:
    """Random moves of one to three keys from the best so far.

    Args:
        best: Where to begin.
        candidates: Key → values.
        cost: (thresholds, least cost so far) → the error; anything above the second where it is
            clear early that it is no better.
        trials: Moves.
        seed: Of the draw.
    """
    rng = np.random.default_rng(seed)
    keys = list(candidates)
    least = cost(best, float("inf"))
    print(f"start: {least:.2f}", flush=True)
    for trial in range(trials):
        tracks, moved = best, dict[str, Any]()
        for key in rng.choice(keys, min(int(rng.integers(1, 4)), len(keys)), replace=False):
            moved[str(key)] = candidates[key][int(rng.integers(len(candidates[key])))]
        try:
            for key, value in moved.items():
                tracks = tracks.over(nested(key, value))
        except ValueError:
            continue  # a pair that contradicts itself, such as offset > onset
        if tracks == best:
            continue
        found = cost(tracks, least)
        if found < least - 1e-6:
            best, least = tracks, found
            print(f"trial {trial}: {moved}: {least:.2f}", flush=True)
    return best


def descend(
    best: TracksSettings,
    candidates: Mapping[str, list[Any]],
    cost: Callable[[TracksSettings], float],
    rounds: int,
) -> TracksSettings:
    """Coordinate descent over the candidates, from ``best`` on."""
    least = cost(best)
    print(f"start: {least:.2f}", flush=True)
    for number in range(rounds):
        before = least
        for key, values in candidates.items():
            for value in values:
                try:
                    tracks = best.over(nested(key, value))
                except ValueError:
                    continue  # a pair that contradicts itself, such as offset > onset
                if tracks == best:
                    continue
                found = cost(tracks)
                if found < least - 1e-6:
                    best, least = tracks, found
                    print(f"round {number + 1}: {key} = {value}: {least:.2f}", flush=True)
        if least == before:
            break
    return best


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Calibrate, "calibrate", "find the thresholds of the tracks")
    torch.set_num_threads(settings.threads)
    student = load_student(settings.checkpoint)
    windows = [
        None if sizes is None else Window(chunk=sizes[0], left=sizes[1], right=sizes[2])
        for sizes in settings.windows
    ]
    corpus = Corpus(settings.data)
    given = [(str(f), share, read_clips(f)) for f, share in settings.conversations.items()]
    simulated = simulated_clips(corpus, settings.simulated).values()
    given.append(("simulated", settings.simulated_share, [*chain.from_iterable(simulated)]))
    groups: list[tuple[str, float, list[Case]]] = []
    for name, share, clips in given:
        cases = [
            Case(clip, listen(student, clip.wave, window)) for clip in clips for window in windows
        ]
        groups.append((name, share, cases))
    groups.sort(key=lambda group: sum(len(case.clip.wave) for case in group[2]))

    def diarization(tracks: TracksSettings, least: float) -> float:
        total = 0.0
        for _, share, cases in groups:  # the shortest first: most moves are out early
            total += share * error(student, cases, tracks)
            if total >= least:
                break
        return total

    best = TracksSettings().over(settings.start)
    best = search(best, settings.candidates, diarization, settings.trials, settings.seed)
    if settings.language_model is not None:
        language = LanguageModel.load(settings.language_model)
        heard = [
            (
                corpus.utterances[index].text,
                listen(student, corpus.wave(index), windows[0]).characters,
            )
            for index in dev_utterances(corpus)
            if corpus.utterances[index].text
        ]

        def characters(tracks: TracksSettings) -> float:
            decode = beam(tracks, language)
            return word_scores((text, decode(rows)) for text, rows in heard)["cer"]

        best = descend(best, settings.decoding, characters, settings.rounds)
    best.save(settings.target)
    for name, _, cases in groups:
        print(f"{name}: DER {error(student, cases, best):.1f} %")


if __name__ == "__main__":
    main()
