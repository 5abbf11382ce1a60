"""Thresholds of the tracks: what `tracks.json` beside a checkpoint and `tracks:` in a config hold.

They belong to a checkpoint: probabilities and cosines of another model are on another scale.
Durations are milliseconds and are rounded to whole 20 ms frames.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from stream.clock import frames


class Settings(BaseModel):
    """Frozen, and closed to unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class TurnsSettings(Settings):
    """Frame activity → turns of one local speaker."""

    onset: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="Speech begins when the channels' probabilities add up to this.",
    )
    offset: float = Field(default=0.4, gt=0, lt=1, description="It ends when below this.")
    overlap_onset: float = Field(
        default=0.5,
        gt=0,
        lt=1,
        description="A further channel joins in when they add up to this beyond those that talk.",
    )
    overlap_offset: float = Field(default=0.4, gt=0, lt=1, description="It ends when below this.")
    hold: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="Lead in probability by which a channel takes over from one that talks.",
    )
    min_on_ms: int = Field(
        default=200,
        ge=20,
        description="A shorter turn never was; a frame counts by its probability.",
    )
    min_off_ms: int = Field(
        default=300,
        ge=20,
        description="A shorter pause does not end a turn; a frame counts by what it lacks of the "
        "offset.",
    )
    give_way_ms: int = Field(
        default=300,
        ge=20,
        description="The same for a pause in which another speaker talks: it ends a turn sooner.",
    )
    max_turn_ms: int = Field(
        default=20_000, ge=1_000, description="A longer turn is cut, so that a final comes."
    )
    update_ms: int = Field(
        default=500, ge=100, description="Between looks at the voice of a running turn."
    )
    change_window_ms: int = Field(
        default=1_500, ge=200, description="Recent voice compared with the turn's before it."
    )
    change_threshold: float | None = Field(
        default=0.1,
        description="Cosine of the two below which a turn is cut there; null never cuts.",
    )
    change_margin: float | None = Field(
        default=0.3,
        ge=0,
        description="A turn is also cut where another known speaker is nearer by this much.",
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name, offset, onset in (
            ("offset", self.offset, self.onset),
            ("overlap_offset", self.overlap_offset, self.overlap_onset),
        ):
            if offset > onset:
                raise ValueError(f"expected {name} ≤ its onset, got {offset} > {onset}")
        return self


class SpeakersSettings(Settings):
    """Turn embeddings → the session's speakers.

    Variances are of centred embeddings of length 1, all dimensions summed (`resemblance.py`).
    """

    mean: tuple[float, ...] | None = Field(
        default=None, description="Subtracted from every embedding: the training data's mean."
    )
    between: float = Field(
        default=0.5, gt=0, description="Variance of voices from speaker to speaker."
    )
    within: float = Field(
        default=0.1, gt=0, description="Variance from turn to turn of one, were turns endless."
    )
    within_s: float = Field(
        default=0.75, ge=0, description="What that of a turn of one second has more."
    )
    dimensions: float = Field(
        default=20, gt=0, description="Dimensions in which voices differ independently."
    )
    threshold: float = Field(
        default=-2.0,
        description="Log-likelihood ratio from which two turns are one speaker's.",
    )
    sure_ms: int = Field(
        default=800,
        ge=0,
        description="Clean speech below which a turn founds no speaker and its label is a guess.",
    )
    revise_margin: float = Field(
        default=1.0,
        ge=0,
        description="The past is told anew where that is better by this logarithm.",
    )
    channel_bonus: float = Field(
        default=1.0,
        ge=0,
        description="Added to the ratio for the speaker whom this local channel had last.",
    )
    channel_malus: float = Field(
        default=1.0, ge=0, description="Taken off for speakers whom other channels had last."
    )
    channel_memory_ms: int = Field(
        default=5_000, ge=0, description="For how long a silent channel counts in both."
    )
    rival_ms: int = Field(
        default=200, ge=20, description="Overlap from which two turns are not given one speaker."
    )
    cannot_link_ms: int = Field(
        default=400, ge=20, description="Overlap from which no second thought makes two one."
    )
    history_turns: int = Field(
        default=64, ge=16, description="Past turns whose embeddings are kept for revision."
    )


class VoicesSettings(Settings):
    """Speakers → enrolled people."""

    threshold: float = Field(
        default=0.55, ge=-1, le=1, description="Score from which a speaker is an enrolled person."
    )
    cohort: int = Field(
        default=40,
        ge=0,
        description="Nearest voices of the checkpoint's cohort that a score is measured against; "
        "0, or a checkpoint without one, leaves it the cosine.",
    )
    margin: float = Field(
        default=0.08, ge=0, description="… who must lead the runner-up by this much."
    )
    keep: float = Field(
        default=0.05, ge=0, description="A given identity is kept down to this much below both."
    )
    evidence_ms: int = Field(
        default=2_000, ge=0, description="Clean speech before identity is decided, or unknown."
    )


class WordsSettings(Settings):
    """CTC output → words."""

    case: Literal["lower", "keep"] = Field(
        default="lower", description="The vocabulary's case is kept, or made lower."
    )
    decoder: Literal["auto", "greedy", "beam"] = Field(
        default="auto",
        description="greedy; beam, with a language model; auto: beam where that can be had.",
    )
    language_model: Path | None = Field(
        default=None, description="ARPA file for the beam; null is the checkpoint's own."
    )
    beam_width: int = Field(default=24, ge=1, le=512, description="Texts kept at a time.")
    alpha: float = Field(
        default=0.8, ge=0, le=10, description="Weight of the language model in the beam."
    )
    beta: float = Field(
        default=1.5, ge=-20, le=20, description="Bonus of a word in the beam, in nats."
    )
    commit_ms: int = Field(
        default=1_000,
        ge=200,
        le=10_000,
        description="A word becomes certain this long after its end at the latest.",
    )
    stable_ms: int = Field(
        default=300,
        ge=0,
        le=5_000,
        description="An uncertain word appears in partials once it has read the same this long.",
    )
    stable_share: float = Field(
        default=0.98,
        ge=0,
        le=1,
        description="… and while hypotheses of this probability agree on it.",
    )
    partial_ms: int = Field(default=200, ge=20, description="The least time between partials.")
    word_gap_ms: int = Field(
        default=600, ge=40, description="A word without a delimiter ends after this much silence."
    )
    segment_gap_ms: int = Field(
        default=800,
        ge=40,
        description="A transcript becomes final after this much silence, once its speaker is sure.",
    )
    settle_ms: int = Field(
        default=120, ge=20, description="… or this much, when its turn has ended."
    )
    max_segment_ms: int = Field(
        default=15_000, ge=1_000, description="… or when it is longer than this, after a word."
    )
    reach_ms: int = Field(
        default=400, ge=0, description="A word this far from any turn still takes its speaker."
    )


class LabelsSettings(Settings):
    """Sequence-classification logits → label events."""

    window_ms: int = Field(default=3_000, ge=20, description="Audio one label speaks for.")
    hop_ms: int = Field(default=1_000, ge=20, description="From one window to the next.")
    threshold: float = Field(default=0.0, ge=0, le=1, description="Probabilities below are unsaid.")


class TracksSettings(Settings):
    """All thresholds; the defaults are usable, those in a checkpoint's `tracks.json` measured."""

    turns: TurnsSettings = TurnsSettings()
    speakers: SpeakersSettings = SpeakersSettings()
    voices: VoicesSettings = VoicesSettings()
    words: WordsSettings = WordsSettings()
    labels: LabelsSettings = LabelsSettings()

    @classmethod
    def load(cls, path: Path, overrides: Mapping[str, Any] | None = None) -> Self:
        """Reads `tracks.json`, over it `overrides` (nested like the file).

        Raises:
            ValueError: the file is not JSON, or a key is unknown or of a wrong type; the message
                names the file and the key.
            pydantic.ValidationError: the same of `overrides`.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: expected JSON, got {error}") from error
        try:
            file = cls.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in first["loc"])
            raise ValueError(f"{path}: {key or 'all of it'}: {first['msg']}") from error
        return file.over(overrides) if overrides else file

    def over(self, overrides: Mapping[str, Any]) -> Self:
        """These settings with some replaced, nested as in `tracks.json`.

        Raises:
            pydantic.ValidationError: a key is unknown or of a wrong type.
        """
        return self.model_validate(merged(self.model_dump(), overrides))

    def save(self, path: Path) -> None:
        """Writes `tracks.json`, every threshold explicit."""
        path.write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")


def merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings, the second's leaves over the first's."""
    result = dict(below)
    for key, value in above.items():
        lower = result.get(key)
        both = isinstance(value, dict) and isinstance(lower, dict)
        result[key] = merged(cast("dict[str, Any]", lower), value) if both else value
    return result


def hops(ms: int) -> int:
    """Milliseconds → whole frames, at least one unless 0."""
    return 0 if ms == 0 else max(1, frames(ms / 1000))
