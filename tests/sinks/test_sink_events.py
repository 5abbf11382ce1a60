import json
from pathlib import Path
from typing import get_args

import jsonschema
import pytest
import yaml
from pydantic import ValidationError

from sinks import schema
from sinks.events import EventType, Warning_, dump, members, parse
from tests.sinks.samples import Talk


def test_every_event_survives_the_wire() -> None:
    for event in Talk().every_type():
        line = dump(event)
        assert b"\n" not in line
        assert parse(line) == event


def test_samples_types_and_union_are_in_step() -> None:
    types = [member.model_fields["type"].default for member in members()]
    assert types == list(get_args(EventType))
    assert sorted(types) == sorted(event.type for event in Talk().every_type())


def test_type_comes_first_and_time_is_rfc_3339() -> None:
    sent = json.loads(dump(Talk().opened()))
    assert next(iter(sent)) == "type"
    assert sent["wall_time"] == "2024-05-01T12:00:00Z"


def test_an_event_is_closed_and_frozen() -> None:
    talk = Talk()
    event = talk.warning()
    with pytest.raises(ValidationError, match="frozen"):
        event.seq = 4  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        Warning_(**talk.envelope(), code="c", message="m", mesage="m")  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="finite number"):
        Warning_(**(talk.envelope() | {"start": float("nan")}), code="c", message="m")
    assert event.id == "s1:0"


def test_committed_documents_are_in_step() -> None:
    assert schema.stale(schema.FOLDER) == [], "run python -m sinks.schema"


def test_check_names_what_is_out_of_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(schema, "FOLDER", tmp_path / "schema")
    assert schema.main(["--check"]) == 1
    assert "asyncapi.yaml" in capsys.readouterr().err
    assert schema.main([]) == 0
    assert schema.main(["--check"]) == 0
    assert schema.main(["--chekc"]) == 2


def test_events_satisfy_the_schema_and_it_tells_types_apart() -> None:
    document = schema.json_schema()
    validator = jsonschema.Draft202012Validator(document)
    validator.check_schema(document)
    for event in Talk().every_type():
        sent = json.loads(dump(event))
        validator.validate(sent)
        # A field added later must not make a subscriber refuse the event …
        validator.validate(sent | {"added": 1})
        # … but what there is must be right.
        assert not validator.is_valid(sent | {"seq": "one"})
        assert not validator.is_valid(sent | {"type": "no.such"})


def test_asyncapi_references_exist() -> None:
    document = yaml.safe_load((schema.FOLDER / "asyncapi.yaml").read_text())

    def references(node: object) -> list[str]:
        if isinstance(node, dict):
            found = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return found + [ref for value in node.values() for ref in references(value)]
        if isinstance(node, list):
            return [ref for value in node for ref in references(value)]
        return []

    for ref in references(document):
        target = document
        for part in ref.removeprefix("#/").split("/"):
            assert part in target, ref
            target = target[part]
    on_wire = {
        name
        for channel in ("event", "partial")
        for name in document["channels"][channel]["messages"]
    }
    assert on_wire == set(get_args(EventType))
