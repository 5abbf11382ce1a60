from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any, Literal

import pytest
from pydantic import TypeAdapter, ValidationError

import sinks
from sinks import AnySink, JsonlSettings, SinkError, SinkSettings, load_entry_points

ADAPTER: TypeAdapter[Any] = TypeAdapter(dict[str, AnySink])


class LampSettings(SinkSettings, frozen=True):
    kind: Literal["lamp"] = "lamp"
    pin: int


class WrongKind(SinkSettings, frozen=True):
    kind: Literal["mqtt"] = "mqtt"


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    points: list[EntryPoint] = []
    monkeypatch.setattr(sinks, "entry_points", lambda group: points)
    load_entry_points.cache_clear()
    yield points
    load_entry_points.cache_clear()


def point(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, f"{__name__}:{value}", sinks.GROUP)


def test_kind_chooses_the_settings() -> None:
    made = ADAPTER.validate_python({"log": {"kind": "jsonl", "path": "events.jsonl"}})
    assert isinstance(made["log"], JsonlSettings)
    files, wires = {"stdout", "jsonl", "rttm", "seglst", "vtt", "srt"}, {"mqtt", "webhook", "nats"}
    assert set(sinks.KINDS) == files | wires | {"kafka", "redis"}


def test_an_unknown_kind_names_those_there_are(registered: list[EntryPoint]) -> None:
    registered.append(point("lamp", "LampSettings"))
    with pytest.raises(ValidationError, match=r"among jsonl, kafka, lamp, mqtt, .* got 'mqqt'"):
        ADAPTER.validate_python({"a": {"kind": "mqqt"}})
    with pytest.raises(ValidationError, match="kind"):
        ADAPTER.validate_python({"a": {}})


def test_another_package_adds_a_kind(registered: list[EntryPoint]) -> None:
    registered.append(point("lamp", "LampSettings"))
    made = ADAPTER.validate_python({"a": {"kind": "lamp", "pin": 4}})
    assert made == {"a": LampSettings(pin=4)}
    assert ADAPTER.validate_python(made) == made
    with pytest.raises(ValidationError, match="pin"):
        ADAPTER.validate_python({"a": {"kind": "lamp"}})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lamp", "point", "expected a subclass of SinkSettings"),
        ("light", "LampSettings", "expected the kind 'light'"),
        ("mqtt", "WrongKind", "is taken"),
    ],
)
def test_a_wrong_entry_point_is_named(
    registered: list[EntryPoint], name: str, value: str, message: str
) -> None:
    registered.append(point(name, value))
    with pytest.raises(SinkError, match=message):
        load_entry_points()
