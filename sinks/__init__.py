"""What subscribers receive, and how.

A sink is one file with a settings class, and one member of `AnySink`. A package of another author
registers its settings class, a `sinks.sink.SinkSettings`, as an entry point of the group
``livesat.sinks`` whose name is the class's ``kind``.
"""

from functools import cache
from importlib.metadata import entry_points
from typing import Annotated, Any, Final, get_args

from pydantic import Field, ModelWrapValidatorHandler, WrapValidator

from sinks.captions import SrtSettings, VttSettings
from sinks.jetstream import NatsSettings
from sinks.jsonl import JsonlSettings
from sinks.kafka import KafkaSettings
from sinks.mqtt import MqttSettings
from sinks.redis_streams import RedisSettings
from sinks.rttm import RttmSettings
from sinks.seglst import SeglstSettings
from sinks.sink import Disconnected, Rejected, Sink, SinkError, SinkSettings
from sinks.stdout import StdoutSettings
from sinks.webhook import WebhookSettings

__all__ = [
    "AnySink",
    "Disconnected",
    "JsonlSettings",
    "KafkaSettings",
    "MqttSettings",
    "NatsSettings",
    "RedisSettings",
    "Rejected",
    "RttmSettings",
    "SeglstSettings",
    "Sink",
    "SinkError",
    "SinkSettings",
    "SrtSettings",
    "StdoutSettings",
    "VttSettings",
    "WebhookSettings",
    "load_entry_points",
]

GROUP: Final = "livesat.sinks"

BuiltIn = (
    StdoutSettings
    | JsonlSettings
    | RttmSettings
    | SeglstSettings
    | VttSettings
    | SrtSettings
    | MqttSettings
    | WebhookSettings
    | NatsSettings
    | KafkaSettings
    | RedisSettings
)

KINDS: Final[dict[str, type[SinkSettings]]] = {
    settings.model_fields["kind"].default: settings for settings in get_args(BuiltIn)
}
"""The sinks that come with livesat, by ``kind``."""


@cache
def load_entry_points() -> dict[str, type[SinkSettings]]:
    """The sinks other packages have registered, by ``kind``; imported on the first call.

    Raises:
        SinkError: an entry point is not a settings class of that kind, or the kind is taken.
    """
    found: dict[str, type[SinkSettings]] = {}
    for point in entry_points(group=GROUP):
        settings = point.load()
        if not (isinstance(settings, type) and issubclass(settings, SinkSettings)):
            raise SinkError(
                f"entry point {point.name} of {GROUP}: expected a subclass of SinkSettings, "
                f"got {settings!r}"
            )
        kind = settings.model_fields["kind"].default
        if kind != point.name:
            raise SinkError(
                f"entry point {point.name} of {GROUP}: expected the kind {point.name!r}, "
                f"{settings.__name__} has {kind!r}"
            )
        if kind in KINDS or kind in found:
            raise SinkError(f"entry point {point.name} of {GROUP}: the kind {kind!r} is taken")
        found[kind] = settings
    return found


def _others_too(data: Any, handler: ModelWrapValidatorHandler[SinkSettings]) -> SinkSettings:
    """Validate by the settings class of another package where the kind is not one of ours."""
    if isinstance(data, SinkSettings):
        return data
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind not in KINDS:
        others = load_entry_points()
        if kind in others:
            return others[kind].model_validate(data)
        expected = ", ".join(sorted({*KINDS, *others}))
        raise ValueError(f"expected a kind of sink among {expected}, got {kind!r}")
    return handler(data)


AnySink = Annotated[
    Annotated[BuiltIn, Field(discriminator="kind")],
    WrapValidator(_others_too),
]
"""The settings of any sink, told apart by ``kind``."""
