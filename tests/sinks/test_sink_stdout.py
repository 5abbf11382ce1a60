import os
import subprocess
import sys

import pytest

from sinks.events import Word, parse
from sinks.stdout import StdoutSettings, clock, text
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


def test_a_reader_that_leaves_is_no_error() -> None:
    script = (
        "import asyncio\n"
        "from sinks.stdout import StdoutSettings\n"
        "from tests.sinks.samples import Talk\n"
        "async def main():\n"
        "    async with StdoutSettings().open() as sink:\n"
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
