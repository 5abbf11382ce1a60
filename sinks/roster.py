"""Who spoke when, as it stands after every revision so far."""

from dataclasses import dataclass, field

from sinks.events import (
    Event,
    SpeakerIdentified,
    SpeakerRevised,
    TurnEnded,
    TurnStarted,
    TurnUpdated,
)


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

    def revises(self, event: SpeakerRevised, label: str, start: float, end: float) -> bool:
        """Whether a revision concerns what `label` said from `start` to `end`, in seconds."""
        if label != event.from_label:
            return False
        if event.reason == "merged":
            # One voice had two labels: whatever bore the one now bears the other.
            return True
        middle = (start + end) / 2
        turns = [self.turns[name] for name in event.revision_of if name in self.turns]
        return any(turn.start <= middle <= turn.end for turn in turns)

    def _revise(self, event: SpeakerRevised) -> bool:
        merged = event.reason == "merged"
        concerned = set(event.revision_of)
        changed = False
        for turn_id, turn in self.turns.items():
            if turn_id in concerned or (merged and turn.label == event.from_label):
                changed |= turn.label != event.to_label
                turn.label = event.to_label
        return changed
