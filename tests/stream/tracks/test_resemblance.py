import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from stream.tracks.resemblance import TwoCovariance, agglomerate, value

MODEL = TwoCovariance(between=0.5, within=0.1, within_s=0.9, dimensions=3)


def density(values, variances, shared):
    """Log-density of one dimension of some turns, of one speaker if `shared`."""
    covariance = np.diag(variances) + MODEL.between / 3 * (
        np.ones((len(values), len(values))) if shared else np.eye(len(values))
    )
    return multivariate_normal(np.zeros(len(values)), covariance).logpdf(values)


def test_the_ratio_is_that_of_the_gaussians():
    rng = np.random.default_rng(3)
    vectors, evidence = rng.standard_normal((4, 3)), np.array([20.0, 50.0, 80.0, 400.0])
    precisions = np.array([MODEL.precision(frames) for frames in evidence])
    expected = sum(
        density(vectors[:, k], 1 / precisions / 3, shared=True)
        - density(vectors[:, k], 1 / precisions / 3, shared=False)
        for k in range(3)
    )
    totals = precisions[:, None] * vectors
    one, apart = (
        value(MODEL, totals, precisions, groups, 0.0) for groups in (np.zeros(4), np.arange(4))
    )
    assert one - apart == pytest.approx(expected)


def test_a_turn_weighs_by_its_clean_speech():
    assert MODEL.precision(0) == 0.0
    assert MODEL.precision(50) == pytest.approx(1.0)
    assert MODEL.precision(1e9) == pytest.approx(10.0)


def test_those_of_one_voice_are_joined():
    turns = np.eye(3)[[0, 1, 0, 2, 1, 0]]
    weights = np.full(6, 5.0)
    nobody = np.zeros((6, 6), np.bool_)
    found = agglomerate(MODEL, 5 * turns, weights, nobody, 0.0)
    assert found.tolist() == [0, 1, 0, 3, 1, 0]
    assert agglomerate(MODEL, 5 * turns, weights, nobody, 1e6).tolist() == list(range(6))
    assert not agglomerate(MODEL, 5 * turns, weights, nobody, -1e6).any()


def test_who_is_apart_stays_so_through_others():
    """0 and 2 are never one; 1 is like both and joins one of them."""
    turns, weights = np.tile(np.eye(3)[0], (3, 1)), np.array([5.0, 5.0, 4.0])
    apart = np.zeros((3, 3), np.bool_)
    apart[0, 2] = apart[2, 0] = True
    assert agglomerate(MODEL, weights[:, None] * turns, weights, apart, 0.0).tolist() == [0, 0, 2]


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(0, 10_000), st.floats(-3, 3))
def test_joining_makes_it_worth_more_and_nothing_is_left_to_join(count, seed, threshold):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((count, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    weights = rng.uniform(0.1, 8, count)
    totals = weights[:, None] * vectors
    apart = np.triu(rng.random((count, count)) < 0.1, 1)
    apart |= apart.T
    found = agglomerate(MODEL, totals, weights, apart, threshold)
    worth = value(MODEL, totals, weights, found, threshold)
    assert worth >= value(MODEL, totals, weights, np.arange(count), threshold) - 1e-9
    for one in range(count):
        for other in range(one):
            if found[one] == found[other]:
                assert not apart[one, other]
                continue
            both = (found == found[one]) | (found == found[other])
            joined = np.where(both, found[one], found)
            if not apart[np.ix_(found == found[one], found == found[other])].any():
                assert value(MODEL, totals, weights, joined, threshold) < worth + 1e-9
