import asyncio
import json
from datetime import UTC, datetime

import pytest
import soundfile

from sinks.events import (
    Speaker,
    SpeakerRevised,
    TranscriptFinal,
    TranscriptPartial,
    TurnEnded,
    Word,
)
from stream.clock import SAMPLE_RATE
from stream.evaluate import (
    EvalError,
    Recording,
    Score,
    at_latency,
    evaluate,
    evaluate_at,
    flicker,
    recordings,
    score,
    transcript,
    turns,
)
from stream.inference import EngineSettings
from stream.score import Diarization, Edits, ScoreError, Span, write_rttm
from stream.sources.source import SourceError
from stream.tracks.settings import TracksSettings
from tests.stream.conftest import speechlike


def envelope(seq, start, end):
    return {
        "session_id": "s",
        "stream_id": "x",
        "seq": seq,
        "start": start,
        "end": end,
        "wall_time": datetime(2026, 1, 1, tzinfo=UTC),
        "lag_ms": 0.0,
    }


def ended(seq, start, end, label):
    speaker = Speaker(label=label)
    return TurnEnded(turn_id=f"T{seq}", speaker=speaker, **envelope(seq, start, end))


def revised(seq, turn_ids, source, target, reason="merged"):
    return SpeakerRevised(
        revision_of=turn_ids,
        from_label=source,
        to_label=target,
        reason=reason,
        **envelope(seq, 9, 9),
    )


def final(seq, start, text):
    return TranscriptFinal(text=text, words=[], **envelope(seq, start, start + 1))


EVENTS = [
    ended(0, 0, 4, "S1"),
    final(1, 6, "World"),
    ended(2, 5, 8, "S2"),
    final(3, 0, "hello"),
    revised(4, ["T2"], "S2", "S1"),
    revised(5, ["T0", "T2"], "S1", "Ada", "identified"),
]


def test_turns_in_the_end_and_as_first_said():
    assert turns(EVENTS) == [Span(0, 4, "S1"), Span(5, 8, "S1")]
    assert turns(EVENTS, revised=False) == [Span(0, 4, "S1"), Span(5, 8, "S2")]
    assert transcript(EVENTS) == "hello World"


def test_one_recording_is_scored_with_and_without_revisions(tmp_path):
    recording = Recording(
        "x", tmp_path, (Span(0, 4, "A"), Span(5, 8, "A"), Span(8, 9, "B")), "Hello, word."
    )
    result = score(
        recording, EVENTS, audio_s=10, compute_s=1, latencies_ms=[100, 300, 200], words=True
    )
    assert result.error == Diarization(8, 1, 0, 0)
    assert result.error_live == Diarization(8, 1, 0, 3)
    assert (result.speakers, result.speakers_found, result.count_error) == (2, 1, 1)
    assert result.swaps == 0
    assert result.words == Edits(2, 1, 0, 0)
    assert result.characters == Edits(10, 0, 0, 1)
    data = (result + result).to_dict()
    assert data["recordings"] == 2
    assert data["der"] == {
        "rate": 0.125,
        "miss": 0.125,
        "false_alarm": 0.0,
        "confusion": 0.0,
        "speech_s": 16,
    }
    assert data["der_live"]["rate"] == 0.5
    assert data["speaker_count_error"] == 2
    assert (data["wer"], data["cer"]) == (0.5, 0.1)
    assert (data["latency_p50_ms"], data["latency_p99_ms"]) == (200, 300)
    assert data["realtime_factor"] == 0.1
    json.dumps(data, allow_nan=False)


def test_what_was_not_measured_is_none():
    data = Score(recordings=1, audio_s=1).to_dict()
    assert data["der"]["rate"] is None
    assert data["wer"] is None
    assert data["latency_p50_ms"] is None
    with_text = Score(words=Edits(4, 1, 0, 0))
    assert (Score() + with_text).words == (with_text + Score()).words == Edits(4, 1, 0, 0)


def transcript_of(kind, text):
    words = [Word(word=word, start=0, end=1, confidence=1) for word in text.split()]
    return kind(text=text, words=words, **envelope(0, 0, 1))


