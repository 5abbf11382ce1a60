"""Stage 4: what a checkpoint is worth on the development data, whole and streamed.

For a recording heard whole and for streams of three latencies: the diarization error on recorded
and on simulated conversations, equal error rate and open-set identification of the development
speakers, character and word error rate on their sentences. All of it goes through the code that
runs in the product: the tracks, the enrolment, the gallery, the decision.
"""

import asyncio
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import process_time
from typing import Any, Final

import numpy as np
import torch

from model.state import Window
from recipes.conversations import Clip, Floats, Meetings, read_clips, simulated_clips
from recipes.corpus import RATE, Corpus
from recipes.diarization import Diarized, diarize, judge_all, local_turns, stamp
from recipes.export import load_student, write_checkpoints
from recipes.hearing import LATENCIES, SHIPPED, Heard, listen
from recipes.publish import scores_block
from recipes.recognition import Decoder, beam, greedy, word_scores
from recipes.settings import Settings, from_arguments
from recipes.student import Shape, Student
from recipes.verification import (
    CUTS,
    OpenSet,
    Print,
    cut,
    dev_utterances,
    identification,
    trials,
    verification_error,
    voice_print,
)
from stream.batcher import Ready
from stream.chunker import Chunker
from stream.engine import Engine
from stream.inference import EngineSettings
from stream.tracks.language import LanguageModel
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings

HEADS: Final = ("diarization", "speaker", "ctc")
"""Folders of an exported checkpoint."""

QUICK_EACH: Final = 5
"""Utterances of each development speaker in a quick look: 60."""


class Score(Settings):
    """What is scored on what.

    Attributes:
        checkpoint: a run's checkpoint or an exported folder.
        data: folder of stage 1.
        conversations: folder of audio and RTTM pairs.
        meetings: the simulated conversations.
        open_set: identification with strangers about.
        tracks: thresholds; the built-in ones where the file does not exist.
        language_model: ARPA file of the beam search; null decodes greedily only.
        report: JSON file of the results; a table goes beside it.
        quick: a look in passing at a run that goes on: the shipped window, the recorded
            conversations and a part of the utterances; under a minute on one core.
        threads: compute threads.
    """

    checkpoint: Path
    data: Path
    conversations: Path
    meetings: Meetings = Meetings()
    open_set: OpenSet = OpenSet()
    tracks: Path
    language_model: Path | None = None
    report: Path
    quick: bool = False
    threads: int = 1


def decoders(settings: Score, tracks: TracksSettings) -> dict[str, Decoder]:
    """Name → how characters become text."""
    ways = {"greedy": greedy}
    if settings.language_model is not None:
        ways["language model"] = beam(tracks, LanguageModel.load(settings.language_model))
    return ways


def diarization_scores(
    student: Student, clips: Sequence[Clip], window: Window | None, tracks: TracksSettings
) -> tuple[Diarized, Diarized]:
    """Errors over some conversations: through the tracks, and of the frame head alone."""
    heard = [listen(student, clip.wave, window) for clip in clips]
    whole = (
        diarize(student, frames, tracks, len(clip.wave))
        for clip, frames in zip(clips, heard, strict=True)
    )
    local = (local_turns(frames.activity) for frames in heard)
    return judge_all(zip(clips, whole, strict=True)), judge_all(zip(clips, local, strict=True))


def utterance_scores(
    student: Student,
    corpus: Corpus,
    window: Window | None,
    *,
    utterances: Sequence[int],
    lengths: Iterable[str] = CUTS,
    open_set: tuple[OpenSet, TracksSettings, Floats | None] | None = None,
    ways: Mapping[str, Decoder] | None = None,
) -> dict[str, Any]:
    """Voices and words of the development speakers.

    Args:
        student: what is scored.
        corpus: the data.
        window: of the stream, or None.
        utterances: indices in the corpus.
        lengths: keys of `CUTS` to take the equal error rate at, where any utterance is so long.
        open_set: also identify, by these thresholds and this cohort.
        ways: name → decoder; None is greedily alone.
    """
    rates: dict[str, float] = {}
    whole: dict[int, Heard] = {}
    known: list[Print] = []
    for name in lengths:
        prints: list[Print] = []
        for index in utterances:
            wave = cut(corpus, index, CUTS[name])
            if wave is None:
                continue
            heard = listen(student, wave, window)
            if CUTS[name] is None:
                whole[index] = heard
            prints.append(voice_print(student, heard, corpus.utterances[index].speaker))
        if prints:
            rates[name] = verification_error(prints)
        if CUTS[name] is None:
            known = prints
    result: dict[str, Any] = {"eer": rates}
    if open_set is not None:
        assert known, "identification takes whole utterances"
        result["identification"] = identification(trials(known, *open_set))
    result["words"] = {
        way: word_scores(
            (corpus.utterances[index].text, decode(heard.characters))
            for index, heard in whole.items()
            if corpus.utterances[index].text
        )
        for way, decode in (ways or {"greedy": greedy}).items()
    }
    return result


