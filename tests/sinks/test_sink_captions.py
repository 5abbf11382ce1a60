import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sinks import SrtSettings, VttSettings
from sinks.captions import LINE, LINES, LONGEST_S, CaptionSettings, cues
from sinks.events import Event, TranscriptFinal, Word
from sinks.sink import SinkError
from tests.sinks.samples import Talk

GOLDEN = Path(__file__).parent / "golden"
TIMES = re.compile(r"(\d\d):(\d\d):(\d\d)[.,](\d\d\d) --> (\d\d):(\d\d):(\d\d)[.,](\d\d\d)")


async def write(settings: CaptionSettings, events: Sequence[Event]) -> None:
    async with settings.open() as sink:
        for event in events:
            if settings.wants(event):
                await sink.send(event)
                for file in settings.path.parent.iterdir():
                    check(file)


def check(path: Path) -> None:
    """The file can be played: cues in order, each with text."""
    content = path.read_text()
    if path.suffix == ".vtt":
        head, content = content.split("\n\n", 1)
        assert head == "WEBVTT"
    blocks = content.split("\n\n")
    assert blocks.pop() == ""
    starts: list[tuple[int, ...]] = []
    for number, block in enumerate(blocks, 1):
        lines = block.split("\n")
        if path.suffix == ".srt":
            assert lines.pop(0) == str(number)
        found = TIMES.fullmatch(lines[0])
        assert found is not None
        times = [int(part) for part in found.groups()]
        assert times[:4] < times[4:]
        starts.append(tuple(times[:4]))
        assert all(lines[1:])
    assert starts == sorted(starts)


def conversation(talk: Talk) -> list[Event]:
    long = "we begin with the long answer because the short one would leave out what matters most"
    return [
        talk.opened(),
        talk.said("hello there", "S1", 0.5, 1.5, "t1"),
        talk.turn("t1", "S1", 0.5, 1.5),
        talk.said(long, "S2", 2.0, 10.0, "t2"),
        talk.turn("t2", "S2", 2.0, 10.0),
        talk.said("is a < b & c?", "S3", 9.0, 11.0, "t3"),
        talk.turn("t3", "S3", 9.0, 11.0),
        talk.revised(["t3"], "S3", "S1", at=11.0),
        talk.identified("S2", "Ada", at=11.0),
        talk.said("yes", None, 12.0, 12.1),
        talk.closed(),
    ]


async def test_webvtt(tmp_path: Path) -> None:
    await write(VttSettings(path=tmp_path / "{stream}.vtt"), conversation(Talk()))
    assert (tmp_path / "talk.vtt").read_text() == (GOLDEN / "talk.vtt").read_text()


async def test_subrip(tmp_path: Path) -> None:
    await write(SrtSettings(path=tmp_path / "{stream}.srt"), conversation(Talk()))
    assert (tmp_path / "talk.srt").read_text() == (GOLDEN / "talk.srt").read_text()


async def test_turns_make_cues_until_there_are_words(tmp_path: Path) -> None:
    path = tmp_path / "talk.vtt"
    talk = Talk()
    turns = [talk.turn("t1", "S1", 0.0, 9.0), talk.turn("t2", "S2", 9.0, 9.5)]
    await write(VttSettings(path=path, existing="replace"), turns)
    assert path.read_text() == (
        "WEBVTT\n\n"
        "00:00:00.000 --> 00:00:09.000\n<v S1>S1\n\n"
        "00:00:09.000 --> 00:00:09.800\n<v S2>S2\n\n"
    )
    words = talk.said("hello", "S2", 9.0, 9.9)
    await write(VttSettings(path=path, existing="replace"), [*turns, words])
    assert path.read_text() == "WEBVTT\n\n00:00:09.000 --> 00:00:09.900\n<v S2>hello\n\n"


async def test_a_session_of_silence_is_a_valid_file(tmp_path: Path) -> None:
    talk = Talk()
    silence = [talk.opened(), talk.closed()]
    await write(VttSettings(path=tmp_path / "a.vtt"), silence)
    await write(SrtSettings(path=tmp_path / "a.srt"), silence)
    assert (tmp_path / "a.vtt").read_text() == "WEBVTT\n\n"
    assert (tmp_path / "a.srt").read_text() == ""


async def test_a_split_concerns_the_words_of_its_turns(tmp_path: Path) -> None:
    path = tmp_path / "talk.vtt"
    talk = Talk()
    events = [
        talk.said("one", "S1", 0.0, 1.0),
        talk.turn("t1", "S1", 0.0, 1.0),
        talk.said("two", "S1", 2.0, 3.0),
        talk.turn("t2", "S1", 2.0, 3.0),
        talk.revised(["t2"], "S1", "S2", "split"),
    ]
    await write(VttSettings(path=path), events)
    assert re.findall("<v (.*)>(.*)", path.read_text()) == [("S1", "one"), ("S2", "two")]


