"""Who spoke when, as it stands after every revision so far."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from sinks.events import (
    Event,
    SpeakerIdentified,
    SpeakerRevised,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
    Word,
)

APART_S: Final = 0.001
"""Times that a file holds in milliseconds are this far from those of the events at most."""


@dataclass(slots=True)
class Turn:
    """One turn: its bounds in seconds and the label it has now."""

    start: float
    end: float
    label: str


@dataclass(slots=True)
class Names:
    """Who the labels of one session are; `hear` with the same event twice changes nothing more."""

    identities: dict[str, str] = field(default_factory=dict[str, str])

    def name(self, label: str) -> str:
        """What a label is called: the enrolled person if there is one, else the label."""
        return self.identities.get(label, label)

    def hear(self, event: Event) -> bool:
        """Take in one event → whether a label has another name now."""
        match event:
            case TurnStarted() | TurnUpdated() | TurnEnded():
                speaker = event.speaker
                return speaker.identity is not None and self._identify(
                    speaker.label, speaker.identity
                )
            case SpeakerIdentified():
                return self._identify(event.speaker, event.identity)
            case _:
                return False

    def _identify(self, label: str, identity: str | None) -> bool:
        if self.identities.get(label) == identity:
            return False
        if identity is None:
            del self.identities[label]
        else:
            self.identities[label] = identity
        return True


@dataclass(frozen=True, slots=True)
class Revision:
    """What one `speaker.revised` concerns.

    Attributes:
        label: The label that was wrong.
        merged: One voice had two labels: whatever bore the one bears the other.
        turns: turn_id of the turns it lists.
        spans: From when to when those are, in seconds, as far as they are known.
    """

    label: str
    merged: bool
    turns: frozenset[str]
    spans: list[tuple[float, float]]

    def concerns(self, label: str | None, turn_id: str | None, start: float, end: float) -> bool:
        """Whether it concerns what `label` said from `start` to `end`, in seconds."""
        if label is None or label != self.label:
            return False
        middle = (start + end) / 2
        return (
            self.merged
            or turn_id in self.turns
            or any(begin <= middle <= over for begin, over in self.spans)
        )


@dataclass(slots=True)
class Roster(Names):
    """Turns and names of one session; `update` with the same event twice changes nothing more."""

    turns: dict[str, Turn] = field(default_factory=dict[str, Turn])

    def update(self, event: Event) -> bool:
        """Take in one event.

        Returns:
            Whether something said before now has another name.
        """
        match event:
            case TurnStarted() | TurnUpdated() | TurnEnded():
                self.turns[event.turn_id] = Turn(event.start, event.end, event.speaker.label)
            case SpeakerRevised():
                return self._revise(event)
            case _:
                pass
        return self.hear(event)

    def revision(self, event: SpeakerRevised) -> "Revision":
        """What a revision concerns; ask before it is taken in."""
        turns = [self.turns[name] for name in event.revision_of if name in self.turns]
        spans = [(turn.start, turn.end) for turn in turns]
        merged = event.reason == "merged"
        return Revision(event.from_label, merged, frozenset(event.revision_of), spans)

    def _revise(self, event: SpeakerRevised) -> bool:
        merged = event.reason == "merged"
        concerned = set(event.revision_of)
        changed = False
        for turn_id, turn in self.turns.items():
            if turn_id in concerned or (merged and turn.label == event.from_label):
                changed |= turn.label != event.to_label
                turn.label = event.to_label
        return changed


@dataclass(frozen=True, slots=True)
class Said:
    """Words that a file held when it was opened, and from when to when, in seconds."""

    start: float
    end: float
    text: str

    def holds(self, word: Word) -> bool:
        """Whether the word is one of these."""
        within = self.start - APART_S <= word.start and word.end <= self.end + APART_S
        return within and set(word.word.split()) <= set(self.text.split())


def said_before(words: Sequence[Word], earlier: Sequence[Said]) -> bool:
    """Whether a file holds a whole transcript: after a kill the last events are sent again."""
    begin = min((word.start for word in words), default=0.0)
    late = [each for each in earlier if each.end >= begin]
    return all(any(each.holds(word) for each in late) for word in words)
