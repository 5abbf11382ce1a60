"""The documents subscribers build on, written from the models.

``python -m sinks.schema`` writes ``docs/schema/events.schema.json`` (JSON Schema, draft 2020-12)
and ``docs/schema/asyncapi.yaml`` (AsyncAPI 3.0); with ``--check`` it compares instead and fails if
a committed file is out of step.

Both describe what we send, so a field with a default is required in them; and neither forbids
fields it does not know, so that a subscriber that validates survives a field added within ``v`` 1.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import yaml
from pydantic.json_schema import models_json_schema

from sinks.events import ADAPTER, Envelope, members
from sinks.mqtt import PORT, StreamState

FOLDER: Final = Path("docs/schema")
DIALECT: Final = "https://json-schema.org/draft/2020-12/schema"

Json = dict[str, Any]


def _open(schema: Any) -> Any:
    """A schema without its bans on unknown fields."""
    if isinstance(schema, dict):
        return {k: _open(v) for k, v in schema.items() if k != "additionalProperties" or v}
    if isinstance(schema, list):
        return [_open(item) for item in schema]
    return schema


def json_schema() -> Json:
    """JSON Schema of an event as it is sent: any member of the union, told apart by ``type``."""
    schema = ADAPTER.json_schema(mode="serialization")
    return {"$schema": DIALECT, "title": "Event", **_open(schema)}


def _type(event: type[Envelope]) -> str:
    return event.model_fields["type"].default


def _one_paragraph(text: str | None) -> str:
    return " ".join((text or "").split())


def asyncapi() -> Json:
    """AsyncAPI 3.0 document of the MQTT, NATS, Kafka and Redis sinks and of the daemon's feed."""
    events = members()
    finals = [event for event in events if event.model_fields["is_final"].default]
    partials = [event for event in events if event not in finals]
    _, definitions = models_json_schema(
        [(model, "serialization") for model in (*events, StreamState)],
        ref_template="#/components/schemas/{model}",
    )
    headers = {
        "type": "object",
        "description": "MQTT v5 user properties.",
        "required": ["session_id", "seq", "type"],
        "properties": {
            "session_id": {"type": "string"},
            "seq": {"type": "string", "description": "Decimal digits."},
            "type": {"type": "string"},
        },
    }
    messages: Json = {
        _type(event): {
            "name": _type(event),
            "title": _one_paragraph(event.__doc__),
            "contentType": "application/json",
            "headers": {"$ref": "#/components/schemas/UserProperties"},
            "payload": {"$ref": f"#/components/schemas/{event.__name__}"},
        }
        for event in events
    }
    messages["state"] = {
        "name": "state",
        "title": _one_paragraph(StreamState.__doc__),
        "contentType": "application/json",
        "headers": {"$ref": "#/components/schemas/UserProperties"},
        "payload": {"$ref": "#/components/schemas/StreamState"},
    }
    messages["status"] = {
        "name": "status",
        "title": "Whether the node is there; offline is also its last will.",
        "contentType": "text/plain",
        "payload": {"type": "string", "enum": ["online", "offline"]},
    }
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "livesat events",
            "version": "1.0.0",
            "description": "Who spoke when, which enrolled person, what was said. Delivery is at "
            "least once: drop what you have seen by session_id:seq. seq counts the events of a "
            "session without a gap.",
            "license": {
                "name": "Apache-2.0",
                "url": "https://www.apache.org/licenses/LICENSE-2.0",
            },
        },
        "defaultContentType": "application/json",
        "servers": {
            "broker": {
                "host": f"localhost:{PORT}",
                "protocol": "mqtt",
                "protocolVersion": "5.0",
                "description": "The broker of the mqtt sink's settings.",
            },
            "nats": {
                "host": "localhost:4222",
                "protocol": "nats",
                "description": "The server of the nats sink's settings, with JetStream.",
            },
            "kafka": {
                "host": "localhost:9092",
                "protocol": "kafka",
                "description": "The cluster of the kafka sink's settings.",
            },
            "redis": {
                "host": "localhost:6379",
                "protocol": "redis",
                "description": "The server of the redis sink's settings; entries of streams.",
            },
            "daemon": {
                "host": "localhost:8080",
                "protocol": "ws",
                "description": "The daemon's own server; over HTTP the same as server-sent events.",
            },
        },
        "channels": {
            "event": _channel(
                "{root}/v1/{node}/{stream}/event/{type}", "Final events.", map(_type, finals)
            ),
            "partial": _channel(
                "{root}/v1/{node}/{stream}/partial/{type}",
                "Events that later ones may replace.",
                map(_type, partials),
            ),
            "state": _channel(
                "{root}/v1/{node}/{stream}/state", "The state of a stream.", ["state"]
            ),
            "status": _channel("{root}/v1/{node}/status", "The state of a node.", ["status"]),
            "natsEvent": _channel(
                "{root}.v1.{node}.{stream}.event.{type}",
                "Final events, stored by JetStream; Nats-Msg-Id is session_id:seq.",
                map(_type, finals),
                "nats",
            ),
            "natsPartial": _channel(
                "{root}.v1.{node}.{stream}.partial.{type}",
                "Events that later ones may replace; nobody stores them.",
                map(_type, partials),
                "nats",
            ),
            "kafka": _channel(
                "livesat.events.v1", "Records keyed by session_id.", map(_type, events), "kafka"
            ),
            "redis": _channel(
                "{root}:v1:{stream}", "A Redis Stream; field event.", map(_type, events), "redis"
            ),
            "feed": _channel(
                "/v1/events", "Everything the daemon emits.", map(_type, events), "daemon"
            ),
        },
        "operations": {
            "sendEvent": _operation("event", qos=1, retain=False),
            "sendPartial": _operation("partial", qos=0, retain=False),
            "sendState": _operation("state", qos=1, retain=True),
            "sendStatus": _operation("status", qos=1, retain=True),
            **{
                f"send{name[0].upper()}{name[1:]}": {
                    "action": "send",
                    "channel": {"$ref": f"#/channels/{name}"},
                }
                for name in ("natsEvent", "natsPartial", "kafka", "redis", "feed")
            },
        },
        "components": {
            "messages": messages,
            "schemas": {"UserProperties": headers, **_open(definitions["$defs"])},
            "parameters": {
                "root": {"description": "First level of every topic.", "default": "livesat"},
                "node": {"description": "The machine that publishes."},
                "stream": {
                    "description": "The stream's name; %, /, + and # are percent-encoded in it."
                },
                "type": {"description": "The type of the event."},
            },
        },
    }


