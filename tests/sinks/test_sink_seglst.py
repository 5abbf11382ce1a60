import json
import threading
from pathlib import Path
from typing import Any

import pytest

from sinks import SeglstSettings, SinkError
from sinks.seglst import SeglstSink, _Session
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


async def test_sessions_of_one_stream_have_ids_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    async with SeglstSettings(path=path).open() as sink:
        for talk in (Talk("a", "caller"), Talk("b", "caller")):
            await sink.send(talk.opened())
            await sink.send(talk.said("hello", "S1", 0.0, 1.0))
            await sink.send(talk.closed())
    assert [s["session_id"] for s in read(path)] == ["caller", "caller-b"]


async def test_an_older_file_is_replaced_when_a_session_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("[1, 2")
    async with SeglstSettings(path=path).open() as sink:
        await sink.send(Talk().opened())
        assert read(path) == []


async def test_a_session_that_goes_on_keeps_what_it_said_and_says_it_once(tmp_path: Path) -> None:
    path, talk, other = tmp_path / "a.json", Talk("a"), Talk("b")
    opened, said = talk.opened(), talk.said("good morning", "S1", 0.0004, 1.0)
    async with SeglstSettings(path=path).open() as sink:
        for event in (opened, said, talk.said("yes", None, 1.5, 2.0)):
            await sink.send(event)
        for event in (other.opened(), other.said("hi", "S1", 0.0, 1.0), other.closed()):
            await sink.send(event)
    for _ in range(2):  # nobody says anything: nothing is lost
        async with SeglstSettings(path=path).open():
            pass
    async with SeglstSettings(path=path).open() as sink:
        new = talk.said("all of you", "S1", 2.5, 3.0)
        for event in (said, new, talk.identified("S1", "Anna"), talk.closed()):
            await sink.send(event)
    assert sorted((s["session_id"], s["speaker"], s["words"]) for s in read(path)) == [
        ("talk", "Anna", "all of you"),
        ("talk", "Anna", "good morning"),
        ("talk", "unknown", "yes"),
        ("talk-b", "S1", "hi"),
    ]


async def test_closed_sessions_are_kept_by_the_file_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    going_on = Talk("on", "desk")
    async with SeglstSettings(path=path, every_s=0).open() as sink:
        assert isinstance(sink, SeglstSink)
        await sink.send(going_on.said("well", "S1", 0.0, 1.0))
        for number in range(20):
            talk = Talk(str(number), f"caller{number}")
            for event in (talk.opened(), talk.said("hello", "S1", 0.0, 1.0), talk.closed()):
                await sink.send(event)
            assert len(read(path)) == number + 2
        assert list(sink._sessions) == ["on"]
        path.rename(tmp_path / "old.json")  # by who rotates files
        await sink.send(going_on.said("again", "S1", 1.0, 2.0))
        assert [s["words"] for s in read(path)] == ["well again"]


async def test_nothing_is_built_or_written_on_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: set[threading.Thread] = set()
    written = _Session.written

    def watched(session: _Session) -> bytes:
        threads.add(threading.current_thread())
        return written(session)

    monkeypatch.setattr(_Session, "written", watched)
    async with SeglstSettings(path=tmp_path / "a.json", every_s=0).open() as sink:
        await sink.send(Talk().said("hello", "S1", 0.0, 1.0))
    assert threads
    assert threading.current_thread() not in threads


async def test_a_revision_looks_at_its_list_of_turns_once() -> None:
    class Turns(list[str]):
        asked = 0

        def __contains__(self, _: object) -> bool:
            Turns.asked += 1
            return False

    talk, session = Talk(), _Session("talk")
    session.take_in(talk.said("word " * 50, "S1", 0.0, 10.0, "t1"))
    revised = talk.revised(["t1"], "S1", "S2", "split")
    session.take_in(revised.model_copy(update={"revision_of": Turns(["t1"])}))
    assert Turns.asked == 0
    assert {heard.label for heard in session.heard} == {"S2"}
