"""How right it was: diarization, word and verification errors, and percentiles.

The field's own scorers do the counting (pyannote.metrics, jiwer: the extra `eval`); they are
imported where they are used.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


class ScoreError(Exception):
    """A reference that cannot be read, or a scorer that is not installed."""


@dataclass(frozen=True, slots=True, order=True)
class Span:
    """Somebody speaks; seconds."""

    start: float
    end: float
    speaker: str


@dataclass(frozen=True, slots=True)
class Diarization:
    """Diarization error, in seconds of speech of one speaker (two at once count twice).

    Attributes:
        total_s: Reference speech.
        miss_s: Reference speech without a speaker.
        false_alarm_s: Speech of nobody.
        confusion_s: Speech of somebody else.
    """

    total_s: float = 0.0
    miss_s: float = 0.0
    false_alarm_s: float = 0.0
    confusion_s: float = 0.0

    @property
    def rate(self) -> float:
        """DER: all errors over the reference speech; NaN without any."""
        return _ratio(self.miss_s + self.false_alarm_s + self.confusion_s, self.total_s)

    @property
    def miss(self) -> float:
        """Missed part of the reference speech."""
        return _ratio(self.miss_s, self.total_s)

    @property
    def false_alarm(self) -> float:
        """False alarms over the reference speech."""
        return _ratio(self.false_alarm_s, self.total_s)

    @property
    def confusion(self) -> float:
        """Confused part of the reference speech."""
        return _ratio(self.confusion_s, self.total_s)

    def __add__(self, other: "Diarization") -> "Diarization":
        return Diarization(
            self.total_s + other.total_s,
            self.miss_s + other.miss_s,
            self.false_alarm_s + other.false_alarm_s,
            self.confusion_s + other.confusion_s,
        )


@dataclass(frozen=True, slots=True)
class Edits:
    """Edit distance of a transcript, in words or characters."""

    total: int = 0
    substitutions: int = 0
    deletions: int = 0
    insertions: int = 0

    @property
    def rate(self) -> float:
        """WER or CER; NaN without reference text."""
        return _ratio(self.substitutions + self.deletions + self.insertions, self.total)

    def __add__(self, other: "Edits") -> "Edits":
        return Edits(
            self.total + other.total,
            self.substitutions + other.substitutions,
            self.deletions + other.deletions,
            self.insertions + other.insertions,
        )


@dataclass(frozen=True, slots=True)
class EqualError:
    """Where false acceptances and false rejections are equal."""

    rate: float
    threshold: float


def read_rttm(path: Path) -> dict[str, list[Span]]:
    """RTTM → file id → its spans by time.

    Only SPEAKER lines are read; of other known types (SPKR-INFO, LEXEME, …) nothing is used.

    Raises:
        ScoreError: the file cannot be read, or a line is malformed: `file:line: …`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ScoreError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise ScoreError(f"{path}: expected text, got bytes that are not UTF-8") from error
    files: dict[str, list[Span]] = {}
    for number, line in enumerate(text.splitlines(), 1):
        columns = line.split()
        if not columns or columns[0].startswith(";;") or columns[0] in _OTHERS:
            continue
        where = f"{path}:{number}"
        if columns[0] != "SPEAKER":
            raise ScoreError(f"{where}: expected an RTTM line (SPEAKER …), got {line[:60]!r}")
        if len(columns) < 8:
            raise ScoreError(f"{where}: expected 10 columns, got {len(columns)}")
        start, duration = _number(columns[3], where), _number(columns[4], where)
        if start < 0 or duration < 0:
            raise ScoreError(f"{where}: expected times ≥ 0, got {columns[3]} {columns[4]}")
        files.setdefault(columns[1], []).append(Span(start, start + duration, columns[7]))
    return {name: sorted(spans) for name, spans in files.items()}


def write_rttm(path: Path, files: Mapping[str, Iterable[Span]]) -> None:
    """Writes spans as RTTM, milliseconds exact; white space in names becomes `_`."""
    lines = [
        f"SPEAKER {_word(name)} 1 {span.start:.3f} {round(span.end, 3) - round(span.start, 3):.3f}"
        f" <NA> <NA> {_word(span.speaker)} <NA> <NA>\n"
        for name, spans in files.items()
        for span in sorted(spans)
    ]
    path.write_text("".join(lines), encoding="utf-8")


def diarization_error(
    reference: Sequence[Span],
    hypothesis: Sequence[Span],
    duration_s: float,
    *,
    collar_s: float = 0.0,
) -> Diarization:
    """Speakers mapped one to one for the least error; overlapped speech counts.

    Args:
        reference: Who spoke.
        hypothesis: Who was said to speak.
        duration_s: Length of the recording; all of it is scored.
        collar_s: Not scored on either side of each reference boundary (NIST: 0.25).
    """
    metrics = _diarization()
    # pyannote's collar is the width of both sides together.
    scorer = metrics.DiarizationErrorRate(collar=2 * collar_s, skip_overlap=False)
    parts = scorer.compute_components(
        _annotation(reference), _annotation(hypothesis), uem=_timeline(duration_s)
    )
    return Diarization(
        total_s=float(parts["total"]),
        miss_s=float(parts["missed detection"]),
        false_alarm_s=float(parts["false alarm"]),
        confusion_s=float(parts["confusion"]),
    )