def test_partial_words_that_are_told_otherwise_later_are_counted():
    def told(*texts):
        return flicker(
            transcript_of(TranscriptFinal if text[0] == "." else TranscriptPartial, text[1:])
            for text in texts
        )

    assert told() == (0, 0)
    assert told(" a b", " a b c", ".a b c") == (3, 0)
    assert told(" a b", " a c", ".a c") == (3, 1)  # b became c
    assert told(" he", " hello", ".hello") == (2, 1)  # one that grows is told otherwise
    assert told(" a b", " a", ".a") == (2, 1)  # b was taken back
    assert told(" a b", ".a d") == (2, 1)
    assert told(" a b c", ".a", " b c d", ".b c e") == (4, 1)  # the final took the first word only
    assert told(".a b", " c", ".c d") == (1, 0)
    summed = Score(partials=4, partials_changed=1) + Score(partials=4)
    assert summed.flicker == 0.125
    data = summed.to_dict()
    assert (data["partial_words"], data["partial_words_changed"]) == (8, 0.125)
    assert Score().to_dict()["partial_words_changed"] is None


def touch(folder, name, file_id=None):
    (folder / f"{name}.wav").touch()
    write_rttm(folder / f"{name}.rttm", {file_id or name: [Span(0, 1, "A")]})


def test_pairs_are_found_and_their_text(tmp_path):
    for name in ("a", "b", "c", "d", "e"):
        touch(tmp_path, name)
    touch(tmp_path, "f", file_id="another")
    (tmp_path / "lonely.flac").touch()
    (tmp_path / "a.txt").write_text("A: Hello, all.\nNote: two\n")
    (tmp_path / "b.stm").write_text(
        ";; comment\nb 1 A 5 6 <o,f0,male> second one\nb 1 A 0 1 first\n"
        "b 1 A 7 8 ignore_time_segment_in_scoring\n"
    )
    (tmp_path / "c.jsonl").write_text(
        '{"start": 3, "text": "late"}\n{"start": 1, "text": "soon"}\n'
    )
    segments = [{"session_id": "d", "start_time": "1.5", "end_time": "2", "words": "one two"}]
    (tmp_path / "d.seglst.json").write_text(json.dumps(segments))
    found = {each.name: each for each in recordings(tmp_path)}
    assert list(found) == ["a", "b", "c", "d", "e", "f"]
    assert found["a"].text == "Hello, all. Note: two"
    assert found["b"].text == "first second one"
    assert found["c"].text == "soon late"
    assert found["d"].text == "one two"
    assert found["e"].text is None
    assert found["f"].speakers == (Span(0, 1, "A"),)


def test_bad_references_are_named(tmp_path):
    with pytest.raises(EvalError, match="expected a folder"):
        recordings(tmp_path / "none")
    with pytest.raises(EvalError, match=r"expected pairs like talk.flac and talk.rttm, found none"):
        recordings(tmp_path)
    touch(tmp_path, "a")
    (tmp_path / "a.stm").write_text("\na 1 A x 6 words\n")
    with pytest.raises(EvalError, match=r"a.stm:2: expected an STM line"):
        recordings(tmp_path)
    (tmp_path / "a.stm").unlink()
    (tmp_path / "a.json").write_text('{"text": "not a list"}')
    with pytest.raises(EvalError, match=r"a.json: expected segments with text"):
        recordings(tmp_path)
    (tmp_path / "a.json").unlink()
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(EvalError, match=r"a.txt: cannot be read as text"):
        recordings(tmp_path)
    (tmp_path / "a.txt").unlink()
    write_rttm(tmp_path / "a.rttm", {"x": [Span(0, 1, "A")], "y": [Span(0, 1, "A")]})
    with pytest.raises(ScoreError, match=r"a.rttm: expected file id 'a', got x, y"):
        recordings(tmp_path)


