"""How an event looks on a wire that is ours to choose: bare, or in a CloudEvents envelope.

Source: CloudEvents 1.0.2, JSON event format; type names are ours under ``livesat.``.
"""

import json
from typing import Final, Literal

from pydantic import Field

from sinks.events import Event, dump
from sinks.sink import SinkSettings

MEDIA: Final = {"plain": "application/json", "cloudevents": "application/cloudevents+json"}
"""Media type of one event, by envelope."""


class EnvelopeSettings(SinkSettings, frozen=True):
    """Settings of a sink that sends JSON."""

    envelope: Literal["plain", "cloudevents"] = Field(
        default="plain", description="cloudevents: the event is the data of a CloudEvent 1.0."
    )

    def encode(self, event: Event) -> bytes:
        """One event → what is sent of it."""
        return dump(event) if self.envelope == "plain" else cloudevent(event)


def cloudevent(event: Event) -> bytes:
    """One event in its envelope: UTF-8 JSON, one line."""
    head = {
        "specversion": "1.0",
        "id": event.id,
        "source": f"/livesat/{event.stream_id}",
        "type": f"livesat.{event.type}",
        "subject": event.session_id,
        "time": event.wall_time.isoformat().replace("+00:00", "Z"),
        "datacontenttype": "application/json",
    }
    begin = json.dumps(head, separators=(",", ":"), ensure_ascii=False)
    return begin[:-1].encode() + b',"data":' + dump(event) + b"}"
