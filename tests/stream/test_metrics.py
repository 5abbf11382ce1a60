import numpy as np
import pytest

from stream.metrics import Histogram


def test_quantiles_are_true_to_a_percent():
    values = np.random.default_rng(0).lognormal(5, 1, 10_000)
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    for q in (0.01, 0.5, 0.99):
        assert histogram.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.02)
    assert histogram.count == 10_000
    assert histogram.total == pytest.approx(values.sum())


def test_nothing_and_zero_have_quantiles_too():
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0
    histogram.observe(0.0)
    assert histogram.quantile(0.99) == 0
