import json
from pathlib import Path
from typing import Any

import pytest

from sinks import SeglstSettings, SinkError
from tests.sinks.samples import Talk


def read(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())


async def test_segments_are_words_of_a_speaker_in_a_row_under_their_last_name(
    tmp_path: Path,
) -> None:
    path, talk = tmp_path / "a.json", Talk()
    async with SeglstSettings(path=path, every_s=0).open() as sink:
        assert read(path) == []
        for event in (
            talk.opened(),
            talk.said("good morning", "S1", 0.0, 1.0, "T1"),
            talk.turn("T1", "S1", 0.0, 1.0),
            talk.said("morning", "S2", 1.2, 1.6, "T2"),
            talk.turn("T2", "S2", 1.2, 1.6),
            talk.said("after a while", "S2", 5.0, 6.0, "T3"),
        ):
            await sink.send(event)
        assert [(s["speaker"], s["words"]) for s in read(path)] == [
            ("S1", "good morning"),
            ("S2", "morning"),
            ("S2", "after a while"),
        ]
        await sink.send(talk.revised(["T2"], "S2", "S1", "merged"))
        await sink.send(talk.identified("S1", "Anna"))
        await sink.send(talk.closed())
    segments = read(path)
    assert {s["speaker"] for s in segments} == {"Anna"}
    assert segments[0] == {
        "session_id": "talk",
        "start_time": 0.0,
        "end_time": 1.6,
        "speaker": "Anna",
        "words": "good morning morning",
    }


async def test_the_same_event_twice_changes_nothing(tmp_path: Path) -> None:
    path, talk = tmp_path / "a.json", Talk()
    said = talk.said("once", "S1", 0.0, 1.0)
    async with SeglstSettings(path=path).open() as sink:
        await sink.send(said)
        await sink.send(said)
    assert [s["words"] for s in read(path)] == ["once"]


async def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="cannot be written: No such file"):
        async with SeglstSettings(path=tmp_path / "no" / "a.json").open():
            pass
