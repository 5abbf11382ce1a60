import asyncio
import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sinks.events import Event, dump, parse
from sinks.jsonl import JsonlSettings
from sinks.sink import SinkError
from tests.sinks.samples import Talk


async def write(path: Path, events: Sequence[Event], **more: Any) -> None:
    async with JsonlSettings(path=path, **more).open() as sink:
        for event in events:
            await sink.send(event)


def read(path: Path) -> list[Event]:
    return [parse(line) for line in path.read_bytes().splitlines()]


async def test_every_event_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = Talk().every_type()
    await write(path, events, fsync=True)
    assert read(path) == events


@given(st.lists(st.text(max_size=20), max_size=8), st.integers(0, 8))
@settings(max_examples=15, deadline=None)
def test_any_text_survives_and_runs_append(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], cut: int
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "events.jsonl"
    talk = Talk()
    # Lone surrogates are not text that JSON could carry.
    events = [talk.warning(t.encode("utf-8", "replace").decode()) for t in texts]
    asyncio.run(write(path, events[:cut]))
    asyncio.run(write(path, events[cut:]))
    assert read(path) == events


@given(st.data())
@settings(max_examples=15, deadline=None)
def test_a_torn_last_line_is_dropped_wherever_it_was_torn(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("jsonl") / "events.jsonl"
    talk = Talk()
    first, torn, after = talk.warning("é" * 9), talk.opened(), talk.closed()
    line = dump(torn)
    keep = data.draw(st.integers(1, len(line)))
    path.write_bytes(dump(first) + b"\n" + line[:keep])
    asyncio.run(write(path, [after]))
    # Without its newline only, the line was whole.
    whole = [torn] if keep == len(line) else []
    assert read(path) == [first, *whole, after]


async def test_a_torn_line_longer_than_a_block_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"message": "' + b"x" * 200_000)
    await write(path, [])
    assert path.read_bytes() == b""


async def test_replace_begins_anew(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    talk = Talk()
    await write(path, [talk.opened()])
    events = [talk.closed()]
    await write(path, events, existing="replace")
    assert read(path) == events


async def test_a_full_disk_tears_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    talk = Talk()
    first, second = talk.opened(), talk.closed()
    real, left = os.write, [30, 0]

    def full(fd: int, data: Any) -> int:
        room = left.pop(0)
        if room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(fd, bytes(data)[:room])

    async with JsonlSettings(path=path).open() as sink:
        await sink.send(first)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(SinkError, match=r"cannot write to .*No space left on device"):
                await sink.send(second)
        assert read(path) == [first]
        await sink.send(second)
    assert read(path) == [first, second]


def test_rotation_loses_nothing_within_what_it_keeps(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    talk = Talk()
    talk.seq = 100  # every line as long as the others
    events = [talk.warning() for _ in range(12)]
    size = len(dump(events[0])) + 1
    asyncio.run(write(path, events, rotate_bytes=4 * size + 3, rotate_keep=2))
    files = [path.with_name("events.jsonl.2"), path.with_name("events.jsonl.1"), path]
    assert [event for file in files for event in read(file)] == events
    assert all(file.stat().st_size <= 4 * size + 3 for file in files)
    asyncio.run(write(path, [talk.closed()], rotate_bytes=size, rotate_keep=2))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "events.jsonl",
        "events.jsonl.1",
        "events.jsonl.2",
    ]


async def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match=r"the folder .*/nowhere does not exist"):
        await write(tmp_path / "nowhere" / "events.jsonl", [])
    with pytest.raises(SinkError, match="not a regular file"):
        await write(tmp_path, [])
    path = tmp_path / "events.jsonl"
    async with JsonlSettings(path=path).open():
        with pytest.raises(SinkError, match="written by another sink or process"):
            await write(path, [])
    await write(path, [])


def test_a_killed_writer_leaves_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    script = (
        "import asyncio, sys\n"
        "from sinks.jsonl import JsonlSettings\n"
        "from tests.sinks.samples import Talk\n"
        "async def main():\n"
        f"    async with JsonlSettings(path={str(path)!r}).open() as sink:\n"
        "        talk = Talk()\n"
        "        while True:\n"
        "            await sink.send(talk.warning('x' * 500))\n"
        "            if talk.seq == 200: print('ready', flush=True)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
    events = read(path)
    assert len(events) >= 200
    assert [event.seq for event in events] == list(range(len(events)))
    assert path.read_bytes().endswith(b"\n")
