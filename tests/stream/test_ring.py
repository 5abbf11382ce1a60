import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.ring import Ring

steps = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 25)),
        st.tuples(st.just("skip"), st.integers(1, 9)),
        st.tuples(st.just("read"), st.one_of(st.none(), st.integers(1, 12))),
    ),
    max_size=60,
)


@given(steps)
def test_every_sample_is_read_once_or_counted_as_lost(steps):
    ring = Ring(16, np.float32)
    clock = 0  # samples the device has heard
    position = 0  # where the reader is on that clock

    def read(limit):
        nonlocal position
        span = ring.read(limit)
        assert span.start == position + span.lost
        expected = np.arange(span.start, span.start + len(span.samples), dtype=np.float32)
        np.testing.assert_array_equal(span.samples, expected)
        position = span.start + len(span.samples)
        return span

    for action, n in steps:
        if action == "write":
            ring.write(np.arange(clock, clock + n, dtype=np.float32))
            clock += n
        elif action == "skip":
            ring.skip(n)
            clock += n
        else:
            read(n)
    while True:
        span = read(None)
        if not len(span.samples) and not span.lost:
            break
    assert position == clock


def test_a_full_ring_loses_the_oldest_samples_and_says_how_many():
    ring = Ring(10, np.int16)
    ring.write(np.arange(25, dtype=np.int16))
    assert len(ring) == 10
    span = ring.read()
    assert (span.start, span.lost) == (15, 15)
    assert span.samples.tolist() == list(range(15, 25))
    assert ring.lost == 15


def test_a_loss_in_the_device_precedes_what_came_after_it():
    ring = Ring(100)
    ring.write(np.ones(3, np.float32))
    ring.skip(7)
    ring.write(np.full(2, 2, np.float32))
    first, second = ring.read(), ring.read()
    assert (first.start, first.lost, len(first.samples)) == (0, 0, 3)
    assert (second.start, second.lost, second.samples.tolist()) == (10, 7, [2, 2])


def test_a_read_span_is_a_copy():
    ring = Ring(4)
    ring.write(np.ones(4, np.float32))
    span = ring.read()
    ring.write(np.zeros(4, np.float32))
    assert span.samples.tolist() == [1, 1, 1, 1]


def test_a_writer_that_overtakes_the_reader_never_yields_torn_samples():
    ring = Ring(512, np.int64)
    total = 200_000

    def write():
        for start in range(0, total, 100):
            ring.write(np.arange(start, start + 100))

    writer = threading.Thread(target=write)
    writer.start()
    position = heard = 0
    while position < total:
        span = ring.read()
        np.testing.assert_array_equal(
            span.samples, np.arange(span.start, span.start + len(span.samples))
        )
        position = span.start + len(span.samples)
        heard += len(span.samples)
    writer.join()
    assert heard + ring.lost == total


def test_an_empty_ring_is_refused():
    with pytest.raises(ValueError, match="expected at least 1 sample, got 0"):
        Ring(0)
