import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.unispeech_sat.modeling_unispeech_sat import _compute_mask_indices

from model.masking import compute_mask_indices


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@given(
    rows=st.lists(st.integers(1, 60), min_size=1, max_size=4),
    length=st.integers(1, 12),
    prob=st.floats(0, 1),
    least=st.integers(0, 3),
    seed=st.integers(0, 2**31),
)
def test_masks_whole_spans_inside_every_row(rows, length, prob, least, seed):
    T = max(*rows, length)
    present = torch.arange(T) < torch.tensor(rows)[:, None]
    mask = compute_mask_indices((len(rows), T), prob, length, present, least, seeded(seed))
    assert mask.dtype == torch.bool
    assert not (mask & ~present).any()
    for row, n in zip(mask.int(), rows, strict=True):
        padded = torch.nn.functional.pad(row, (1, 1)).diff()
        runs = (padded == -1).nonzero() - (padded == 1).nonzero()
        assert (runs >= length).all()
        if n >= length:
            assert row.sum() >= (length if least and length * least <= T else 0)
            assert len(runs) <= max(prob * n / length + 1, least)


def test_the_same_seed_draws_the_same_mask():
    draw = [compute_mask_indices((3, 80), 0.5, 5, generator=seeded(s)) for s in (7, 7, 8)]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])


def test_masks_as_much_as_the_published_function():
    present = torch.arange(120) < torch.tensor([120, 90, 40, 12])[:, None]
    ours, theirs = torch.zeros(4), torch.zeros(4)
    for seed in range(200):
        ours += compute_mask_indices((4, 120), 0.65, 10, present, 2, seeded(seed)).sum(1)
        theirs += torch.from_numpy(_compute_mask_indices((4, 120), 0.65, 10, present, 2)).sum(1)
    assert ours / 200 == pytest.approx(theirs / 200, rel=0.08)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"mask_length": 11}, "mask_length between 1 and 10"),
        ({"mask_length": 0}, "mask_length between 1 and 10"),
        ({"mask_length": 2, "mask_prob": 1.5}, "mask_prob between 0 and 1"),
        ({"mask_length": 2, "attention_mask": torch.ones(1, 9)}, r"attention_mask \[1, 10\]"),
    ],
)
def test_refuses_what_cannot_be_masked(kwargs, message):
    with pytest.raises(ValueError, match=message):
        compute_mask_indices((1, 10), **{"mask_prob": 0.5, **kwargs})
