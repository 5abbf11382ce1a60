"""Events for tests: one of every type, and a session that counts them."""

from datetime import UTC, datetime, timedelta
from typing import Any

from sinks import events
from sinks.events import Event

OPENED_AT = datetime(2024, 5, 1, 12, 0, tzinfo=UTC)


class Talk:
    """One session: every call makes its next event."""

    def __init__(self, session_id: str = "s1", stream_id: str = "talk") -> None:
        self.session_id = session_id
        self.stream_id = stream_id
        self.seq = 0

    def envelope(self, start: float = 0.0, end: float | None = None) -> dict[str, Any]:
        end = start if end is None else end
        seq, self.seq = self.seq, self.seq + 1
        return {
            "session_id": self.session_id,
            "stream_id": self.stream_id,
            "seq": seq,
            "start": start,
            "end": end,
            "wall_time": OPENED_AT + timedelta(seconds=end),
            "lag_ms": 40.0,
        }

    def opened(self) -> Event:
        return events.SessionOpened(
            **self.envelope(),
            source="talk.wav",
            checkpoint=["embedded"],
            latency=events.Latency(chunk_ms=500, lookahead_ms=240),
            resume_token="r",
        )

    def closed(self, at: float = 60.0) -> Event:
        return events.SessionClosed(**self.envelope(at), reason="end", totals={"audio_s": at})

    def began(self, turn: str, label: str, start: float, identity: str | None = None) -> Event:
        speaker = events.Speaker(label=label, identity=identity)
        return events.TurnStarted(**self.envelope(start), turn_id=turn, speaker=speaker)

    def turn(
        self, turn: str, label: str, start: float, end: float, identity: str | None = None
    ) -> Event:
        speaker = events.Speaker(label=label, identity=identity)
        return events.TurnEnded(**self.envelope(start, end), turn_id=turn, speaker=speaker)

    def said(
        self, text: str, label: str | None, start: float, end: float, turn: str | None = None
    ) -> Event:
        """A final transcript whose words share its time evenly."""
        texts = text.split()
        step = (end - start) / len(texts)
        words = [
            events.Word(
                word=word,
                start=round(start + i * step, 3),
                end=round(start + (i + 1) * step, 3),
                confidence=0.9,
                speaker=label,
            )
            for i, word in enumerate(texts)
        ]
        return events.TranscriptFinal(
            **self.envelope(start, end), text=text, words=words, turn_id=turn
        )

    def heard(self, text: str, at: float = 0.0) -> Event:
        return events.TranscriptPartial(**self.envelope(at), text=text, words=[])

    def revised(
        self, turns: list[str], old: str, new: str, reason: Any = "merged", at: float = 0.0
    ) -> Event:
        return events.SpeakerRevised(
            **self.envelope(at), revision_of=turns, from_label=old, to_label=new, reason=reason
        )

    def identified(self, label: str, identity: str | None, at: float = 0.0) -> Event:
        return events.SpeakerIdentified(
            **self.envelope(at),
            speaker=label,
            identity=identity,
            score=0.71,
            margin=0.2,
            evidence_s=4.0,
        )

    def warning(self, message: str = "careful", at: float = 0.0) -> Event:
        return events.Warning_(**self.envelope(at), code="test", message=message)

    def every_type(self) -> list[Event]:
        return [
            self.opened(),
            events.SpeechStarted(**self.envelope(1.0)),
            self.began("t1", "S1", 1.0),
            events.TurnUpdated(
                **self.envelope(1.0, 2.0), turn_id="t1", speaker=events.Speaker(label="S1")
            ),
            self.heard("hel", 1.5),
            self.turn("t1", "S1", 1.0, 3.0),
            self.said("hello there", "S1", 1.0, 3.0, "t1"),
            self.identified("S1", "Ada", 3.0),
            self.revised(["t1"], "S1", "S2", at=3.5),
            events.SpeechEnded(**self.envelope(3.0)),
            events.Label(
                **self.envelope(3.0), head="emotion", label="happy", score=0.83, window=3.0
            ),
            events.Gap(**self.envelope(4.0), lost_samples=320, reason="overflow"),
            events.Heartbeat(
                **self.envelope(5.0),
                audio_received_s=5.0,
                audio_processed_s=4.5,
                realtime_factor=0.05,
                queue_depths={"log": 1},
            ),
            self.warning(at=5.0),
            events.Error_(**self.envelope(5.0), code="test", message="broken"),
            self.closed(6.0),
        ]
