"""`livesat eval`: recordings with references → how right and how late, streaming and offline.

Streaming is what a live source gets: the chunks, the look-ahead, the cached states. Offline is the
same heads and the same tracks on frames that saw the whole recording. The difference is the price
of being live. Rendering is the caller's.
"""

import asyncio
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, cast

from sinks.events import Event, Latency
from stream import clock
from stream.chunker import Chunker
from stream.engine import Engine
from stream.inference import EngineSettings
from stream.score import (
    Diarization,
    Edits,
    ScoreError,
    Span,
    character_errors,
    diarization_error,
    label_swaps,
    percentile,
    read_rttm,
    speaker_count_error,
    word_errors,
)
from stream.session import Session, Stamp
from stream.sources.file import FileSource
from stream.tracks.language import LanguageModel, open_language_model
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings

COLLAR_S: Final = 0.25
"""Not scored on either side of a reference boundary, in the second of the two error rates."""

OFFLINE_MAX_S: Final = 120
"""Longer recordings go through the offline pass in pieces of this, each with what the streaming
settings say of context: attention's memory grows with the square."""

LOOKAHEAD: Final = 3 / 8
"""The part of a latency that is look-ahead."""

AUDIO: Final = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".w64", ".caf")
TEXT: Final = (".stm", ".jsonl", ".seglst.json", ".json", ".txt")

_TIMED: Final = frozenset({"turn.started", "turn.ended", "transcript.partial", "transcript.final"})

NOTHING: Final = Diarization()


class EvalError(Exception):
    """A folder or a reference that cannot be evaluated: what was found, what was expected."""


