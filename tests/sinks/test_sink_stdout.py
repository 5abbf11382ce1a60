import io
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from sinks import stdout
from sinks.events import Word, parse
from sinks.lines import clock
from sinks.stdout import StdoutSettings, text
from tests.sinks.samples import Talk


async def run(settings: StdoutSettings) -> None:
    async with settings.open() as sink:
        for event in Talk().every_type():
            if settings.wants(event):
                await sink.send(event)


async def test_lines_to_read(capsys: pytest.CaptureFixture[str]) -> None:
    await run(StdoutSettings())
    assert capsys.readouterr().out.splitlines() == [
        "00:00.0  --  session opened: talk.wav (latency 740 ms)",
        "00:01.0  --  speech begins",
        "00:01.0  S1  spoke 2.0 s",
        "00:01.0  S1  hello there",
        "00:03.0  S1  is Ada (score 0.71, margin 0.20)",
        "00:03.5  S1  is S2: merged, 1 turn",
        "00:03.0  --  speech ends",
        "00:03.0  --  emotion: happy (0.83)",
        "00:04.0  --  gap: 320 samples lost (overflow)",
        "00:05.0  --  warning: careful [test]",
        "00:05.0  --  error: broken [test]",
        "00:06.0  --  session closed: end",
    ]


async def test_partials_and_stream_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    await run(StdoutSettings(partials=True, show_stream=True, types=("transcript.partial",)))
    assert capsys.readouterr().out == "talk  00:01.5  --  hel …\n"


async def test_json_lines_are_events(capsys: pytest.CaptureFixture[str]) -> None:
    await run(StdoutSettings(format="json", partials=True))
    lines = capsys.readouterr().out.splitlines()
    assert [parse(line) for line in lines] == Talk().every_type()


class Terminal(io.StringIO):
    """A terminal of 60 columns that shows colours."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        """What is to be seen in the end, without its colours."""
        rows = [""]
        for part in re.split(r"(\n|\r\x1b\[2K|\x1b\[[0-9;]*m)", self.getvalue()):
            if part == "\n":
                rows.append("")
            elif part == "\r\x1b[2K":
                rows[-1] = ""
            elif not part.startswith("\x1b["):
                rows[-1] += part
        return [row.rstrip() for row in rows]


def at_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    made = Terminal()
    monkeypatch.setattr(sys, "stdout", made)
    for name, value in (("TERM", "xterm-256color"), ("COLUMNS", "60"), ("NO_COLOR", "")):
        monkeypatch.setenv(name, value)
    return made


async def test_on_a_terminal_lines_have_columns_and_speakers_a_colour(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    await run(StdoutSettings())
    assert terminal.screen == [
        "00:00.0              ▶  session opened: talk.wav (latency",
        "                        740 ms)",
        "00:01.0              ╭  speech begins",
        "00:01.0  S1          │  spoke 2.0 s",
        "00:01.0  S1          ▌  hello there",
        "00:03.0  S1          ✓  is Ada (score 0.71, margin 0.20)",
        "00:03.5  S1          ↻  is S2: merged, 1 turn",
        "00:03.0              ╰  speech ends",
        "00:03.0              #  emotion: happy (0.83)",
        "00:04.0              ✂  gap: 320 samples lost (overflow)",
        "00:05.0              !  warning: careful [test]",
        "00:05.0              ✗  error: broken [test]",
        "00:06.0              ■  session closed: end",
        "",
    ]
    assert "\x1b[1;36mS1 " in terminal.getvalue()
    assert "\x1b[1;35mS2\x1b[0m" in terminal.getvalue()  # the one it turned out to be


async def test_a_known_person_keeps_the_colour_of_the_label(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    talk = Talk()
    async with StdoutSettings(show_stream=True).open() as sink:
        await sink.send(talk.identified("S2", "Ada"))
        await sink.send(talk.said("hello", "S2", 4.0, 5.0))
    assert terminal.screen[-2] == "talk  00:04.0  Ada         ▌  hello"
    assert "\x1b[1;35mAda " in terminal.getvalue()


async def test_what_may_change_stands_in_the_last_line_until_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = at_a_terminal(monkeypatch)
    talk, rows = Talk(), []
    async with StdoutSettings(partials=True).open() as sink:
        for event in (
            talk.began("t1", "S1", 1.0),
            talk.heard("hel", 1.0),
            talk.warning(),
            talk.heard("never mind " * 20, 1.0),
            talk.said("hello", "S1", 1.0, 2.0),
            talk.heard("the", 3.0),
        ):
            await sink.send(event)
            rows.append(terminal.screen)
    first = "00:00.0              !  warning: careful [test]"
    assert rows[0] == ["00:01.0  S1             begins to speak"]
    assert rows[1] == ["00:01.0                 hel …"]
    assert rows[2] == [first, "00:01.0                 hel …"]
    assert rows[3][1].endswith("never mind …")
    assert len(rows[3]) == 2
    assert len(rows[3][1]) < 60
    assert rows[4] == [first, "00:01.0  S1          ▌  hello", ""]
    assert terminal.screen == rows[4]  # nothing is left of it at the end


@pytest.mark.parametrize(("name", "value"), [("TERM", "dumb"), ("NO_COLOR", "1")])
async def test_a_terminal_without_colours_gets_none(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setenv(name, value)
    await run(StdoutSettings())
    assert not re.search(r"\x1b\[[0-9;]*3\dm", terminal.getvalue())


@pytest.mark.parametrize("on_a_terminal", [True, False])
async def test_a_message_cannot_steer_a_terminal(
    monkeypatch: pytest.MonkeyPatch, on_a_terminal: bool
) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr(Terminal, "isatty", lambda _: on_a_terminal)
    async with StdoutSettings().open() as sink:
        await sink.send(Talk().warning("\x1b]0;title\x07\x1b[2J"))
    assert "warning: �]0;title��[2J" in terminal.getvalue()


def test_a_transcript_of_two_has_a_line_each_and_no_line_breaks() -> None:
    talk = Talk()
    event = talk.said("yes no maybe", "S1", 0.0, 3.0)
    words = [*event.words[:2], event.words[2].model_copy(update={"speaker": "S2"})]  # type: ignore[union-attr]
    assert isinstance(words[0], Word)
    two = event.model_copy(update={"words": words})
    assert text(two) == ["00:00.0  S1  yes no", "00:00.0  S2  maybe"]
    assert text(talk.warning("one\ntwo")) == ["00:00.0  --  warning: one two [test]"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "00:00.0"), (12.34, "00:12.3"), (59.96, "01:00.0"), (3725.0, "1:02:05.0")],
)
def test_clock(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


OPEN = """
import asyncio
from sinks.stdout import StdoutSettings
from tests.sinks.samples import Talk
async def main():
    async with StdoutSettings().open() as sink:
