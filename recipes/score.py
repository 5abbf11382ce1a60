"""Stage 4: what a checkpoint is worth on the development data.

Equal error rate on the development speakers, character and word error rate on their sentences
(greedily, and with the language model), and the diarization error on the development
conversations, through the very tracks the product runs, with the encoder seeing what a stream with
the given window sees.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pyannote.core import Annotation, Segment, Timeline
from pyannote.metrics.diarization import DiarizationErrorRate
from torch import Tensor

from model.state import Window
from recipes.corpus import HOP, RATE, Corpus
from recipes.export import load_student
from recipes.settings import Settings, from_arguments
from recipes.student import VOCABULARY, Outputs, Student
from recipes.teachers import equal_error_rate
from sinks.events import Event, SpeakerRevised, TranscriptFinal, TurnEnded
from stream.score import Edits, character_errors, word_errors
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import LanguageModel
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings
from stream.tracks.turns import Stamp, Turns

Floats = NDArray[np.float32]

SYMBOLS = Vocabulary(VOCABULARY, blank=0)

COMPONENTS = ("missed detection", "false alarm", "confusion", "total")


class Score(Settings):
    """What is scored on what.

    Attributes:
        checkpoint: a run's checkpoint or an exported folder.
        data: folder of stage 1.
        conversations: folder of audio and RTTM pairs.
        tracks: thresholds; the built-in ones where the file does not exist.
        window: chunk, left and look-ahead frames of the stream.
        language_model: ARPA file of the beam search; null decodes greedily only.
        report: JSON file of the results.
        threads: compute threads.
    """

    checkpoint: Path
    data: Path
    conversations: Path
    tracks: Path
    window: tuple[int, int, int] = (25, 500, 12)
    language_model: Path | None = None
    report: Path
    threads: int = 1


@dataclass(slots=True)
class Clip:
    """A conversation with its reference."""

    name: str
    wave: Floats
    reference: Annotation

    @property
    def extent(self) -> Timeline:
        """All of the clip: what is scored."""
        return Timeline([Segment(0, len(self.wave) / RATE)])


def read_clips(folder: Path) -> list[Clip]:
    """Every audio file of a folder that has an RTTM beside it."""
    clips: list[Clip] = []
    for path in sorted(folder.glob("*.rttm")):
        reference = Annotation(uri=path.stem)
        for number, line in enumerate(path.read_text().splitlines()):
            fields = line.split()
            if fields and fields[0] == "SPEAKER":
                begin, length = float(fields[3]), float(fields[4])
                reference[Segment(begin, begin + length), number] = fields[7]
        wave, rate = sf.read(path.with_suffix(".flac"), dtype="float32", always_2d=True)
        assert rate == RATE, f"{path.stem}: expected {RATE} Hz, got {rate}"
        clips.append(Clip(path.stem, np.ascontiguousarray(wave.mean(1)), reference))
    return clips


@dataclass(slots=True)
class Sentence:
    """A recording with verbatim text, and the log-probabilities of its characters [T, V]."""

    text: str
    scores: Floats


@torch.inference_mode()
def listen(student: Student, wave: Floats, window: Window | None) -> Outputs:
    """One recording through the student."""
    return student(torch.from_numpy(wave)[None], window)


def frames_of(out: Outputs) -> Frames:
    """The outputs of one recording as the engine would hand them to the tracks."""
    return Frames(
        start=0,
        activity=out.activity[0].sigmoid().numpy(),
        voice=out.voice[0].numpy(),
    )


def stamper() -> Stamp:
    """Envelopes of events whose clock does not matter."""
    numbers = count()

    def stamp(start: int, end: int) -> dict[str, Any]:
        return {
            "session_id": "score",
            "stream_id": "score",
            "seq": next(numbers),
            "start": start / RATE,
            "end": end / RATE,
            "wall_time": "1970-01-01T00:00:00+00:00",
            "lag_ms": 0.0,
        }

    return stamp


def diarize(student: Student, frames: Frames, settings: TracksSettings, samples: int) -> Annotation:
    """Frames → turns with their final speakers."""

    @torch.inference_mode()
    def embed(mass: Floats, first: Floats, second: Floats) -> Floats:
        moments = (torch.as_tensor(np.asarray(part)) for part in (mass, first, second))
        return student.speaker.embed(*moments).numpy()

    turns = Turns(settings, embed, stamper())
    return annotation([*turns.step(frames), *turns.flush(samples)])


def annotation(events: list[Event]) -> Annotation:
    """Finished turns, each under the last label it was given."""
    spans: dict[str, tuple[Segment, str]] = {}
    for event in events:
        if isinstance(event, TurnEnded):
            spans[event.turn_id] = (Segment(event.start, event.end), event.speaker.label)
        elif isinstance(event, SpeakerRevised):
            for turn in event.revision_of:
                if turn in spans:
                    spans[turn] = (spans[turn][0], event.to_label)
    result = Annotation()
    for turn, (segment, label) in spans.items():
        result[segment, turn] = label
    return result


def local_turns(activity: Floats, threshold: float = 0.5) -> Annotation:
    """The frame head alone: its local speakers taken for speakers.  activity: [T, S]."""
    result = Annotation()
    for speaker, row in enumerate((activity > threshold).T):
        at = 0
        for active, run in groupby(row.tolist()):
            length = sum(1 for _ in run)
            if active:
                result[Segment(at * HOP / RATE, (at + length) * HOP / RATE), at] = str(speaker)
            at += length
    return result


def diarization_error(
    pairs: Iterable[tuple[Clip, Annotation]], collar: float = 0.0
) -> dict[str, float]:
    """Error rate over all clips with its parts, overlap scored, in per cent of the speech."""
    metric = DiarizationErrorRate(collar=collar, skip_overlap=False)
    for clip, hypothesis in pairs:
        metric(clip.reference, hypothesis, uem=clip.extent)
    sums: dict[str, float] = {key: float(metric[key]) for key in COMPONENTS}  # pyright: ignore[reportArgumentType]
    parts = {
        name: round(100 * sums[key] / sums["total"], 1)
        for name, key in (
            ("missed", "missed detection"),
            ("false alarm", "false alarm"),
            ("confusion", "confusion"),
        )
    }
    return {"DER": round(100 * abs(metric), 1), **parts}


def embeddings(
    student: Student, corpus: Corpus, window: Window | None, hops: int | None
) -> tuple[Tensor, list[str]]:
    """Unit embeddings of the development utterances, of their middle ``hops`` or of all."""
    found: list[Tensor] = []
    names: list[str] = []
    for index, item in enumerate(corpus.utterances):
        if item.split != "dev":
            continue
        wave = corpus.wave(index)
        if hops is not None:
            active = np.flatnonzero(corpus.activity[item.start : item.start + item.hops])
            if len(active) < hops:
                continue
            first = int(active[0] + active[-1] + 1 - hops) // 2
            wave = wave[first * HOP : (first + hops) * HOP]
        out = listen(student, wave, window)
        spoken = 1 - (1 - out.activity.sigmoid()).prod(-1)
        mass = (spoken > 0.5).float()
        if mass.sum() < 25:
            mass = torch.ones_like(mass)
        with torch.inference_mode():
            found.append(F.normalize(student.embed(out.voice, mass), dim=1)[0])
        names.append(item.speaker)
    return torch.stack(found), names


def verification_error(unit: Tensor, names: list[str]) -> float:
    """Equal error rate over all pairs, in per cent."""
    label = torch.tensor([sorted(set(names)).index(name) for name in names])
    left, right = torch.triu_indices(len(unit), len(unit), 1)
    scores = (unit @ unit.T)[left, right]
    return round(100 * equal_error_rate(scores, label[left] == label[right]), 2)


def sentences(student: Student, corpus: Corpus, window: Window | None) -> list[Sentence]:
    """The development sentences with verbatim text, and what the CTC head says of each."""
    found: list[Sentence] = []
    for index, item in enumerate(corpus.utterances):
        if item.split == "dev" and item.text:
            logits = listen(student, corpus.wave(index), window).characters[0]
            found.append(Sentence(item.text, logits.float().log_softmax(-1).numpy()))
    return found


def transcribe(scores: Floats, settings: TracksSettings, language: LanguageModel | None) -> str:
    """Log-probabilities of a recording [T, V] → its words, by beam search if there is a model."""
    frames = Frames(start=0, ctc=scores)
    tracks = Tracks(settings, vocabulary=SYMBOLS, language=language, stamp=stamper())
    events = [*tracks.step(frames), *tracks.flush(frames.end)]
    return " ".join(event.text for event in events if isinstance(event, TranscriptFinal))


def transcription_errors(
    heard: Iterable[Sentence], settings: TracksSettings, language: LanguageModel | None
) -> dict[str, float]:
    """Character and word error rate, spaces counted as characters, in per cent."""
    characters, words = Edits(), Edits()
    for sentence in heard:
        said = transcribe(sentence.scores, settings, language)
        characters += character_errors(sentence.text, said)
        words += word_errors(sentence.text, said)
    return {"CER": round(100 * characters.rate, 1), "WER": round(100 * words.rate, 1)}


def score(settings: Score) -> dict[str, Any]:
    """All numbers of a checkpoint."""
    student = load_student(settings.checkpoint)
    chunk, left, right = settings.window
    window = Window(chunk=chunk, left=left, right=right)
    corpus = Corpus(settings.data)
    tracks = TracksSettings.load(settings.tracks) if settings.tracks.exists() else TracksSettings()
    language = None
    if settings.language_model is not None:
        language = LanguageModel.load(settings.language_model)
    clips = read_clips(settings.conversations)
    report: dict[str, Any] = {"checkpoint": str(settings.checkpoint), "window": settings.window}
    for name, seen in (("streamed", window), ("offline", None)):
        frames = [frames_of(listen(student, clip.wave, seen)) for clip in clips]
        local = (local_turns(np.asarray(f.activity)) for f in frames)
        report[f"{name} DER, frame head alone"] = diarization_error(zip(clips, local, strict=True))
        whole = [
            diarize(student, f, tracks, len(clip.wave))
            for f, clip in zip(frames, clips, strict=True)
        ]
        report[f"{name} DER"] = diarization_error(zip(clips, whole, strict=True))
        report[f"{name} DER, collar 0.25 s"] = diarization_error(
            zip(clips, whole, strict=True), collar=0.5
        )
        for seconds in (None, 3.0, 1.5):
            hops = None if seconds is None else int(seconds * 50)
            unit, names = embeddings(student, corpus, seen, hops)
            length = "whole utterances" if seconds is None else f"{seconds} s"
            report[f"{name} EER, {length}"] = verification_error(unit, names)
        heard = sentences(student, corpus, seen)
        report[f"{name} CER and WER, greedy"] = transcription_errors(heard, tracks, None)
        if language is not None:
            report[f"{name} CER and WER, language model"] = transcription_errors(
                heard, tracks, language
            )
    return report


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(Score, "score", "score a checkpoint on the development data")
    torch.set_num_threads(settings.threads)
    report = score(settings)
    for name, value in report.items():
        print(f"{name:32} {value}")
    settings.report.parent.mkdir(parents=True, exist_ok=True)
    settings.report.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
