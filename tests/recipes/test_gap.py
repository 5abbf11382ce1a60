import json
from xml.etree import ElementTree

import pytest

from model.state import Window
from recipes.gap import AXES, METRICS, Gap, draw, measure, page, series, whole, windows
from recipes.hearing import SHIPPED
from recipes.verification import dev_utterances
from stream.tracks.settings import TracksSettings
from tests.recipes.test_conversations import meeting

PATHS = {
    "data": "d",
    "conversations": "c",
    "tracks": "t",
    "report": "r.json",
    "page": "p.md",
}


def point(window, value):
    return {"window": window, **dict.fromkeys(METRICS, value)}


def frames(**changed):
    return {axis: getattr(SHIPPED, axis) for axis in AXES} | changed


@pytest.fixture
def report():
    places = [
        frames(),
        frames(chunk=5),
        frames(chunk=50),
        frames(right=0),
        frames(left=50),
    ]
    return {
        "command": "python -m recipes.gap",
        "shipped": frames(),
        "recorded_s": 180.0,
        "simulated_s": 360.0,
        "utterances": 240,
        "axes": {"chunk": [5, 50], "right": [0], "left": [50]},
        "scores": {
            "zero-shot": [point(None, 20.0), *(point(w, 30.0 + i) for i, w in enumerate(places))],
            "adapted": [point(None, 19.5), *(point(w, 21.0 + i) for i, w in enumerate(places))],
        },
    }


def test_every_window_is_measured_once_and_one_thing_moves_at_a_time():
    settings = Gap(
        weights={"adapted": "w"}, chunk=(5, SHIPPED.chunk), right=(0,), left=(50,), **PATHS
    )
    found = windows(settings)
    assert found[0] == SHIPPED
    assert len(found) == len(set(found)) == 4
    for window in found[1:]:
        moved = [axis for axis in AXES if getattr(window, axis) != getattr(SHIPPED, axis)]
        assert len(moved) == 1


def test_a_series_goes_along_one_axis_through_what_ships(report):
    assert [at for at, _ in series(report, "adapted", "chunk")] == [5, SHIPPED.chunk, 50]
    assert [at for at, _ in series(report, "adapted", "right")] == [0, SHIPPED.right]
    assert whole(report, "zero-shot")["eer"] == 20


def test_the_page_has_every_number_and_says_what_the_weights_are(report):
    made = page(report, "gap.svg")
    assert "![DER, EER and CER against chunk, look-ahead and left context](gap.svg)" in made
    assert "| whole | 20.0 | 19.5 |" in made
    assert "chunk 0.1 s, look-ahead 0.24 s, left context 10 s | 31.0 | 22.0" in made
    assert "trained with the whole recording in view only" in made
    alone = {**report, "scores": {"adapted": report["scores"]["adapted"]}}
    assert "| whole | 19.5 | 19.5 | 19.5 | 19.5 |" in page(alone, "gap.svg")
    assert "whole recording in view only" not in page(alone, "gap.svg")


def test_the_picture_is_the_same_each_time_and_has_no_ground(report, tmp_path):
    draw(report, tmp_path / "one.svg")
    draw(report, tmp_path / "two.svg")
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    words = {"".join(e.itertext()).strip() for e in ElementTree.fromstring(text).iter()}
    assert {"zero-shot", "adapted", "chunk, s", "look-ahead, s", "left context, s"} <= words
    assert "fill: #ffffff" not in text


def test_a_window_gives_a_number_a_metric(student, dev):
    clip = meeting(dev, 2, 8.0, [1, 2, 0])
    some = dev_utterances(dev, each=2)
    found = measure(student, Window(10, 50, 5), dev, some, [clip], [clip], TracksSettings())
    assert set(found) == set(METRICS)
    assert found["recorded"] == found["simulated"]
    json.dumps(found, allow_nan=False)
