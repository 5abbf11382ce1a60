"""Conversations to score on: recorded ones, and simulated ones of unseen speakers.

``python -m recipes.conversations`` writes simulated ones as `livesat eval` reads them: FLAC, RTTM
and a transcript. Their turns are whole utterances: the words are known as exactly as the times.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

from recipes.corpus import HOP, RATE, Corpus
from recipes.settings import Settings, from_arguments
from recipes.simulate import Acoustics, Conversation, Scene, Simulator
from stream.score import Span, read_rttm

Floats = NDArray[np.float32]

ATTEMPTS = 1000
"""Scenes drawn for one conversation before its settings are at fault."""


@dataclass(frozen=True, slots=True)
class Clip:
    """A conversation and who really spoke in it.

    Attributes:
        name: of the recording.
        wave: float32 [N] at 16 kHz.
        reference: who spoke when.
        words: (span, text) of the utterances that are in it whole.
    """

    name: str
    wave: Floats = field(repr=False)
    reference: tuple[Span, ...] = field(repr=False)
    words: tuple[tuple[Span, str], ...] = field(default=(), repr=False)

    @property
    def seconds(self) -> float:
        """Its length; all of it is scored."""
        return len(self.wave) / RATE

    @property
    def speakers(self) -> int:
        """How many people speak."""
        return len({span.speaker for span in self.reference})


class Meetings(Settings):
    """A set of simulated conversations: as many for each number of speakers.

    Attributes:
        speakers: numbers of speakers.
        each: conversations of each number.
        seconds: length of each.
        seed: conversation ``n`` of ``k`` speakers is drawn from (seed, k, n) alone.
        whole: turns are whole utterances.
    """

    speakers: tuple[int, ...] = (2, 3, 4)
    each: int = 10
    seconds: float = 60.0
    seed: int = 762
    whole: bool = False


def read_clips(folder: Path) -> list[Clip]:
    """Every recording of a folder that has an RTTM beside it.

    Raises:
        ValueError: a recording is not sampled at 16 kHz, or there is none.
        ScoreError: an RTTM that cannot be read.
    """
    clips: list[Clip] = []
    for path in sorted(folder.glob("*.rttm")):
        spans = [span for spans in read_rttm(path).values() for span in spans]
        audio = path.with_suffix(".flac")
        wave, rate = sf.read(audio, dtype="float32", always_2d=True)
        if rate != RATE:
            raise ValueError(f"{audio}: expected {RATE} Hz, got {rate}")
        clips.append(Clip(path.stem, np.ascontiguousarray(wave.mean(1)), tuple(spans)))
    if not clips:
        raise ValueError(f"{folder}: expected pairs like talk.flac and talk.rttm, found none")
    return clips


def simulated_clips(
    corpus: Corpus, settings: Meetings, *, split: str = "dev"
) -> dict[int, list[Clip]]:
    """Conversations of the speakers of a split → number of speakers → clips."""
    return {
        speakers: [
            meeting(
                corpus,
                speakers,
                settings.seconds,
                [settings.seed, speakers, number],
                split,
                whole=settings.whole,
            )
            for number in range(settings.each)
        ]
        for speakers in settings.speakers
    }


def meeting(
    corpus: Corpus,
    speakers: int,
    seconds: float,
    seed: Sequence[int],
    split: str = "dev",
    *,
    whole: bool = False,
) -> Clip:
    """One conversation in which all of ``speakers`` people are heard for a second or more.

    Scenes are drawn until one is such: in a minute somebody may well never get a word in.

    Raises:
        ValueError: the split has not so many speakers, or the time is too short for them.
    """
    shares = {item.corpus: 1.0 for item in corpus.utterances if item.split == split}
    places = max(len(Conversation().speakers), speakers)
    people = tuple(float(place + 1 == speakers) for place in range(places))
    style = Conversation(speakers=people, sources=shares, whole=whole)
    simulator = Simulator(corpus, Acoustics(), style, split=split)
    known = sum(len(names) for names in simulator.by_speaker.values())
    if speakers > known:
        raise ValueError(f"{split}: expected {speakers} speakers that meet, got {known} in all")
    hops = int(seconds * RATE) // HOP
    for attempt in range(ATTEMPTS):
        scene = simulator.talk(np.random.default_rng([*seed, attempt]), hops)
        reference = tuple(spans(corpus, scene))
        heard = dict.fromkeys((span.speaker for span in reference), 0.0)
        for span in reference:
            heard[span.speaker] += span.end - span.start
        if len(heard) == speakers and min(heard.values()) >= 1.0:
            words = tuple(
                (Span(first * HOP / RATE, end * HOP / RATE, item.speaker or item.id), item.text)
                for _, index, first, end in sorted(scene.said, key=lambda said: said[2])
                if (item := corpus.utterances[index]).text
            )
            return Clip(f"{speakers}_speakers_{seed[-1]:02}", scene.wave, reference, words)
    raise ValueError(
        f"{split}: in {ATTEMPTS} conversations of {seconds:g} s not all of {speakers} speakers are "
        "heard for a second; expected longer ones"
    )


def spans(corpus: Corpus, scene: Scene) -> Iterator[Span]:
    """Who speaks when in a scene, by the corpus's names, from the rows it is made of.

    The names hold for the whole scene, whichever local channel a speaker has at the moment.
    """
    starts = np.array([item.start for item in corpus.utterances])
    owner = np.searchsorted(starts, scene.rows, side="right") - 1
    names = [item.speaker or item.id for item in corpus.utterances]
    for channel in range(scene.rows.shape[1]):
        at = 0
        spoken = [
            names[index] if row >= 0 else ""
            for row, index in zip(scene.rows[:, channel], owner[:, channel], strict=True)
        ]
        for name, run in groupby(spoken):
            length = sum(1 for _ in run)
            if name:
                yield Span(at * HOP / RATE, (at + length) * HOP / RATE, name)
            at += length


class Write(Settings):
    """What is written where.

    Attributes:
        data: folder of stage 1.
        target: folder of the conversations.
        split: whose speakers: ``dev`` or ``train``.
        meetings: which conversations.
    """

    data: Path
    target: Path
    split: str = "dev"
    meetings: Meetings = Meetings(whole=True)


def write_clip(clip: Clip, folder: Path) -> None:
    """Writes ``NAME.flac``, ``NAME.rttm`` and, where words are known, ``NAME.seglst.json``."""
    sf.write(folder / f"{clip.name}.flac", clip.wave, RATE)
    lines = [
        f"SPEAKER {clip.name} 1 {span.start:.3f} {span.end - span.start:.3f} "
        f"<NA> <NA> {span.speaker} <NA> <NA>"
        for span in sorted(clip.reference, key=lambda span: span.start)
    ]
    (folder / f"{clip.name}.rttm").write_text("\n".join(lines) + "\n")
    if clip.words:
        segments = [
            {
                "session_id": clip.name,
                "speaker": span.speaker,
                "start_time": round(span.start, 3),
                "end_time": round(span.end, 3),
                "words": text,
            }
            for span, text in clip.words
        ]
        (folder / f"{clip.name}.seglst.json").write_text(json.dumps(segments, indent=2) + "\n")


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Write, "conversations", "write simulated conversations")
    settings.target.mkdir(parents=True, exist_ok=True)
    made = simulated_clips(Corpus(settings.data), settings.meetings, split=settings.split)
    for clips in made.values():
        for clip in clips:
            write_clip(clip, settings.target)
    print(f"{sum(map(len, made.values()))} conversations in {settings.target}")


if __name__ == "__main__":
    main()
