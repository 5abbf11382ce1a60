from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from sinks.events import Event
from sinks.rttm import RttmSettings, RttmSink
from sinks.sink import SinkError
from tests.sinks.samples import Talk

GOLDEN = Path(__file__).parent / "golden"


async def write(path: Path, events: Sequence[Event], **more: Any) -> None:
    settings = RttmSettings(path=path, **more)
    async with settings.open() as sink:
        for event in events:
            if settings.wants(event):
                await sink.send(event)
                check(path)


def check(path: Path) -> None:
    """The file is valid RTTM."""
    content = path.read_text()
    assert not content or content.endswith("\n")
    for line in content.splitlines():
        columns = line.split(" ")
        assert len(columns) == 10
        assert columns[0] == "SPEAKER"
        assert float(columns[4]) > 0


def names(path: Path) -> list[str]:
    return [line.split()[7] for line in path.read_text().splitlines()]


def conversation(talk: Talk) -> list[Event]:
    return [
        talk.opened(),
        talk.began("t1", "S1", 0.5),
        talk.turn("t1", "S1", 0.5, 3.25),
        talk.turn("t2", "S2", 3.0, 5.5),
        talk.turn("t3", "S3", 5.75, 9.0),
        talk.turn("t0", "S3", 9.0, 9.0),
        talk.revised(["t3"], "S3", "S1", at=9.0),
        talk.identified("S1", "Ada Lovelace", at=9.5),
        talk.turn("t4", "S4", 10.0004, 12.0),
        talk.turn("t5", "S2", 12.0, 13.0, identity="Bob"),
        talk.closed(),
    ]


async def test_final_labels(tmp_path: Path) -> None:
    path = tmp_path / "talk.rttm"
    await write(path, conversation(Talk()))
    assert path.read_text() == (GOLDEN / "talk.rttm").read_text()


async def test_a_name_may_be_taken_back_or_split(tmp_path: Path) -> None:
    path = tmp_path / "talk.rttm"
    talk = Talk()
    events = [
        talk.turn("t1", "S1", 0.0, 1.0),
        talk.turn("t2", "S1", 1.0, 2.0),
        talk.identified("S1", "Ada"),
        talk.identified("S1", None),
        talk.revised(["t2"], "S1", "S2", "split"),
    ]
    await write(path, events)
    assert names(path) == ["S1", "S2"]


async def test_a_merge_renames_turns_it_does_not_list(tmp_path: Path) -> None:
    path = tmp_path / "talk.rttm"
    talk = Talk()
    events = [talk.turn("t1", "S2", 0.0, 1.0), talk.revised([], "S2", "S1")]
    await write(path, events)
    assert names(path) == ["S1"]


async def test_sessions_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "talks.rttm"
    one, two, again = Talk("a", "left"), Talk("b", "right"), Talk("c", "left")
    events = [
        one.turn("t1", "S1", 0.0, 1.0),
        two.turn("t1", "S1", 0.0, 2.0),
        one.identified("S1", "Ada"),
        one.closed(),
        two.revised(["t1"], "S1", "S2"),
        again.turn("t1", "S1", 0.0, 3.0),
    ]
    await write(path, events)
    rows = [line.split() for line in path.read_text().splitlines()]
    assert [(row[1], row[7]) for row in rows] == [
        ("left", "Ada"),
        ("right", "S2"),
        ("left-c", "S1"),
    ]


async def test_a_file_that_is_there_stays_but_for_its_torn_end(tmp_path: Path) -> None:
    path = tmp_path / "talk.rttm"
    talk = Talk("a")
    await write(path, [talk.turn("t1", "S1", 0.0, 1.0)])
    before = path.read_text()
    with path.open("a") as file:
        file.write(before[:30])
    talk = Talk("b")
    await write(path, [talk.turn("t1", "S1", 0.0, 1.0), talk.identified("S1", "Bob")])
    assert path.read_text().startswith(before)
    assert names(path) == ["S1", "Bob"]
    await write(path, [Talk("c").opened()], existing="replace")
    assert path.read_text() == ""


TURNS = (("t1", "S1"), ("t2", "S2"))


@pytest.mark.parametrize("existing", ["append", "replace"])
@pytest.mark.parametrize(
    ("file_id", "names_before"), [("{stream}", ["talk", "talk-b"]), ("{session}", ["a", "b"])]
)
async def test_a_session_that_goes_on_has_its_lines_once_and_under_its_id(
    tmp_path: Path, existing: str, file_id: str, names_before: list[str]
) -> None:
    path = tmp_path / "talk.rttm"
    more = {"existing": existing, "file_id": file_id}
    talks = Talk("a"), Talk("b")
    before: list[Event] = []
    for talk in talks:
        before.append(talk.opened())
        before += [talk.turn(turn, label, 0.1234567, 1.0) for turn, label in TURNS]
    await write(path, before, **more)
    after = [event for event in reversed(before) if event.seq > 0]  # of b first
    after += [talk.turn("t3", "S3", 2.0, 3.0) for talk in talks]
    after += [talks[1].identified("S1", "Ada"), talks[1].revised([], "S2", "S3")]
    await write(path, after, **more)
    rows = [(row[1], row[7]) for row in map(str.split, path.read_text().splitlines())]
    a, b = names_before
    assert rows == [
        *((a, "S1"), (a, "S2"), (b, "Ada"), (b, "S3")),
        *((a, "S3"), (b, "S3")),
    ]


async def test_a_failed_revision_is_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "talk.rttm"
    talk = Talk()
    revision = talk.revised(["t1"], "S1", "S2")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    async with RttmSettings(path=path).open() as sink:
        assert isinstance(sink, RttmSink)
        await sink.send(talk.turn("t1", "S1", 0.0, 1.0))
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", full)
            with pytest.raises(SinkError, match="cannot rewrite"):
                await sink.send(revision)
        assert names(path) == ["S1"]
        assert [file.name for file in tmp_path.iterdir()] == ["talk.rttm"]  # noqa: ASYNC240
        await sink.send(revision)
    assert names(path) == ["S2"]


async def test_a_link_stays_a_link(tmp_path: Path) -> None:
    path, link = tmp_path / "talk.rttm", tmp_path / "latest.rttm"
    link.symlink_to(path)
    talk = Talk()
    await write(link, [talk.turn("t1", "S1", 0.0, 1.0), talk.identified("S1", "Ada")])
    assert link.is_symlink()
    assert names(path) == ["Ada"]
