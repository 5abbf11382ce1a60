"""The demo conversation and its references agree."""

import json
from importlib.resources import files

import numpy as np
import pytest
import soundfile

RATE = 16_000
FOLDER = files("stream") / "demo"


@pytest.fixture(scope="module")
def audio():
    with (FOLDER / "meeting.flac").open("rb") as file:
        samples, rate = soundfile.read(file, dtype="float32")
    assert rate == RATE
    assert samples.ndim == 1
    return samples


@pytest.fixture(scope="module")
def turns():
    rows = [line.split() for line in (FOLDER / "meeting.rttm").read_text().splitlines()]
    return [(row[7], float(row[3]), float(row[3]) + float(row[4])) for row in rows]


def test_it_is_a_short_meeting_of_four_with_some_overlap(audio, turns):
    assert 60 <= len(audio) / RATE <= 90
    assert {speaker for speaker, _, _ in turns} == {"Nora", "Joe", "Fergus", "Meg"}
    count = np.zeros(len(audio), np.int8)
    for _, start, end in turns:
        assert 0 < start < end < len(audio) / RATE
        count[int(start * RATE) : int(end * RATE)] += 1
    assert 0.10 <= np.mean(count[count > 0] > 1) <= 0.15


def test_the_reference_holds_the_speech_and_nothing_else(audio, turns):
    speech = np.zeros(len(audio), np.bool_)
    for _, start, end in turns:
        speech[int(start * RATE) : int((end + 0.1) * RATE)] = True  # the room rings on
    level_db = 10 * np.log10(np.mean(audio[speech] ** 2) / np.mean(audio[~speech] ** 2))
    assert level_db > 20


def test_every_line_of_the_transcript_is_spoken_by_its_speaker(turns):
    lines = [json.loads(line) for line in (FOLDER / "meeting.jsonl").read_text().splitlines()]
    text = (FOLDER / "meeting.txt").read_text().splitlines()
    assert text == [f"{line['speaker']}: {line['text']}" for line in lines]
    for line in lines:
        mine = [(start, end) for who, start, end in turns if who == line["speaker"]]
        spoken = sum(max(0, min(e, line["end"]) - max(s, line["start"])) for s, e in mine)
        assert spoken > 0.7 * (line["end"] - line["start"])


def test_it_is_small_enough_for_a_wheel():
    assert len((FOLDER / "meeting.flac").read_bytes()) < 2_000_000
