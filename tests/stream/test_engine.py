import asyncio
import pkgutil
import shutil
import threading
from unittest.mock import Mock

import numpy as np
import pytest

from model.state import Window
from stream.batcher import Ready
from stream.chunker import Chunker
from stream.engine import Engine, EngineFull
from stream.inference import EngineError, EngineSettings
from tests.stream.conftest import speechlike

WINDOW = Window(chunk=10, right=5, left=50)


def settings(checkpoint, **keys):
    given = {"chunk_ms": 200, "lookahead_ms": 100, "left_ms": 1000, "device": "cpu", "threads": 1}
    return EngineSettings(checkpoint=tuple(checkpoint), **{**given, **keys})


def readies(engine, slot, samples):
    chunker = Chunker(
        engine.loaded.chunk_samples, engine.loaded.lead, receptive=engine.loaded.receptive
    )
    chunks = chunker.feed(samples) + chunker.end()
    return [Ready(slot, c.start, c.samples, c.valid, c.first) for c in chunks]


async def heard(engine, batch_of_readies):
    return [(await engine.run([ready]))[0] for ready in batch_of_readies]


def joined(frames, head):
    return np.concatenate([getattr(each, head) for each in frames])


async def test_a_stream_gives_every_frame_once_as_probabilities(checkpoint):
    samples = speechlike(20_123)
    async with Engine(settings(checkpoint)) as engine:
        slot = engine.acquire()
        frames = await heard(engine, readies(engine, slot, samples))
        assert engine.loaded.names == ["diarization", "speaker", "ctc"]
        assert engine.loaded.vocabulary.tokens == ("<pad>", "|", *"aeiost")
        assert (engine.loaded.vocabulary.blank, engine.loaded.vocabulary.delimiter) == (0, "|")
        assert engine.loaded.receptive == 720
    count = (20_123 - 720) // 320 + 1
    activity, ctc, voice = (joined(frames, head) for head in ("activity", "ctc", "voice"))
    assert (activity.shape, ctc.shape, voice.shape) == ((count, 3), (count, 8), (count, 12))
    assert ((activity >= 0) & (activity <= 1)).all()
    np.testing.assert_allclose(np.exp(ctc).sum(axis=1), 1, atol=1e-5)
    ends = [0, *(each.end for each in frames if each.rows)]
    assert [each.start for each in frames if each.rows] == ends[:-1]
    assert ends[-1] == count * 320
    assert not any(each.nonfinite for each in frames)


async def test_streaming_is_the_masked_forward(checkpoint):
    import torch

    from model.checkpoint import load_pretrained

    samples = speechlike(16_000)
    async with Engine(settings(checkpoint)) as engine:
        frames = await heard(engine, readies(engine, engine.acquire(), samples))
    wave = torch.from_numpy(samples)[None]
    diarization = await asyncio.to_thread(load_pretrained, checkpoint[0])
    recogniser = await asyncio.to_thread(load_pretrained, checkpoint[2])
    with torch.inference_mode():
        logits = diarization(wave, streaming=WINDOW).logits
        ctc = recogniser(wave, streaming=WINDOW).logits
    np.testing.assert_allclose(joined(frames, "activity"), logits[0].sigmoid().numpy(), atol=1e-4)
    np.testing.assert_allclose(joined(frames, "ctc"), ctc[0].log_softmax(-1).numpy(), atol=1e-4)


async def test_embeddings_are_those_of_the_published_class(checkpoint):
    import torch

    from model.checkpoint import load_pretrained

    samples = speechlike(16_000)
    async with Engine(settings(checkpoint)) as engine:
        frames = await heard(engine, readies(engine, engine.acquire(), samples))
        delay = engine.loaded.voice_delay
        voice = joined(frames, "voice")[2 * delay :].astype(np.float64)
        mine = engine.embed(
            np.array(float(len(voice))), voice.sum(axis=0), np.square(voice).sum(axis=0)
        )
    model = await asyncio.to_thread(load_pretrained, checkpoint[1])
    with torch.inference_mode():
        theirs = model(torch.from_numpy(samples)[None], streaming=WINDOW).embeddings
    np.testing.assert_allclose(mine, theirs[0].numpy(), atol=1e-4)