async def core_share(folder: Path, wave: Floats, tracks: TracksSettings) -> float:
    """What one live stream takes of a core, encoder, heads and tracks, in per cent.

    Processor time, not time that passed: other work on the machine has no part in it.

    Args:
        folder: the exported checkpoint.
        wave: [N] what is streamed, with the engine's own window and one thread.
        tracks: thresholds.
    """
    checkpoint = tuple(str(folder / head) for head in HEADS)
    settings = EngineSettings(checkpoint=checkpoint, device="cpu", threads=1, slots=1)
    async with Engine(settings) as engine:
        chunker = Chunker(
            engine.loaded.chunk_samples, engine.loaded.lead, receptive=engine.loaded.receptive
        )
        track = Tracks(
            tracks, embed=engine.embed, vocabulary=engine.loaded.vocabulary, stamp=stamp()
        )
        slot = engine.acquire()
        began = process_time()
        for at in range(0, len(wave), 1600):
            for chunk in chunker.feed(wave[at : at + 1600]):
                ready = Ready(slot, chunk.start, chunk.samples, chunk.valid, chunk.first)
                track.step((await engine.run([ready]))[0])
        spent = process_time() - began
        engine.release(slot)
    return round(100 * spent / (len(wave) / RATE), 2)


def quick(
    student: Student, corpus: Corpus, clips: Sequence[Clip], tracks: TracksSettings
) -> dict[str, float]:
    """A look in passing, streamed with the shipped window: one number a task, in per cent."""
    whole, local = diarization_scores(student, clips, SHIPPED, tracks)
    some = dev_utterances(corpus, each=QUICK_EACH)
    found = utterance_scores(student, corpus, SHIPPED, utterances=some, lengths=("whole",))
    return {
        "DER": whole.to_dict()["der"],
        "DER, frame head alone": local.to_dict()["der"],
        "EER": found["eer"]["whole"],
        "CER": found["words"]["greedy"]["cer"],
        "WER": found["words"]["greedy"]["wer"],
    }


def score(settings: Score) -> dict[str, Any]:
    """All numbers of a checkpoint."""
    student = load_student(settings.checkpoint)
    corpus = Corpus(settings.data)
    tracks = TracksSettings.load(settings.tracks) if settings.tracks.exists() else TracksSettings()
    clips = read_clips(settings.conversations)
    if settings.quick:
        return {"checkpoint": str(settings.checkpoint), **quick(student, corpus, clips, tracks)}
    simulated = simulated_clips(corpus, settings.meetings)
    utterances = dev_utterances(corpus)
    beside = settings.checkpoint / "speaker" / "cohort.npy"
    cohort = np.load(beside, allow_pickle=False).astype(np.float32) if beside.exists() else None
    modes: dict[str, Any] = {}
    for name, window in LATENCIES.items():
        whole, local = diarization_scores(student, clips, window, tracks)
        groups = {
            str(count): diarization_scores(student, some, window, tracks)[0]
            for count, some in simulated.items()
        }
        groups["all"] = sum(groups.values(), Diarized())
        modes[name] = {
            "recorded": whole.to_dict(),
            "recorded_head": local.to_dict(),
            "simulated": {count: group.to_dict() for count, group in groups.items()},
            **utterance_scores(
                student,
                corpus,
                window,
                utterances=utterances,
                open_set=(settings.open_set, tracks, cohort),
                ways=decoders(settings, tracks),
            ),
        }
        print(summary(name, modes[name]), flush=True)
    with TemporaryDirectory() as scratch:
        folder = settings.checkpoint
        if not folder.is_dir():
            folder = Path(scratch)
            shape = Shape(**torch.load(settings.checkpoint, weights_only=True)["shape"])
            write_checkpoints(student, shape, folder)
        wave = np.concatenate([clip.wave for clip in clips])
        share = asyncio.run(core_share(folder, wave, tracks))
    return {
        "command": f"python -m recipes.score --set checkpoint={settings.checkpoint} "
        f"--set report={settings.report}",
        "parameters": sum(p.numel() for p in student.parameters()),
        "recorded_s": round(sum(clip.seconds for clip in clips), 1),
        "simulated_s": {
            str(count): round(sum(clip.seconds for clip in some), 1)
            for count, some in simulated.items()
        },
        "utterances": len(utterances),
        "speakers": len({corpus.utterances[index].speaker for index in utterances}),
        "shipped_ms": {"chunk": 20 * SHIPPED.chunk, "lookahead": 20 * SHIPPED.right},
        "core_percent": share,
        "modes": modes,
    }


def summary(name: str, mode: Mapping[str, Any]) -> str:
    """A line a mode while the scoring goes on."""
    recorded, simulated = mode["recorded"]["der"], mode["simulated"]["all"]["der"]
    return (
        f"{name:8} DER {recorded:5.1f} recorded, {simulated:5.1f} simulated; "
        f"EER {mode['eer']['whole']:5.2f}; CER {mode['words']['greedy']['cer']:5.1f}"
    )


def main() -> None:
    """Command line of the stage."""
    settings = from_arguments(
        Score, "score", "score a checkpoint on the development data", switches=("quick",)
    )
    torch.set_num_threads(settings.threads)
    report = score(settings)
    if settings.quick:
        print(json.dumps(report, indent=2))
        return
    settings.report.parent.mkdir(parents=True, exist_ok=True)
    settings.report.write_text(json.dumps(report, indent=2) + "\n")
    print(scores_block(report))


if __name__ == "__main__":
    main()