@dataclass(frozen=True, slots=True)
class Recording:
    """One thing to evaluate on.

    Attributes:
        name: Its stem.
        audio: The audio file.
        speakers: Who really spoke.
        text: What was really said, in order of time; None without a transcript.
    """

    name: str
    audio: Path
    speakers: tuple[Span, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class Score:
    """One recording, or the sum of all, in one mode.

    Attributes:
        recordings: How many are summed up here.
        audio_s: Seconds of audio.
        compute_s: Seconds the model computed for them.
        error: Diarization error, all of the audio scored, labels as they stood in the end.
        error_collar: The same without `COLLAR_S` around reference boundaries.
        error_live: The same as `error` with the labels that finals had when they were emitted.
        speakers: Reference speakers.
        speakers_found: Labels given.
        count_error: Speakers too many or too few, added up over recordings.
        swaps: How often a reference speaker had another label than at the turn before.
        words: Word edits; None without a CTC head or a transcript.
        characters: Likewise.
        partials: Words told before they were final; one that is told otherwise later counts anew.
        partials_changed: How many of them were told otherwise later, or taken back.
        latencies_ms: From the end of what an event tells to its emission, on the audio's clock,
            plus the compute time of its step.
    """

    recordings: int = 0
    audio_s: float = 0.0
    compute_s: float = 0.0
    error: Diarization = NOTHING
    error_collar: Diarization = NOTHING
    error_live: Diarization = NOTHING
    speakers: int = 0
    speakers_found: int = 0
    count_error: int = 0
    swaps: int = 0
    words: Edits | None = None
    characters: Edits | None = None
    partials: int = 0
    partials_changed: int = 0
    latencies_ms: tuple[float, ...] = field(default=(), repr=False)

    @property
    def realtime_factor(self) -> float:
        """Compute seconds for a second of audio."""
        return self.compute_s / self.audio_s if self.audio_s else math.nan

    @property
    def flicker(self) -> float:
        """Share of the partial words that were changed later; NaN without any."""
        return self.partials_changed / self.partials if self.partials else math.nan

    def __add__(self, other: "Score") -> "Score":
        def both(one: Edits | None, two: Edits | None) -> Edits | None:
            return one + two if one and two else one or two

        return Score(
            recordings=self.recordings + other.recordings,
            audio_s=self.audio_s + other.audio_s,
            compute_s=self.compute_s + other.compute_s,
            error=self.error + other.error,
            error_collar=self.error_collar + other.error_collar,
            error_live=self.error_live + other.error_live,
            speakers=self.speakers + other.speakers,
            speakers_found=self.speakers_found + other.speakers_found,
            count_error=self.count_error + other.count_error,
            swaps=self.swaps + other.swaps,
            words=both(self.words, other.words),
            characters=both(self.characters, other.characters),
            partials=self.partials + other.partials,
            partials_changed=self.partials_changed + other.partials_changed,
            latencies_ms=self.latencies_ms + other.latencies_ms,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values; rates that do not exist are None."""
        return {
            "recordings": self.recordings,
            "audio_s": round(self.audio_s, 3),
            "realtime_factor": _rate(self.realtime_factor),
            "der": _parts(self.error),
            "der_collar": {"collar_s": COLLAR_S, **_parts(self.error_collar)},
            "der_live": _parts(self.error_live),
            "speakers": self.speakers,
            "speakers_found": self.speakers_found,
            "speaker_count_error": self.count_error,
            "label_swaps": self.swaps,
            "wer": None if self.words is None else _rate(self.words.rate),
            "cer": None if self.characters is None else _rate(self.characters.rate),
            "partial_words": self.partials,
            "partial_words_changed": _rate(self.flicker),
            "latency_p50_ms": _rate(percentile(self.latencies_ms, 50)),
            "latency_p99_ms": _rate(percentile(self.latencies_ms, 99)),
        }


@dataclass(frozen=True, slots=True)
class FileResult:
    """One recording."""

    name: str
    streaming: Score
    offline: Score | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "name": self.name,
            "streaming": self.streaming.to_dict(),
            "offline": None if self.offline is None else self.offline.to_dict(),
        }


@dataclass(frozen=True, slots=True)
class EvalResult:
    """All recordings, and with what they were heard."""

    checkpoint: tuple[str, ...]
    chunk_ms: int
    lookahead_ms: int
    left_ms: int
    decoder: str | None
    files: tuple[FileResult, ...]

    @property
    def latency_s(self) -> float:
        """Of the algorithm: chunk and look-ahead."""
        return (self.chunk_ms + self.lookahead_ms) / 1000

    @property
    def streaming(self) -> Score:
        """The sum over recordings."""
        return sum((file.streaming for file in self.files), Score())

    @property
    def offline(self) -> Score | None:
        """The sum over recordings; None if offline was not asked for."""
        scores = [file.offline for file in self.files if file.offline is not None]
        return sum(scores, Score()) if scores else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        offline = self.offline
        return {
            "checkpoint": list(self.checkpoint),
            "chunk_ms": self.chunk_ms,
            "lookahead_ms": self.lookahead_ms,
            "left_ms": self.left_ms,
            "decoder": self.decoder,
            "total": {
                "streaming": self.streaming.to_dict(),
                "offline": None if offline is None else offline.to_dict(),
            },
            "files": [file.to_dict() for file in self.files],
        }


def recordings(folder: Path) -> list[Recording]:
    """Pairs of audio and `.rttm` of one stem; beside them `.stm`, `.jsonl`, `.json` or `.txt`.

    Text is SegLST or JSON Lines with `text`/`words`, `start`/`start_time`; STM; or plain lines,
    where a speaker of the RTTM before a colon is taken off.

    Raises:
        EvalError: no folder, no pair in it, or a transcript that cannot be read.
        ScoreError: an RTTM that cannot be read.
    """
    if not folder.is_dir():
        raise EvalError(f"{folder}: expected a folder of recordings with references")
    found: list[Recording] = []
    for audio in sorted(folder.iterdir()):
        rttm = audio.with_suffix(".rttm")
        if audio.suffix.lower() not in AUDIO or not rttm.is_file():
            continue
        spans = _spans(rttm, audio.stem)
        found.append(Recording(audio.stem, audio, spans, _text(audio, spans)))
    if not found:
        raise EvalError(
            f"{folder}: expected pairs like talk.flac and talk.rttm, found none "
            f"(audio: {', '.join(AUDIO)})"
        )
    return found


async def evaluate(
    folder: Path,
    engine: EngineSettings,
    tracks: TracksSettings | None = None,
    *,
    offline: bool = True,
    on_file: Callable[[FileResult, int], None] | None = None,
) -> EvalResult:
    """Hears every recording of a folder and scores it.

    Args:
        folder: See `recordings`.
        engine: What to run, in which steps.
        tracks: Thresholds; those that are set go over the checkpoint's measured ones.
        offline: Hear everything a second time with the whole recording in view.
        on_file: Called after each recording, with how many there are.

    Raises:
        EvalError: see `recordings`.
        ScoreError: a reference is malformed, or a scorer is not installed.
        EngineError: the checkpoint or device cannot be used.
        LanguageModelError: the language model that is asked for cannot be used.
        SourceError: a recording cannot be read.
    """
    todo = await asyncio.to_thread(recordings, folder)
    done: list[FileResult] = []
    async with Engine(engine.model_copy(update={"slots": 1})) as live:
        settings = await asyncio.to_thread(thresholds, live, tracks)
        language = await asyncio.to_thread(
            open_language_model, settings.words, live.loaded.language_file, live.loaded.vocabulary
        )
        for recording in todo:
            streaming = await _hear(live, recording, settings, language)
            whole = await _offline(engine, recording, settings, language) if offline else None
            done.append(FileResult(recording.name, streaming, whole))
            if on_file is not None:
                on_file(done[-1], len(todo))
        return EvalResult(
            checkpoint=tuple(live.loaded.names),
            chunk_ms=engine.chunk_ms,
            lookahead_ms=engine.lookahead_ms,
            left_ms=engine.left_ms,
            decoder=None if live.loaded.vocabulary is None else "beam" if language else "greedy",
            files=tuple(done),
        )


async def evaluate_at(
    folder: Path,
    engine: EngineSettings,
    latencies_s: Sequence[float],
    tracks: TracksSettings | None = None,
    *,
    offline: bool = True,
    on_file: Callable[[FileResult, int], None] | None = None,
) -> list[EvalResult]:
    """`evaluate` at several algorithmic latencies; only the first result has the offline scores.

    Raises:
        EvalError: a latency too short to divide (see `at_latency`), or as `evaluate`.
    """
    windows = [at_latency(engine, latency_s) for latency_s in latencies_s]
    return [
        await evaluate(folder, window, tracks, offline=offline and number == 0, on_file=on_file)
        for number, window in enumerate(windows)
    ]


def at_latency(engine: EngineSettings, latency_s: float) -> EngineSettings:
    """These settings with the chunk and look-ahead that add up to this algorithmic latency.

    Three parts in eight are look-ahead, in whole frames: 0.64 s is 400 + 240 ms.

    Raises:
        EvalError: less than two frames, or more than the engine can do.
    """
    total = clock.frames(latency_s) if math.isfinite(latency_s) else 0
    if total < 2:
        raise EvalError(f"latency {latency_s:g} s: expected 0.04 or more")
    lookahead = round(total * LOOKAHEAD)
    frame_ms = 1000 // clock.FRAME_RATE
    chosen = {"chunk_ms": frame_ms * (total - lookahead), "lookahead_ms": frame_ms * lookahead}
    try:
        return EngineSettings.model_validate(engine.model_dump() | chosen)
    except ValueError as error:
        raise EvalError(
            f"latency {latency_s:g} s: expected what the engine can do, got {chosen}"
        ) from error


def thresholds(engine: Engine, given: TracksSettings | None = None) -> TracksSettings:
    """The thresholds measured for the engine's checkpoint, over them those that are given.

    Raises:
        EvalError: the checkpoint's `tracks.json` cannot be read.
    """
    if engine.loaded.tracks_file is None:
        return given or TracksSettings()
    overrides = {} if given is None else given.model_dump(exclude_unset=True)
    try:
        return TracksSettings.load(engine.loaded.tracks_file, overrides)
    except ValueError as error:
        raise EvalError(str(error)) from error


def turns(events: Iterable[Event], *, revised: bool = True) -> list[Span]:
    """Ended turns as spans, with their labels as they stand in the end, or as first said."""
    spans: dict[str, Span] = {}
    for event in events:
        if event.type == "turn.ended":
            spans[event.turn_id] = Span(event.start, event.end, event.speaker.label)
        elif event.type == "speaker.revised" and revised and event.reason != "identified":
            for turn in event.revision_of:
                if turn in spans:
                    spans[turn] = replace(spans[turn], speaker=event.to_label)
    return sorted(spans.values())


def transcript(events: Iterable[Event]) -> str:
    """All final text, in order of time."""
    finals = [event for event in events if event.type == "transcript.final"]
    return " ".join(event.text for event in sorted(finals, key=lambda event: event.start))


def flicker(events: Iterable[Event]) -> tuple[int, int]:
    """Words told in partials, and how many of them a later partial or final took back.

    A word is told when a partial has it at a place of its transcript where the last one had another
    or none. One that grows is changed, too. A final may have the first words of a partial only.
    """
    told = changed = 0
    shown = list[str]()
    for event in events:
        if event.type == "transcript.partial":
            words = [word.word for word in event.words]
            same = sum(one == other for one, other in zip(shown, words, strict=False))
            told += len(words) - same
            changed += len(shown) - same
            shown = words
        elif event.type == "transcript.final":
            words = [word.word for word in event.words]
            changed += sum(one != other for one, other in zip(shown, words, strict=False))
            shown = shown[len(words) :]
    return told, changed


def score(
    recording: Recording,
    events: Sequence[Event],
    *,
    audio_s: float,
    compute_s: float,
    latencies_ms: Sequence[float],
    words: bool,
) -> Score:
    """What was said of a recording against what was so.

    Args:
        recording: The reference.
        events: All events of its session.
        audio_s: Its length.
        compute_s: Seconds of compute.
        latencies_ms: See `Score`.
        words: Whether there is a CTC head whose words can be scored.
    """
    reference, found = recording.speakers, turns(events)
    said = transcript(events)
    text = recording.text if words else None
    partials, changed = flicker(events)
    return Score(
        recordings=1,
        audio_s=audio_s,
        compute_s=compute_s,
        error=diarization_error(reference, found, audio_s),
        error_collar=diarization_error(reference, found, audio_s, collar_s=COLLAR_S),
        error_live=diarization_error(reference, turns(events, revised=False), audio_s),
        speakers=len({span.speaker for span in reference}),
        speakers_found=len({span.speaker for span in found}),
        count_error=abs(speaker_count_error(reference, found)),
        swaps=label_swaps(reference, found),
        words=None if text is None else word_errors(text, said),
        characters=None if text is None else character_errors(text, said),
        partials=partials,
        partials_changed=changed,
        latencies_ms=tuple(latencies_ms),
    )


async def _hear(
    engine: Engine,
    recording: Recording,
    settings: TracksSettings,
    language: LanguageModel | None,
) -> Score:
    """A recording as a stream."""

    def tracks(stamp: Stamp) -> Tracks:
        return Tracks(
            settings,
            embed=engine.embed if engine.has_voice else None,
            vocabulary=engine.loaded.vocabulary,
            language=language,
            stamp=stamp,
            classes=engine.loaded.labels,
        )

    source = FileSource(path=recording.audio)
    slot = engine.acquire()
    try:
        session = Session(
            stream_id=recording.name,
            source=source.name,
            checkpoint=engine.loaded.names,
            latency=Latency(
                chunk_ms=engine.settings.chunk_ms, lookahead_ms=engine.settings.lookahead_ms
            ),
            slot=slot,
            chunker=Chunker(
                engine.loaded.chunk_samples, engine.loaded.lead, receptive=engine.loaded.receptive
            ),
            tracks=tracks,
            heartbeat_s=0,
        )
        before_s = engine.stats.compute_s
        events = session.opened()
        latencies_ms: list[float] = []
        async with source.open() as blocks:
            async for block in blocks:
                more, ready = session.feed(block)
                events += more
                for chunk in ready:
                    at_s = clock.seconds(chunk.start + len(chunk.samples))
                    new = session.take((await engine.run([chunk]))[0])
                    events += new
                    latencies_ms += [
                        1000 * (max(at_s - event.end, 0) + engine.stats.last_s)
                        for event in new
                        if event.type in _TIMED
                    ]
        for chunk in session.close():
            events += session.take((await engine.run([chunk]))[0])
        events += session.closed("end")
    finally:
        engine.release(slot)
    return await asyncio.to_thread(
        lambda: score(
            recording,
            events,
            audio_s=clock.seconds(session.received),
            compute_s=engine.stats.compute_s - before_s,
            latencies_ms=latencies_ms,
            words=engine.loaded.vocabulary is not None,
        )
    )


async def _offline(
    settings: EngineSettings,
    recording: Recording,
    tracks: TracksSettings,
    language: LanguageModel | None,
) -> Score:
    """A recording in one piece: no past to cache, nothing of the future hidden."""
    import soundfile

    try:
        duration_s = await asyncio.to_thread(lambda: soundfile.info(recording.audio).duration)
    except (OSError, soundfile.LibsndfileError) as error:
        raise EvalError(f"{recording.audio}: cannot be read as audio ({error})") from error
    whole = duration_s <= OFFLINE_MAX_S
    # Room for the frames that a flush would bring out: one step does all.
    frames = math.ceil(min(duration_s, OFFLINE_MAX_S) * clock.FRAME_RATE) + 64
    window = {"chunk_ms": frames * 1000 // clock.FRAME_RATE, "slots": 1}
    if whole:
        window |= {"lookahead_ms": 0, "left_ms": 0}
    async with Engine(settings.model_copy(update=window)) as engine:
        result = await _hear(engine, recording, tracks, language)
    return replace(result, latencies_ms=(), partials=0, partials_changed=0)


def _spans(rttm: Path, stem: str) -> tuple[Span, ...]:
    files = read_rttm(rttm)
    if stem in files:
        return tuple(files[stem])
    if len(files) > 1:
        raise ScoreError(f"{rttm}: expected file id {stem!r}, got {', '.join(sorted(files))}")
    return tuple(next(iter(files.values()), ()))


def _text(audio: Path, spans: Sequence[Span]) -> str | None:
    for suffix in TEXT:
        file = audio.with_suffix(suffix)
        if not file.is_file():
            continue
        try:
            content = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise EvalError(f"{file}: cannot be read as text") from error
        if suffix == ".stm":
            return _stm(file, content)
        if suffix == ".txt":
            return _plain(content, {span.speaker for span in spans})
        return _segments(file, content, lines=suffix == ".jsonl")
    return None


def _plain(content: str, speakers: set[str]) -> str:
    lines: list[str] = []
    for line in content.splitlines():
        name, colon, rest = line.partition(":")
        lines.append(rest.strip() if colon and name.strip() in speakers else line)
    return " ".join(lines)


def _stm(file: Path, content: str) -> str:
    segments: list[tuple[float, str]] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip() or line.startswith(";;"):
            continue
        columns = line.split(maxsplit=5)
        try:
            start = float(columns[3])
        except (IndexError, ValueError) as error:
            raise EvalError(
                f"{file}:{number}: expected an STM line (file channel speaker start end text), "
                f"got {line[:60]!r}"
            ) from error
        text = columns[5] if len(columns) > 5 else ""
        if text.startswith("<"):
            text = text.partition(">")[2].strip()
        if "IGNORE_TIME_SEGMENT" not in text.upper():
            segments.append((start, text))
    return " ".join(text for _, text in sorted(segments, key=lambda segment: segment[0]))


def _segments(file: Path, content: str, *, lines: bool) -> str:
    segments: list[tuple[float, str]] = []
    try:
        if lines:
            data = [json.loads(line) for line in content.splitlines() if line.strip()]
        else:
            data = json.loads(content)
        for item in cast("list[Mapping[str, Any]]", data):
            text = item["text"] if "text" in item else item["words"]
            start = item["start"] if "start" in item else item["start_time"]
            segments.append((float(start), str(text)))
    except (ValueError, KeyError, TypeError) as error:
        raise EvalError(
            f"{file}: expected segments with text (or words) and start (or start_time): {error!r}"
        ) from error
    return " ".join(text for _, text in sorted(segments, key=lambda segment: segment[0]))


def _parts(error: Diarization) -> dict[str, float | None]:
    return {
        "rate": _rate(error.rate),
        "miss": _rate(error.miss),
        "false_alarm": _rate(error.false_alarm),
        "confusion": _rate(error.confusion),
        "speech_s": round(error.total_s, 3),
    }


def _rate(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)