async def test_a_stream_is_the_same_alone_and_beside_a_neighbour_fed_nonsense(checkpoint):
    samples = speechlike(16_000)
    async with Engine(settings(checkpoint), streams=2) as engine:
        slot, other = engine.acquire(), engine.acquire()
        alone = await heard(engine, readies(engine, slot, samples))
        beside, reset = [], 0
        for index, ready in enumerate(readies(engine, slot, samples)):
            noise = np.full_like(ready.samples, [np.nan, 1e38, -np.inf, 0.1][index % 4])
            neighbour = Ready(other, ready.start, noise, len(noise), first=index == 0)
            mine, theirs = await engine.run([ready, neighbour])
            beside.append(mine)
            reset += theirs.nonfinite
            for head in (theirs.activity, theirs.voice, theirs.ctc):
                assert np.isfinite(head).all()
        assert engine.stats.batches == {1: len(beside), 2: len(beside)}
    for head in ("activity", "voice", "ctc"):
        np.testing.assert_allclose(joined(alone, head), joined(beside, head), rtol=1e-5, atol=1e-5)
    assert reset >= 3


def short_of_memory(monkeypatch, method, fits):
    """From now on it runs out of memory unless ``fits`` says yes to the slots → those it is given.

    Methods have a step's slots as their last argument but ``valid``.
    """
    import torch

    whole, tried = pkgutil.resolve_name(method), []

    def limited(model, rows, state, slots, *valid):
        tried.append(slots.tolist())
        if not fits(slots.tolist()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return whole(model, rows, state, slots, *valid)

    monkeypatch.setattr(method, limited)
    return tried


async def together(engine, streams):
    """Streams of equal length, a batch of all at a time → the frames of each."""
    steps = zip(*(readies(engine, slot, samples) for slot, samples in streams), strict=True)
    batches = [await engine.run(batch) for batch in steps]
    return [list(frames) for frames in zip(*batches, strict=True)]


def close(some, others):
    for head in ("activity", "voice", "ctc"):
        np.testing.assert_allclose(joined(some, head), joined(others, head), rtol=1e-5, atol=1e-5)


WHOLE_STEP = "model.streaming.StreamingModel.step"
LAST_HEAD = "model.heads.UniSpeechSatForXVector.step"


async def test_a_batch_without_enough_memory_is_computed_in_halves(checkpoint, monkeypatch):
    async with Engine(settings(checkpoint), streams=4) as engine:
        streams = [(engine.acquire(), speechlike(16_000, seed)) for seed in range(4)]
        whole = await together(engine, streams)
        tried = short_of_memory(monkeypatch, WHOLE_STEP, lambda slots: len(slots) <= 2)
        parts = await together(engine, streams)
    for one, other in zip(parts, whole, strict=True):
        assert not any(frames.nonfinite for frames in one)
        assert [frames.start for frames in one] == [frames.start for frames in other]
        close(one, other)
    assert tried[:3] == [[0, 1, 2, 3], [0, 1], [2, 3]]
    assert max(map(len, tried[1:])) == 2  # it is known by now


async def test_a_step_that_breaks_off_amid_its_writes_costs_its_streams_a_chunk(
    checkpoint, monkeypatch
):
    async with Engine(settings(checkpoint), streams=4) as engine:
        size = engine.loaded.chunk_samples
        streams = [(engine.acquire(), speechlike(20_000, seed)) for seed in range(4)]
        after = [(slot, samples[3 * size :]) for slot, samples in streams]
        expected = await together(engine, after)
        steps = list(zip(*(readies(engine, *stream) for stream in streams), strict=True))
        for batch in steps[:2]:
            await engine.run(batch)
        short_of_memory(monkeypatch, LAST_HEAD, lambda slots: len(slots) <= 2)
        lost, *batches = [await engine.run(batch) for batch in steps[2:]]
    for frames in lost:
        assert (frames.nonfinite, frames.rows, frames.start) == (True, 0, 3 * size)
    for one, other in zip(zip(*batches, strict=True), expected, strict=True):
        assert not any(frames.nonfinite for frames in one)
        assert [frames.start - 3 * size for frames in one] == [frames.start for frames in other]
        close(one, other)


async def test_a_stream_that_never_fits_is_a_gap_and_its_neighbours_notice_nothing(
    checkpoint, monkeypatch
):
    async with Engine(settings(checkpoint), streams=4) as engine:
        streams = [(engine.acquire(), speechlike(16_000, seed)) for seed in range(4)]
        whole = await together(engine, streams)
        short_of_memory(monkeypatch, WHOLE_STEP, lambda slots: 3 not in slots)
        monkeypatch.setattr("stream.inference.log", log := Mock())
        *neighbours, starved = await together(engine, streams)
    assert all(frames.nonfinite and not frames.rows for frames in starved)
    for one, other in zip(neighbours, whole[:3], strict=True):
        assert not any(frames.nonfinite for frames in one)
        close(one, other)
    said = [call.kwargs["streams"] for call in log.warning.call_args_list]
    assert said == [4, 2, 1]  # and not for every chunk


@pytest.mark.parametrize("kind", ["AcceleratorError", "RuntimeError"])
async def test_a_device_that_fails_is_one_clear_error(checkpoint, monkeypatch, kind):
    import torch

    def fails(*_):
        raise getattr(torch, kind, RuntimeError)("CUDA error: unspecified launch failure\nDebug it")

    async with Engine(settings(checkpoint)) as engine:
        (first, *_) = readies(engine, engine.acquire(), speechlike(16_000))
        for method in (WHOLE_STEP, "model.state.Slots.freeze", "model.state.Slots.load"):
            monkeypatch.setattr(method, fails)
        for call in (engine.run([first]), engine.freeze(0), engine.load(0, bytes(9))):
            with pytest.raises(EngineError, match="cannot compute any more") as caught:
                await call
            assert str(caught.value).endswith("(CUDA error: unspecified launch failure)")


async def test_what_no_device_says_is_no_error_of_the_engine(checkpoint, monkeypatch):
    def fails(*_):
        raise RuntimeError("a fault of ours")

    async with Engine(settings(checkpoint)) as engine:
        (first, *_) = readies(engine, engine.acquire(), speechlike(16_000))
        monkeypatch.setattr(WHOLE_STEP, fails)
        with pytest.raises(RuntimeError, match="a fault of ours"):
            await engine.run([first])


@pytest.mark.parametrize(
    "method",
    ["model.checkpoint.load_pretrained", "model.streaming.StreamingModel.zeros", WHOLE_STEP],
)
async def test_a_device_too_small_for_the_streams_says_what_to_lower(
    checkpoint, monkeypatch, method
):
    import torch

    def fails(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(method, fails)
    with pytest.raises(EngineError, match=r"memory for 3 streams; lower server\.max_streams"):
        async with Engine(settings(checkpoint), streams=3):
            pass


async def test_after_nonsense_a_slot_begins_afresh_at_that_chunk(checkpoint):
    samples = speechlike(16_000)
    async with Engine(settings(checkpoint)) as engine:
        slot = engine.acquire()
        clean = readies(engine, slot, samples)
        size = engine.loaded.chunk_samples
        bad = [*clean]
        spoilt = bad[2].samples.copy()
        spoilt[5] = np.nan
        bad[2] = Ready(slot, bad[2].start, spoilt, bad[2].valid)
        frames = await heard(engine, bad)
        assert [each.nonfinite for each in frames[:4]] == [False, False, True, False]
        assert frames[2].start == 2 * size
        # From there on it is a stream that began with a chunk of silence.
        fresh = np.concatenate([np.zeros(size, np.float32), samples[3 * size :]])
        again = await heard(engine, readies(engine, slot, fresh))
    later = [each for each in frames[2:] if each.rows]
    expected = joined(again, "activity")
    got = joined(later, "activity")
    n = min(len(got), len(expected))
    np.testing.assert_allclose(got[:n], expected[:n], atol=1e-5)
    assert later[0].start == 2 * size


async def test_a_slot_saved_and_loaded_elsewhere_goes_on_bit_for_bit(checkpoint):
    samples = speechlike(16_000)
    async with Engine(settings(checkpoint), streams=3) as engine:
        first = engine.acquire()
        chunks = readies(engine, first, samples)
        await heard(engine, chunks[:2])
        data = (await engine.freeze(first))()
        rest = await heard(engine, chunks[2:])
        engine.acquire()
        second = engine.acquire()
        await engine.load(second, data)
        moved = [Ready(second, c.start, c.samples, c.valid, c.first) for c in chunks[2:]]
        restored = await heard(engine, moved)
        with pytest.raises(ValueError, match="saved slot"):
            await engine.load(second, b"nonsense, but long enough")
        with pytest.raises(ValueError, match="got 3 bytes"):
            await engine.load(second, b"abc")
    for before, after in zip(rest, restored, strict=True):
        assert before.start == after.start
        np.testing.assert_array_equal(before.activity, after.activity)


async def test_a_slot_is_taken_once_and_given_back(checkpoint):
    async with Engine(settings(checkpoint, slots=2)) as engine:
        slots = {engine.acquire(), engine.acquire()}
        assert slots == {0, 1}
        assert engine.active == 2
        with pytest.raises(EngineFull, match="all 2 slots are taken"):
            engine.acquire()
        engine.release(1)
        assert engine.acquire() == 1


async def test_a_batch_that_cannot_be_is_refused(checkpoint):
    async with Engine(settings(checkpoint, slots=2)) as engine:
        slot = engine.acquire()
        silence = np.zeros(engine.loaded.chunk_samples, np.float32)
        with pytest.raises(ValueError, match=r"expected slots that are taken, got \[1\]"):
            await engine.run([Ready(1, 0, silence, 1)])
        with pytest.raises(ValueError, match="every slot once"):
            await engine.run([Ready(slot, 0, silence, 1), Ready(slot, 0, silence, 1)])
        with pytest.raises(ValueError, match=r"expected samples \[3200\], got \(3,\)"):
            await engine.run([Ready(slot, 0, silence[:3], 1)])
        assert await engine.run([]) == []


async def test_the_inference_thread_ends_with_the_engine(checkpoint):
    async with Engine(settings(checkpoint)):
        assert any(thread.name == "inference" for thread in threading.enumerate())
    assert not any(thread.name == "inference" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"device": "cuda:93"}, "device: cuda:93 is not here"),
        ({"checkpoint": ("/no/such/place",)}, "/no/such/place"),
    ],
)
async def test_what_cannot_be_opened_is_one_clear_error(checkpoint, keys, message):
    with pytest.raises(EngineError, match=message) as caught:
        async with Engine(settings(checkpoint).model_copy(update=keys)):
            pass
    assert "\n" not in str(caught.value)
    assert not any(thread.name == "inference" for thread in threading.enumerate())