def speaker_mapping(reference: Sequence[Span], hypothesis: Sequence[Span]) -> dict[str, str]:
    """Hypothesis label → reference speaker, one to one, with the longest common time."""
    scorer = _diarization().DiarizationErrorRate()
    mapping = scorer.optimal_mapping(_annotation(reference), _annotation(hypothesis))
    return {str(label): str(speaker) for label, speaker in mapping.items()}


def speaker_count_error(reference: Sequence[Span], hypothesis: Sequence[Span]) -> int:
    """Speakers too many (positive) or too few."""
    return len({span.speaker for span in hypothesis}) - len({span.speaker for span in reference})


def label_swaps(reference: Sequence[Span], hypothesis: Sequence[Span]) -> int:
    """How often a reference speaker has another label than at his turn before.

    A turn's label is the one that covers most of it; turns that nobody covers are passed over.
    """
    swaps = 0
    for speaker in sorted({span.speaker for span in reference}):
        before: str | None = None
        for turn in sorted(span for span in reference if span.speaker == speaker):
            cover: dict[str, float] = {}
            for span in hypothesis:
                common = min(span.end, turn.end) - max(span.start, turn.start)
                if common > 0:
                    cover[span.speaker] = cover.get(span.speaker, 0.0) + common
            if not cover:
                continue
            label = max(sorted(cover), key=cover.__getitem__)
            swaps += before is not None and label != before
            before = label
    return swaps


def plain(text: str) -> str:
    """Text as words are compared: lower case, letters, digits and inner apostrophes only."""
    text = text.lower().replace("’", "'")
    text = re.sub(r"[^\w']|_", " ", text)
    words = (word.strip("'") for word in text.split())
    return " ".join(word for word in words if word)


def word_errors(reference: str, hypothesis: str) -> Edits:
    """Edits between `plain` words."""
    reference, hypothesis = plain(reference), plain(hypothesis)
    if not reference:
        return Edits(insertions=len(hypothesis.split()))
    return _edits(_jiwer().process_words(reference, hypothesis))


def character_errors(reference: str, hypothesis: str) -> Edits:
    """Edits between the characters of `plain` text, spaces among them."""
    reference, hypothesis = plain(reference), plain(hypothesis)
    if not reference:
        return Edits(insertions=len(hypothesis))
    return _edits(_jiwer().process_characters(reference, hypothesis))


def equal_error(scores: ArrayLike, same: ArrayLike) -> EqualError:
    """Equal error rate of a verification, and the threshold that gives it.

    Args:
        scores: [N] higher is more alike.
        same: [N] whether the two are the same.

    Raises:
        ValueError: shapes differ, or there are not both same and different pairs.
    """
    values, targets = np.asarray(scores, np.float64), np.asarray(same, bool)
    if values.shape != targets.shape or values.ndim != 1:
        raise ValueError(f"expected two [N], got {values.shape} and {targets.shape}")
    positives = int(targets.sum())
    negatives = len(targets) - positives
    if not positives or not negatives:
        raise ValueError(
            f"expected pairs of both kinds, got {positives} same and {negatives} different"
        )
    order = np.argsort(values, kind="stable")
    values, targets = values[order], targets[order]
    # A threshold before each distinct value, and one above all.
    first = np.flatnonzero(np.r_[True, values[1:] > values[:-1]])
    cuts = np.r_[first, len(values)]
    below = np.r_[0, np.cumsum(targets)]
    rejected = below[cuts] / positives
    accepted = (negatives - (cuts - below[cuts])) / negatives
    at = int(np.argmin(np.abs(rejected - accepted)))
    threshold = values[cuts[at]] if cuts[at] < len(values) else np.nextafter(values[-1], np.inf)
    return EqualError(float((rejected[at] + accepted[at]) / 2), float(threshold))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that this percentage is not above (nearest rank); NaN of nothing."""
    if not values:
        return math.nan
    ranked = sorted(values)
    return ranked[max(math.ceil(percent / 100 * len(ranked)) - 1, 0)]


_OTHERS = frozenset(
    (
        *("SEGMENT", "NOSCORE", "NO_RT_METADATA", "LEXEME", "NON-LEX", "NON-SPEECH"),
        *("FILLER", "EDIT", "IP", "SU", "CB", "A/P", "SPKR-INFO"),
    )
)
"""RTTM's other line types."""


def _edits(result: Any) -> Edits:
    substitutions, deletions = int(result.substitutions), int(result.deletions)
    total = int(result.hits) + substitutions + deletions
    return Edits(total, substitutions, deletions, int(result.insertions))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan


def _number(column: str, where: str) -> float:
    try:
        value = float(column)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ScoreError(f"{where}: expected seconds, got {column!r}")
    return value


def _word(name: str) -> str:
    return re.sub(r"\s", "_", name) or "_"


def _diarization() -> Any:
    try:
        from pyannote.metrics import diarization
    except ImportError as error:
        raise ScoreError(_MISSING.format("pyannote.metrics")) from error
    return diarization


def _jiwer() -> Any:
    try:
        import jiwer
    except ImportError as error:
        raise ScoreError(_MISSING.format("jiwer")) from error
    return jiwer


_MISSING = "{} is not installed; scoring needs the extra: pip install 'livesat[eval]'"


def _annotation(spans: Sequence[Span]) -> Any:
    from pyannote.core import Annotation, Segment

    annotation = Annotation()
    for track, span in enumerate(spans):
        annotation[Segment(span.start, span.end), track] = span.speaker
    return annotation


def _timeline(duration_s: float) -> Any:
    from pyannote.core import Segment, Timeline

    return Timeline([Segment(0, duration_s)])
