import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.chunker import Chunker

CHUNK = 960
ramp = np.arange(1, 20_001, dtype=np.float32)  # sample i of the device has the value i + 1


def signature(chunk):
    return (chunk.start, chunk.valid, chunk.first, chunk.last, chunk.samples.tobytes())


def fed(chunker, samples, cuts):
    chunks = []
    for part in np.split(samples, sorted(cuts)):
        chunks += chunker.feed(part)
    return chunks + chunker.end()


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 6000),
    st.lists(st.integers(0, 6000), max_size=12),
    st.integers(1, 12),
)
def test_packets_of_any_size_give_the_same_chunks(n, cuts, tail):
    samples = ramp[:n]
    whole = fed(Chunker(CHUNK, tail), samples, [])
    split = fed(Chunker(CHUNK, tail), samples, [cut for cut in cuts if cut < n])
    assert [signature(c) for c in split] == [signature(c) for c in whole]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 6000), st.integers(1, 12), st.sampled_from([400, 720]))
def test_a_segment_holds_every_sample_and_enough_steps_to_flush(n, tail, receptive):
    chunks = fed(Chunker(CHUNK, tail, receptive=receptive), ramp[:n], [])
    assert sum(chunk.valid for chunk in chunks) == n
    heard = np.concatenate([chunk.samples[: chunk.valid] for chunk in chunks])
    np.testing.assert_array_equal(heard, ramp[:n])
    assert [chunk.start for chunk in chunks] == [i * CHUNK for i in range(len(chunks))]
    assert [chunk.first for chunk in chunks] == [i == 0 for i in range(len(chunks))]
    assert [chunk.last for chunk in chunks] == [i == len(chunks) - 1 for i in range(len(chunks))]
    assert all(chunk.valid == CHUNK for chunk in chunks[: n // CHUNK])
    assert chunks[-1].valid < CHUNK  # only that tells the encoder of the end
    assert all(not chunk.samples[chunk.valid :].any() for chunk in chunks)
    frames = max(0, (n - receptive) // 320 + 1)
    assert len(chunks) * CHUNK // 320 - tail >= frames
    # … and no step more than the flush needs, one aside.
    assert (len(chunks) - 2) * CHUNK // 320 - tail < max(frames, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("feed"), st.integers(1, 3000)),
            st.tuples(st.just("gap"), st.integers(0, 3000)),
            st.tuples(st.just("end"), st.just(0)),
        ),
        max_size=10,
    )
)
def test_the_timeline_never_shifts(actions):
    chunker = Chunker(CHUNK, 3, fill=800)
    clock = 0
    lost = np.zeros(len(ramp) * 2, bool)
    chunks = []
    for action, n in actions:
        if action == "feed":
            chunks += chunker.feed(np.arange(clock + 1, clock + n + 1, dtype=np.float32))
            clock += n
        elif action == "gap":
            chunks += chunker.gap(n)
            lost[clock : clock + n] = True
            clock += n
        else:
            chunks += chunker.end()
        assert chunker.position == clock
    chunks += chunker.end()
    covered = np.zeros_like(lost)
    end = 0
    for chunk in chunks:
        assert chunk.start % 320 == 0
        assert chunk.start > end - 320 if chunk.first or not chunk.valid else chunk.start == end
        # A sample has the value of its place, or is a zero where nothing was heard; a segment
        # that begins amid a frame has fewer than 320 zeros before it.
        place = np.arange(chunk.start, chunk.start + chunk.valid)
        heard = chunk.samples[: chunk.valid]
        assert ((heard == place + 1) | (heard == 0)).all()
        covered[place] |= heard == place + 1
        if chunk.valid:
            end = chunk.start + chunk.valid
    np.testing.assert_array_equal(covered[:clock], ~lost[:clock])


def test_a_short_hole_is_filled_with_silence():
    chunker = Chunker(CHUNK, 1, fill=800)
    chunks = chunker.feed(ramp[:500]) + chunker.gap(800) + chunker.feed(ramp[1300:1920])
    assert [(c.start, c.valid, c.first) for c in chunks] == [(0, 960, True), (960, 960, False)]
    joined = np.concatenate([c.samples for c in chunks])
    assert not joined[500:1300].any()
    np.testing.assert_array_equal(joined[1300:], ramp[1300:1920])


def test_a_long_hole_ends_the_segment_and_begins_another_on_the_frame_grid():
    chunker = Chunker(CHUNK, 1, fill=800)
    before = chunker.feed(ramp[:1000]) + chunker.gap(5000)
    assert [(c.start, c.valid, c.last) for c in before] == [(0, 960, False), (960, 40, True)]
    (after,) = chunker.feed(ramp[6000:7000])
    assert (after.start, after.valid, after.first) == (5760, 960, True)
    assert not after.samples[:240].any()
    np.testing.assert_array_equal(after.samples[240:], ramp[6000:6720])


def test_a_hole_before_the_first_sample_is_no_segment():
    chunker = Chunker(CHUNK, 1, fill=800)
    assert chunker.gap(320) == []
    assert chunker.end() == []
    (chunk, *_) = chunker.feed(ramp[:960])
    assert (chunk.start, chunk.first) == (320, True)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chunk": 1000}, "multiple of 320 samples, got 1000"),
        ({"chunk": 0}, "got 0"),
        ({"fill": 100}, "expected at least 320 samples, got 100"),
    ],
)
def test_settings_that_cannot_work_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Chunker(**{"chunk": CHUNK, "tail": 1, **kwargs})


def test_samples_of_two_channels_are_refused():
    with pytest.raises(ValueError, match=r"expected samples \[n\], got \(2, 2\)"):
        Chunker(CHUNK, 1).feed(np.zeros((2, 2), np.float32))