def test_a_folder_is_heard_streaming_and_offline(tmp_path, checkpoint):
    for name, seconds in (("one", 4.3), ("two", 2.0)):
        samples = speechlike(round(seconds * SAMPLE_RATE))
        soundfile.write(tmp_path / f"{name}.wav", samples, SAMPLE_RATE)
        write_rttm(tmp_path / f"{name}.rttm", {name: [Span(0, 1.5, "A"), Span(1, 2, "B")]})
    (tmp_path / "one.txt").write_text("to be or not")
    engine = EngineSettings(
        checkpoint=tuple(checkpoint), chunk_ms=400, lookahead_ms=200, left_ms=2000, device="cpu"
    )
    tracks = TracksSettings().over({"turns": {"min_on_ms": 60, "offset": 0.5}})
    seen = []
    result = asyncio.run(
        evaluate(
            tmp_path, engine, tracks, on_file=lambda file, count: seen.append((file.name, count))
        )
    )
    assert seen == [("one", 2), ("two", 2)]
    assert result.streaming.audio_s == pytest.approx(6.3, abs=1e-3)
    assert result.streaming.error.total_s == pytest.approx(5)
    assert result.streaming.words.total == 4
    offline = result.offline
    assert offline is not None
    assert offline.recordings == 2
    assert offline.error.total_s == pytest.approx(5)
    assert offline.latencies_ms == ()
    data = result.to_dict()
    json.dumps(data, allow_nan=False)
    assert data["chunk_ms"] == 400
    assert data["decoder"] == "greedy"  # no language model lies beside that checkpoint
    assert offline.partials == 0
    assert len(data["checkpoint"]) == 3
    assert data["total"]["streaming"]["latency_p50_ms"] >= 0
    assert data["files"][1]["streaming"]["wer"] is None
    assert data["files"][0]["offline"]["wer"] is not None


def test_offline_can_be_left_out_and_a_damaged_file_is_named(tmp_path, checkpoint):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    write_rttm(tmp_path / "a.rttm", {"a": [Span(0, 1, "A")]})
    engine = EngineSettings(checkpoint=tuple(checkpoint), device="cpu")
    with pytest.raises(SourceError, match=r"a.wav"):
        asyncio.run(evaluate(tmp_path, engine, offline=False))
    soundfile.write(tmp_path / "a.wav", speechlike(SAMPLE_RATE), SAMPLE_RATE)
    result = asyncio.run(evaluate(tmp_path, engine, offline=False))
    assert result.offline is None
    assert result.to_dict()["total"]["offline"] is None


@pytest.mark.parametrize(
    ("latency_s", "window"),
    [(0.32, (200, 120)), (0.64, (400, 240)), (1.28, (800, 480)), (0.04, (20, 20))],
)
def test_a_latency_is_chunk_and_look_ahead(latency_s, window):
    settings = at_latency(EngineSettings(left_ms=2000), latency_s)
    assert (settings.chunk_ms, settings.lookahead_ms) == window
    assert settings.left_ms == 2000


@pytest.mark.parametrize("latency_s", [0, 0.02, -1, float("nan"), float("inf"), 90])
def test_a_latency_that_cannot_be_is_refused(latency_s):
    with pytest.raises(EvalError, match=rf"latency {latency_s:g} s: expected"):
        at_latency(EngineSettings(), latency_s)


def test_several_latencies_are_streamed_and_offline_is_heard_once(tmp_path, checkpoint):
    soundfile.write(tmp_path / "one.wav", speechlike(3 * SAMPLE_RATE), SAMPLE_RATE)
    write_rttm(tmp_path / "one.rttm", {"one": [Span(0, 2, "A")]})
    engine = EngineSettings(checkpoint=tuple(checkpoint), device="cpu")
    seen = []
    first, second = asyncio.run(
        evaluate_at(
            tmp_path, engine, [0.64, 0.32], on_file=lambda file, _: seen.append(file.offline)
        )
    )
    assert (first.chunk_ms, first.lookahead_ms, first.latency_s) == (400, 240, 0.64)
    assert (second.chunk_ms, second.lookahead_ms, second.latency_s) == (200, 120, 0.32)
    assert first.offline is not None
    assert second.offline is None
    assert [offline is None for offline in seen] == [False, True]
    assert first.streaming.audio_s == second.streaming.audio_s == pytest.approx(3, abs=1e-3)