def _channel(address: str, description: str, messages: Any, server: str = "broker") -> Json:
    names = re.findall(r"{(\w+)}", address)
    return {
        "address": address,
        "description": description,
        "servers": [{"$ref": f"#/servers/{server}"}],
        "messages": {name: {"$ref": f"#/components/messages/{name}"} for name in messages},
        "parameters": {name: {"$ref": f"#/components/parameters/{name}"} for name in names},
    }


def _operation(channel: str, *, qos: int, retain: bool) -> Json:
    return {
        "action": "send",
        "channel": {"$ref": f"#/channels/{channel}"},
        "bindings": {"mqtt": {"qos": qos, "retain": retain, "bindingVersion": "0.2.0"}},
    }


def documents() -> dict[str, str]:
    """The files by name, as they should be."""
    document = yaml.safe_dump(asyncapi(), sort_keys=False, allow_unicode=True, width=100)
    return {
        "events.schema.json": json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n",
        "asyncapi.yaml": "# Written by `python -m sinks.schema`: change the models instead.\n"
        + document,
    }


def stale(folder: Path) -> list[str]:
    """The files in `folder` that are not as they should be."""
    return [
        name
        for name, text in documents().items()
        if not (folder / name).is_file() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Write the documents, or compare them.

    Returns:
        The exit code: 0, 1 if a file is out of step, 2 for another argument.
    """
    if arguments not in ([], ["--check"]):
        sys.stderr.write(f"expected nothing or --check, got {' '.join(arguments)}\n")
        return 2
    if arguments:
        names = ", ".join(stale(FOLDER))
        if names:
            sys.stderr.write(f"out of step in {FOLDER}: {names}; run python -m sinks.schema\n")
        return bool(names)
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in documents().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
