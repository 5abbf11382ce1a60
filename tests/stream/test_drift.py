import numpy as np
import pytest

from stream.sources.drift import Drift

RATE = 16_000


def an_hour(ppm, *, jitter=None, block=320, seconds=3600):
    """One virtual hour of a device whose clock is off → (worst error in s, drift)."""
    drift = Drift(RATE)
    rate, worst, count = RATE * (1 + ppm * 1e-6), 0.0, 0
    samples = np.zeros(block, np.float32)
    for _ in range(seconds * RATE // block):
        count += block
        at = 1e6 + count / rate
        late = 0.0 if jitter is None else float(jitter.exponential(0.004))
        drift.step(samples, at + late)
        if at - 1e6 > 60:
            worst = max(worst, abs(drift.given / RATE - (at - 1e6)))
    return worst, drift


@pytest.mark.parametrize("ppm", [-500, -20, 0, 100, 500])
def test_an_hour_of_a_bad_crystal_is_an_hour(ppm):
    """Reliability bar, row 6: the timeline's error stays within 50 ms."""
    worst, _ = an_hour(ppm)
    assert worst <= 0.02


def test_late_callbacks_are_not_mistaken_for_drift():
    worst, _ = an_hour(300, jitter=np.random.default_rng(1), seconds=600)
    assert worst <= 0.05


def test_without_drift_no_sample_is_touched():
    drift = Drift(RATE)
    rng = np.random.default_rng(0)
    for index in range(1, 4000):
        block = rng.standard_normal(320).astype(np.float32)
        assert drift.step(block, 5.0 + index * 0.02) is block


def test_a_gap_that_was_told_is_not_made_up_for_again():
    drift = Drift(RATE)
    block, at = np.zeros(320, np.float32), 0.0
    for _ in range(3000):
        at += 0.02
        drift.step(block, at)
    at += 5.0
    drift.lost(5 * RATE)
    for _ in range(3000):
        at += 0.02
        drift.step(block, at)
    assert drift.given / RATE == pytest.approx(at, abs=0.01)


def test_a_stretched_block_is_the_same_signal():
    drift = Drift(RATE)
    made = []
    time = np.arange(320) / RATE
    for index in range(6000):
        start = index * 0.02
        wave = np.sin(2 * np.pi * 200 * (start + time)).astype(np.float32)
        made.append(drift.step(wave, (index + 1) * 0.02 * (1 - 500e-6)))
    heard = np.concatenate(made[3000:])
    assert np.abs(np.diff(heard)).max() < 2 * np.pi * 200 / RATE * 1.2  # no clicks
