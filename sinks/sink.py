"""What a sink is: a place events go to, opened with ``async with`` and fed one event at a time."""

from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from typing import ClassVar, Protocol, runtime_checkable

from pydantic import BaseModel, Field

from sinks.events import Event, EventType


class SinkError(Exception):
    """A sink could not be opened or could not take an event; the message is for the user.

    Raised by `Sink.send` it means *not now*: the same sink may take the same event later.
    """


class Disconnected(SinkError):
    """The sink has lost its receiver and must be opened again before it takes an event."""


class Rejected(SinkError):
    """The receiver is there and refused this very event; others may pass."""


class Sink(Protocol):
    """An open sink."""

    async def send(self, event: Event) -> None:
        """Deliver one event; on return it is delivered.

        Called with one event at a time, in the order of ``seq``. A call that raised is repeated
        with the same event if that is final, so what it did before raising must bear repetition.

        Raises:
            SinkError: not delivered; which kind says what may help.
        """
        ...


@runtime_checkable
class Watched(Sink, Protocol):
    """A sink that notices by itself, between two events, that its receiver is gone."""

    async def lost(self) -> None:
        """Return once the connection is lost; wait for ever while it holds."""
        ...


@runtime_checkable
class Batched(Sink, Protocol):
    """A sink that takes several events at once."""

    @property
    def limit(self) -> int:
        """How many at most."""
        ...

    async def send_many(self, events: Sequence[Event]) -> None:
        """Deliver all of them, in order; on return they are delivered. As `send` otherwise."""
        ...


class SinkSettings(BaseModel, frozen=True, extra="forbid"):
    """Settings of one sink: what the configuration file holds under its name.

    A sink is one file with a subclass that narrows ``kind`` to a literal and implements `open`.
    """

    durable: ClassVar[bool] = True
    """Whether its finals wait in the outbox, if there is one, for a daemon that is started again.
    False for a sink whose output belongs to one run."""

    kind: str
    types: tuple[EventType, ...] | None = Field(
        default=None, description="Only events of these types; all when absent."
    )
    partials: bool = Field(
        default=True, description="Also events that later ones may replace (is_final false)."
    )

    def wants(self, event: Event) -> bool:
        """Whether the sink is to be given this event at all."""
        return (self.partials or event.is_final) and (
            self.types is None or event.type in self.types
        )

    def open(self) -> AbstractAsyncContextManager[Sink]:
        """Open the sink for the time of an ``async with``.

        Raises:
            SinkError: on entry; the message says what was tried and what was expected.
        """
        raise NotImplementedError(f"{type(self).__name__} does not implement open()")
