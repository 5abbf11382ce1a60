import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stream.resample import Resampler

RATES = [8_000, 11_025, 22_050, 44_100, 48_000, 96_000]


def through(resampler, samples, sizes):
    out, at = [], 0
    while at < len(samples):
        n = sizes[len(out) % len(sizes)]
        out.append(resampler.step(samples[at : at + n]))
        at += n
    return np.concatenate([*out, resampler.flush()])


@pytest.mark.parametrize("rate", RATES)
def test_a_tone_keeps_its_phase_and_its_length(rate):
    n = rate * 2 + 17
    tone = np.sin(2 * np.pi * 200 * np.arange(n) / rate).astype(np.float32)
    resampler = Resampler(rate)
    out = through(resampler, tone, [777])
    assert len(out) == round(n * 16_000 / rate)
    assert (resampler.taken, resampler.given) == (n, len(out))
    expected = np.sin(2 * np.pi * 200 * np.arange(len(out)) / 16_000)
    np.testing.assert_allclose(out[400:-400], expected[400:-400], atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 3000), min_size=1, max_size=8), st.sampled_from(RATES))
def test_the_sizes_of_blocks_change_no_bit(sizes, rate):
    samples = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
    whole = through(Resampler(rate), samples, [len(samples)])
    np.testing.assert_array_equal(through(Resampler(rate), samples, sizes), whole)


def test_at_16_khz_nothing_is_touched():
    samples = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    np.testing.assert_array_equal(through(Resampler(16_000), samples, [7, 99]), samples)


def test_a_non_finite_sample_spoils_only_its_own_span():
    clean = np.random.default_rng(0).standard_normal(96_000).astype(np.float32)
    bad = clean.copy()
    bad[30_000:30_300] = np.nan
    bad[60_000] = np.inf
    out = through(Resampler(48_000), bad, [4800])
    spoilt = np.flatnonzero(~np.isfinite(out))
    assert {*spoilt} == {*range(9_968, 10_132), *range(19_968, 20_033)}
    expected = through(Resampler(48_000), np.where(np.isfinite(bad), bad, 0), [4800])
    good = np.isfinite(out)
    np.testing.assert_array_equal(out[good], expected[good])


def test_a_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="got 0"):
        Resampler(0)