async def test_text_without_words_shares_its_time(tmp_path: Path) -> None:
    path = tmp_path / "talk.vtt"
    talk = Talk()
    began = talk.began("t1", "S1", 0.0)
    event = TranscriptFinal(**talk.envelope(0.0, 14.0), text="word " * 20, words=[], turn_id="t1")
    await write(VttSettings(path=path), [began, event])
    content = path.read_text()
    assert content.count("word") == 20
    assert content.count("<v S1>") == 2


async def test_an_event_sent_again_is_not_said_twice(tmp_path: Path) -> None:
    path = tmp_path / "talk.vtt"
    event = Talk().said("hello", "S1", 0.0, 1.0)
    await write(VttSettings(path=path), [event, event])
    assert path.read_text().count("hello") == 1


async def test_names_are_never_taken_twice(tmp_path: Path) -> None:
    settings = SrtSettings(path=tmp_path / "{stream}.srt")
    one, two, other = Talk("a", "mic"), Talk("b", "mic"), Talk("a", "../../etc/x")
    for talk in (one, two):
        await write(settings, [talk.opened(), talk.said("hi", "S1", 0.0, 1.0), talk.closed()])
    await write(settings, [other.opened()])
    await write(settings, [Talk("a", "mic").opened()])
    await write(settings, [Talk("a", "mic").opened()])
    found = sorted(file.name for file in tmp_path.iterdir())  # noqa: ASYNC240
    assert found == ["_.._etc_x.srt", "mic.a.2.srt", "mic.a.srt", "mic.b.srt", "mic.srt"]


@pytest.mark.parametrize("existing", ["keep", "replace"])
@pytest.mark.parametrize("kind", [VttSettings, SrtSettings])
async def test_a_session_that_goes_on_goes_on_in_its_file(
    tmp_path: Path, kind: type[CaptionSettings], existing: Literal["keep", "replace"]
) -> None:
    name = f"talk.{kind.model_fields['kind'].default}"
    settings = kind(path=tmp_path / name, existing=existing)
    events = conversation(Talk("a"))
    del events[7:9]  # what gives words of before other names
    await write(settings, events)
    whole = settings.path.read_text()
    settings.path.unlink()
    await write(settings, events[:5])
    kept = settings.path.read_text()
    with settings.path.open("a") as file:
        file.write("9\n00:01")  # a cue cut short
    await write(settings, events[3:4])  # the last of those again, as after a kill
    assert settings.path.read_text() == kept
    await write(settings, events[3:])
    assert settings.path.read_text() == whole
    assert [file.name for file in tmp_path.iterdir()] == [name]  # noqa: ASYNC240


async def test_turns_of_before_are_not_named_twice(tmp_path: Path) -> None:
    path, talk = tmp_path / "talk.vtt", Talk()
    opened, turn = talk.opened(), talk.turn("t1", "S1", 1.0, 1.2)
    await write(VttSettings(path=path), [opened, turn])
    await write(VttSettings(path=path), [turn, talk.turn("t2", "S2", 2.0, 4.0)])
    assert re.findall("<v (.*)>", path.read_text()) == ["S1", "S2"]


async def test_what_cannot_be_opened_is_said(tmp_path: Path) -> None:
    with pytest.raises(SinkError, match="nowhere does not exist"):
        await write(VttSettings(path=tmp_path / "nowhere" / "a.vtt"), [])
    with pytest.raises(SinkError, match="not a regular file"):
        await write(VttSettings(path=tmp_path), [])
    with pytest.raises(ValidationError, match="in the file name only"):
        VttSettings(path=tmp_path / "{stream}" / "a.vtt")


WORDS = st.lists(
    st.tuples(
        st.text(st.characters(categories=["L", "N", "P"]), min_size=1, max_size=100),
        st.floats(0, 9),
        st.floats(0, 3),
    ),
    max_size=30,
)


@given(WORDS, st.one_of(st.none(), st.text(min_size=1, max_size=60)), st.booleans())
def test_cues_keep_to_the_bounds_and_lose_no_letter(
    parts: list[tuple[str, float, float]], who: str | None, prefix: bool
) -> None:
    words: list[Word] = []
    at = 0.0
    for text, length, pause in parts:
        words.append(Word(word=text, start=at, end=at + length, confidence=1))
        at += length + pause
    made = cues(words, who, prefix=prefix)
    for cue in made:
        assert 1 <= len(cue.lines) <= LINES
        assert all(0 < len(line) <= LINE for line in cue.lines)
        assert 0 < cue.end - cue.start <= LONGEST_S + 1e-9
    if not (prefix and who):
        said = "".join("".join(cue.lines).replace(" ", "") for cue in made)
        assert said == "".join(text for text, _, _ in parts)