async def test_two_heads_of_a_kind_are_refused(checkpoint):
    with pytest.raises(EngineError, match="one head of a kind"):
        async with Engine(settings([checkpoint[0], checkpoint[0]])):
            pass


async def test_a_ctc_checkpoint_without_a_vocabulary_is_refused(checkpoint, tmp_path):
    await asyncio.to_thread(shutil.copytree, checkpoint[2], tmp_path / "ctc")
    (tmp_path / "ctc" / "vocab.json").unlink()
    with pytest.raises(EngineError, match=r"expected a vocab\.json"):
        async with Engine(settings([str(tmp_path / "ctc")])):
            pass


def test_a_chunk_that_is_no_whole_number_of_frames_is_refused():
    with pytest.raises(ValueError, match="expected a multiple of 20 ms, got 510"):
        EngineSettings(chunk_ms=510)


async def test_the_mean_of_label_frames_is_the_published_head(checkpoint, tmp_path):
    import torch

    from model.checkpoint import load_pretrained, read_config
    from model.heads import UniSpeechSatForSequenceClassification

    config = await asyncio.to_thread(read_config, checkpoint[0])
    config.id2label = {0: "calm", 1: "angry"}
    torch.manual_seed(3)
    model = UniSpeechSatForSequenceClassification(config).eval()
    folder = tmp_path / "emotion"
    await asyncio.to_thread(model.save_pretrained, folder)
    samples = speechlike(16_000)
    async with Engine(settings([str(folder)])) as engine:
        # Without a preprocessor_config.json the published default holds: the wave is normalised.
        assert engine.loaded.labels == {"emotion": ("calm", "angry")}
        assert (engine.loaded.vocabulary, engine.loaded.voice_id, engine.has_voice) == (
            None,
            None,
            False,
        )
        await asyncio.to_thread(
            (folder / "preprocessor_config.json").write_text, '{"do_normalize": false}'
        )
    async with Engine(settings([str(folder)])) as engine:
        frames = await heard(engine, readies(engine, engine.acquire(), samples))
    mean = np.concatenate([each.labels["emotion"] for each in frames]).mean(axis=0)
    again = await asyncio.to_thread(load_pretrained, str(folder))
    with torch.inference_mode():
        logits = again(torch.from_numpy(samples)[None], streaming=WINDOW).logits
    np.testing.assert_allclose(mean, logits[0].numpy(), atol=1e-4)
