import numpy as np
import pytest
import torch

from recipes.ablate import frame_error
from recipes.clusters import CEPSTRA, cepstra, cluster, k_means
from recipes.loop import World, resume, save
from recipes.pretrain import Pretrain, Pretraining
from recipes.student import Shape
from recipes.teachers import mel_filters

TINY = Shape(
    layers=2, width=32, heads=2, feed_forward=64, positions=8, position_groups=4, conv_dim=(16, 32),
    conv_kernel=(320, 3),
)  # fmt: skip


@pytest.fixture(scope="module")
def settings(data, tmp_path_factory):
    return Pretrain(
        data=data,
        run=tmp_path_factory.mktemp("run"),
        steps=40,
        decay_steps=10,
        warm_up_steps=5,
        rate=4e-3,
        clusters=8,
        hops=60,
        batch_hops=360,
        sources={"tones": 1.0},
        bfloat16=False,
        device="cpu",
        shape=TINY,
    )


def test_every_part_of_the_objective_falls(settings):
    run = Pretraining(settings, World())
    steps = [run.advance() for _ in range(40)]
    for name in ("loss", "prediction", "contrastive"):
        first, last = (sum(step[name] for step in part) for part in (steps[:8], steps[-8:]))
        assert last < first, (name, first, last)


def test_a_run_that_was_cut_makes_the_same_steps(settings, tmp_path):
    run = Pretraining(settings, World())
    for _ in range(2):
        run.advance()
    save(run, tmp_path)
    expected = [run.advance() for _ in range(2)]
    again = Pretraining(settings, World())
    assert resume(again, tmp_path)
    assert [again.advance() for _ in range(2)] == expected


def test_another_rank_draws_other_data(settings):
    one, other = (Pretraining(settings, World(rank, 2)).batch() for rank in (0, 1))
    assert not torch.equal(one[0], other[0])


def test_without_contrast_only_prediction_counts(settings):
    run = Pretraining(settings.model_copy(update={"contrastive": False, "mixing": 0.0}), World())
    step = run.advance()
    assert step["loss"] == step["prediction"]


def test_clusters_are_those_of_the_voices(corpus, data):
    labels = cluster(corpus, data, 8, seed=1)
    assert len(labels) == len(corpus.audio)
    assert labels.min() >= 0
    assert labels.max() < 8
    assert np.array_equal(labels, cluster(corpus, data, 8, seed=1))


def test_k_means_finds_clouds():
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]])
    torch.manual_seed(0)
    points = torch.cat([centre + 0.1 * torch.randn(50, 2) for centre in centres])
    found = k_means(points, 3, 10, seed=0)
    assert torch.cdist(centres, found).min(1).values.max() < 0.1


def test_cepstra_tell_a_low_tone_from_a_high_one():
    time = torch.arange(16_000) / 16_000
    low, high = (torch.sin(2 * torch.pi * f * time) for f in (300.0, 3000.0))
    rows = [cepstra(wave, mel_filters(), 50) for wave in (low, high, torch.zeros(100))]
    assert all(row.shape == (50, 3 * CEPSTRA) for row in rows)
    assert (rows[2] == 0).all()  # too short to have any


def test_frame_error_takes_the_best_assignment():
    target = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]], dtype=torch.bool)
    swapped = torch.where(target[:, [1, 0, 2]], 1.0, -1.0)
    assert frame_error(swapped, target) == (0.0, 4.0)
    silent = -torch.ones(4, 3)
    assert frame_error(silent, target) == (4.0, 4.0)
