"""The events subscribers receive: one frozen model a type, a union told apart by ``type``.

Times are float seconds on the session's clock, rounded to the microsecond. ``seq`` counts the
events of a session without a gap, so that a subscriber can tell a loss from silence; only a session
that outlived a kill of the daemon skips numbers, and says which in a `warning` of the code
``session.resumed``. Delivery is at least once: a subscriber drops what it has seen by ``id``, which
is ``session_id:seq``.

A new event is one class, one member of `Event` and one value of `EventType`. The JSON Schema and
the AsyncAPI document in ``docs/schema/`` are written from these classes by ``sinks.schema``.
"""

from typing import Annotated, Final, Literal, get_args

from pydantic import AwareDatetime, BaseModel, Field, TypeAdapter

SCHEMA_VERSION: Final = 1


class Model(BaseModel, frozen=True, extra="forbid", allow_inf_nan=False):
    """Frozen; an unknown key or a number JSON cannot hold is the producer's error.

    The options are class arguments because a type checker reads those: only a frozen field may be
    narrowed by a subclass, as every event narrows ``type``.
    """


class Envelope(Model, frozen=True):
    """What every event carries."""

    type: str
    v: Literal[1] = SCHEMA_VERSION
    session_id: str
    stream_id: str
    seq: int = Field(
        ge=0, description="Gap-free count of this session's events, but for a stated gap."
    )
    start: float = Field(ge=0, description="Seconds since the session opened.")
    end: float = Field(ge=0, description="Seconds since the session opened.")
    wall_time: AwareDatetime = Field(description="When the event was emitted (RFC 3339).")
    is_final: bool = Field(default=True, description="A final is never dropped; a partial may be.")
    lag_ms: float = Field(ge=0, description="From the capture of `end` to the emission, in ms.")

    @property
    def id(self) -> str:
        """Unique for all time: ``session:seq``."""
        return f"{self.session_id}:{self.seq}"


class Speaker(Model, frozen=True):
    """Who: the session's label, and the enrolled person if there is one."""

    label: str = Field(description='The session\'s name for this voice: "S1", "S2", …')
    identity: str | None = Field(default=None, description="Enrolled name; null is unknown.")
    score: float | None = Field(default=None, description="Cosine similarity to the label.")
    margin: float | None = Field(default=None, description="Score less the runner-up's.")


class Word(Model, frozen=True):
    """One word with its times on the session's clock."""

    word: str
    start: float
    end: float
    confidence: float = Field(ge=0, le=1)
    speaker: str | None = Field(default=None, description="Label of the speaker, if known.")


class Latency(Model, frozen=True):
    """Algorithmic latency of the encoder: a frame waits for its chunk and the look-ahead."""

    chunk_ms: int
    lookahead_ms: int


class SessionOpened(Envelope, frozen=True):
    """First event of a session."""

    type: Literal["session.opened"] = "session.opened"
    source: str
    checkpoint: list[str]
    latency: Latency
    resume_token: str


class SessionClosed(Envelope, frozen=True):
    """Last event of a session."""

    type: Literal["session.closed"] = "session.closed"
    reason: str
    totals: dict[str, float] = Field(description="audio_s, speakers, turns, words, gaps, …")


class SpeechStarted(Envelope, frozen=True):
    """Someone began to speak after silence."""

    type: Literal["speech.started"] = "speech.started"


class SpeechEnded(Envelope, frozen=True):
    """Everyone fell silent."""

    type: Literal["speech.ended"] = "speech.ended"


class TurnStarted(Envelope, frozen=True):
    """A speaker began a turn; the label is provisional until the voice is known."""

    type: Literal["turn.started"] = "turn.started"
    is_final: bool = False
    turn_id: str
    speaker: Speaker
    overlap: bool = False


class TurnUpdated(Envelope, frozen=True):
    """A turn goes on, or its speaker is known better."""

    type: Literal["turn.updated"] = "turn.updated"
    is_final: bool = False
    turn_id: str
    speaker: Speaker
    overlap: bool = False


