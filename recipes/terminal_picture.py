"""Draws `docs/terminal.svg`: the live view of the demo conversation, as it stands at one moment.

    python recipes/terminal_picture.py docs/terminal.svg

The conversation runs at the speed it was spoken, through the real engine, so that lag and
real-time factor in the picture are those of this machine.
"""

import argparse
import asyncio
import io
from importlib.resources import as_file, files
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme

from sinks.events import Event
from stream.config import Config
from stream.daemon import run
from stream.inference import EngineSettings
from stream.screen import Picture
from stream.sources.file import FileSource

THEME = TerminalTheme(
    (24, 26, 31),
    (205, 209, 216),
    [
        (24, 26, 31),
        (224, 108, 117),
        (152, 195, 121),
        (229, 192, 123),
        (97, 175, 239),
        (198, 120, 221),
        (86, 182, 194),
        (205, 209, 216),
    ],
    [
        (92, 99, 112),
        (240, 140, 148),
        (172, 213, 141),
        (240, 210, 150),
        (130, 195, 250),
        (215, 150, 235),
        (120, 205, 215),
        (255, 255, 255),
    ],
)


def main() -> None:
    """Run the demo up to the moment, draw, stop."""
    parser = argparse.ArgumentParser(description="Draw the live view of the demo conversation.")
    parser.add_argument("svg", type=Path)
    parser.add_argument("--at", type=float, default=57.4, help="seconds into the conversation")
    parser.add_argument("--width", type=int, default=100, help="columns")
    parser.add_argument("--checkpoint", action="append", help="instead of the embedded one")
    given = parser.parse_args()

    with as_file(files("stream") / "demo" / "meeting.flac") as audio:
        picture = asyncio.run(watch(audio, given.at, given.checkpoint))
    console = Console(
        file=io.StringIO(), record=True, force_terminal=True, width=given.width, height=30
    )
    console.print(picture)
    svg = console.export_svg(title="make demo", theme=THEME, unique_id="livesat")
    given.svg.write_text(without_web_fonts(svg), encoding="utf-8")
    print(f"{given.svg}: {picture.now:.2f} s into the conversation")


async def watch(audio: Path, at: float, checkpoint: list[str] | None) -> Picture:
    """The picture when the conversation is `at` seconds old."""
    picture = Picture(duration_s=71.3)
    stop = asyncio.Event()

    def take(event: Event) -> None:
        if not stop.is_set():
            picture.take(event)
        if picture.now >= at:
            stop.set()

    engine = EngineSettings(checkpoint=tuple(checkpoint)) if checkpoint else EngineSettings()
    source = FileSource(path=audio, realtime=True)
    await run(Config(engine=engine, sources={"meeting": source}), on_event=take, stop=stop)
    return picture


def without_web_fonts(svg: str) -> str:
    """The reader's own monospace font: a picture should not fetch anything."""
    while (begin := svg.find("@font-face")) >= 0:
        end = svg.index("}", begin) + 1
        svg = svg[:begin] + svg[end:].lstrip()
    return svg.replace("Fira Code", "ui-monospace, Menlo, Consolas, DejaVu Sans Mono")


if __name__ == "__main__":
    main()