"""
"""Begin of a script whose next lines have a sink."""


def test_a_reader_that_leaves_is_no_error() -> None:
    script = OPEN + (
        "        for _ in range(3):\n"
        "            await sink.send(Talk().warning())\n"
        "asyncio.run(main())\n"
    )
    reading, writing = os.pipe()
    os.close(reading)
    try:
        ran = subprocess.run(
            [sys.executable, "-c", script], stdout=writing, stderr=subprocess.PIPE, check=False
        )
    finally:
        os.close(writing)
    assert ran.returncode == 0, ran.stderr.decode()
    assert b"Traceback" not in ran.stderr
    assert b"Exception ignored" not in ran.stderr


def test_a_reader_that_does_not_read_keeps_no_process_alive() -> None:
    script = OPEN + (
        "        sending = asyncio.create_task(sink.send(Talk().warning()))\n"
        "        done, _ = await asyncio.wait({sending}, timeout=0.2)\n"
        "        assert not done\n"
        "        sending.cancel()\n"
        "asyncio.run(main())\n"
    )
    reading, writing = os.pipe()
    try:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, bytes(4096))
        os.set_blocking(writing, True)
        ran = subprocess.run(
            [sys.executable, "-c", script],
            stdout=writing,
            stderr=subprocess.PIPE,
            check=False,
            timeout=30,
        )
    finally:
        os.close(writing)
        os.close(reading)
    assert ran.returncode == 0, ran.stderr.decode()
    assert ran.stderr == b""


async def test_a_terminal_that_is_stopped_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = at_a_terminal(monkeypatch)
    monkeypatch.setattr(stdout, "FAREWELL_S", 0.01)
    goes_on = threading.Event()
    async with StdoutSettings(partials=True).open() as sink:
        await sink.send(Talk().heard("hel"))
        monkeypatch.setattr(terminal, "write", lambda text: text and goes_on.wait(60))
    assert terminal.screen == ["00:00.0                 hel …"]
    goes_on.set()