class TurnEnded(Envelope, frozen=True):
    """A turn with its final bounds: what RTTM holds."""

    type: Literal["turn.ended"] = "turn.ended"
    turn_id: str
    speaker: Speaker
    overlap: bool = False


class SpeakerIdentified(Envelope, frozen=True):
    """A label was compared with the enrolled voices."""

    type: Literal["speaker.identified"] = "speaker.identified"
    speaker: str
    identity: str | None = Field(description="Enrolled name, or null: unknown.")
    score: float
    margin: float
    evidence_s: float


class SpeakerRevised(Envelope, frozen=True):
    """Past turns belong to another label than was said."""

    type: Literal["speaker.revised"] = "speaker.revised"
    revision_of: list[str] = Field(description="turn_id of every turn concerned.")
    from_label: str
    to_label: str
    reason: Literal["merged", "split", "identified"]


class TranscriptPartial(Envelope, frozen=True):
    """Words so far; later ones may replace them."""

    type: Literal["transcript.partial"] = "transcript.partial"
    is_final: bool = False
    text: str
    words: list[Word]
    turn_id: str | None = None


class TranscriptFinal(Envelope, frozen=True):
    """Words that will not change."""

    type: Literal["transcript.final"] = "transcript.final"
    text: str
    words: list[Word]
    turn_id: str | None = None


class Label(Envelope, frozen=True):
    """A window classified by a sequence-classification head."""

    type: Literal["label"] = "label"
    head: str
    label: str
    score: float
    window: float = Field(description="Seconds of audio the label speaks for.")


class Gap(Envelope, frozen=True):
    """Audio that was lost: the clock goes on, the samples do not exist."""

    type: Literal["gap"] = "gap"
    lost_samples: int = Field(ge=0)
    reason: Literal["overflow", "unplugged", "network", "non-finite"]


class Heartbeat(Envelope, frozen=True):
    """How the session is doing."""

    type: Literal["heartbeat"] = "heartbeat"
    is_final: bool = False
    audio_received_s: float
    audio_processed_s: float
    realtime_factor: float = Field(description="Seconds of compute per second of audio.")
    queue_depths: dict[str, int] = Field(default_factory=dict)
    dropped_partials: int = 0


class Warning_(Envelope, frozen=True):  # noqa: N801 - `Warning` is the builtin
    """Something a user should know of; the session goes on."""

    type: Literal["warning"] = "warning"
    code: str
    message: str


class Error_(Envelope, frozen=True):  # noqa: N801 - `Error` goes with it
    """Something failed; what, and what was expected."""

    type: Literal["error"] = "error"
    code: str
    message: str


Event = Annotated[
    SessionOpened
    | SessionClosed
    | SpeechStarted
    | SpeechEnded
    | TurnStarted
    | TurnUpdated
    | TurnEnded
    | SpeakerIdentified
    | SpeakerRevised
    | TranscriptPartial
    | TranscriptFinal
    | Label
    | Gap
    | Heartbeat
    | Warning_
    | Error_,
    Field(discriminator="type"),
]

EventType = Literal[
    "session.opened",
    "session.closed",
    "speech.started",
    "speech.ended",
    "turn.started",
    "turn.updated",
    "turn.ended",
    "speaker.identified",
    "speaker.revised",
    "transcript.partial",
    "transcript.final",
    "label",
    "gap",
    "heartbeat",
    "warning",
    "error",
]
"""Every value of ``type``, for settings that choose among events; a test keeps it in step."""

ADAPTER: Final[TypeAdapter[Event]] = TypeAdapter(Event)


def parse(data: str | bytes) -> Event:
    """One JSON object → its event.

    Raises:
        pydantic.ValidationError: unknown ``type``, or a field missing, extra or of a wrong type.
    """
    return ADAPTER.validate_json(data)


def dump(event: Event) -> bytes:
    """One event → the JSON object subscribers receive: UTF-8, one line, no newline."""
    return ADAPTER.dump_json(event)


def members() -> list[type[Envelope]]:
    """The classes of the union, in the order of the documentation."""
    union = get_args(Event)[0]
    return list(get_args(union))
