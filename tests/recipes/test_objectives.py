from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

from recipes.gabor import PHASES, gabor_filters, mel_centres
from recipes.objectives import (
    VoiceTargets,
    ctc_loss,
    encode,
    hint_loss,
    pit_loss,
    presence_loss,
    softened,
)
from recipes.student import VOCABULARY
from recipes.teachers import equal_error_rate, filterbank, mel_filters


def test_pit_is_the_best_of_all_assignments():
    torch.manual_seed(0)
    logits, target = torch.randn(4, 30, 3), torch.rand(4, 30, 3) > 0.6
    best = [
        min(
            F.binary_cross_entropy_with_logits(logits[b][:, list(order)], target[b].float())
            for order in permutations(range(3))
        )
        for b in range(4)
    ]
    assert pit_loss(logits, target) == pytest.approx(float(torch.stack(best).mean()), rel=1e-5)


def test_pit_does_not_mind_the_order_of_speakers():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 20, 3), torch.rand(2, 20, 3) > 0.5
    assert pit_loss(logits, target) == pytest.approx(
        float(pit_loss(logits, target[..., [2, 0, 1]]))
    )


def test_hint_is_the_cross_entropy_of_the_given_assignment():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 20, 3), torch.rand(2, 20, 3) > 0.6
    order = torch.tensor([[2, 0, 1], [0, 1, 2]])
    assigned = torch.stack([target[0][:, [2, 0, 1]], target[1]]).float()
    expected = F.binary_cross_entropy_with_logits(logits, assigned)
    assert hint_loss(logits, target, order) == pytest.approx(float(expected), rel=1e-5)


def test_presence_is_the_cross_entropy_of_anybody_speaking():
    torch.manual_seed(2)
    logits, target = torch.randn(2, 20, 3), torch.rand(2, 20, 3) > 0.7
    anybody = 1 - (1 - logits.sigmoid()).prod(-1)
    expected = F.binary_cross_entropy(anybody, target.any(-1).float())
    assert presence_loss(logits, target) == pytest.approx(float(expected), rel=1e-4)


def test_a_teacher_is_heard_in_the_order_that_fits():
    torch.manual_seed(3)
    exact = (torch.rand(4, 50, 3) > 0.6).float()
    orders = torch.tensor([[0, 1, 2], [2, 0, 1], [1, 0, 2], [2, 1, 0]])
    taught = torch.stack([0.9 * each[:, order] for each, order in zip(exact, orders, strict=True)])
    torch.testing.assert_close(softened(exact, taught, 0.5), 0.95 * exact)
    torch.testing.assert_close(softened(exact, taught, 0.0), exact)


def test_presence_of_soft_activity_is_between_that_of_both():
    logits = torch.randn(1, 20, 3)
    some, none = torch.zeros(1, 20, 3), torch.zeros(1, 20, 3)
    some[..., 1] = 1
    between = (presence_loss(logits, some) + presence_loss(logits, none)) / 2
    torch.testing.assert_close(presence_loss(logits, some / 2), between)


def test_presence_is_finite_where_it_is_sure():
    logits = torch.full((1, 4, 3), 60.0, requires_grad=True)
    loss = presence_loss(logits, torch.zeros(1, 4, 3, dtype=torch.bool)) + presence_loss(
        -logits, torch.ones(1, 4, 3, dtype=torch.bool)
    )
    loss.backward()
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


@pytest.fixture
def targets():
    torch.manual_seed(0)
    rows = torch.randn(2000, 512) * torch.linspace(0.0, 4.0, 512)
    embeddings = torch.randn(6, 192) + 5
    return VoiceTargets(rows, embeddings, ["a", "a", "b", "b", "c", ""])


def test_channels_are_measured_in_their_deviation_with_a_floor(targets):
    assert targets.scale[400] == pytest.approx(4 * 400 / 511, rel=0.1)
    assert targets.scale[0] == targets.scale.min() == pytest.approx(0.25 * 2.0, rel=0.1)


def test_dense_loss_counts_only_the_frames_asked_for(targets):
    target = torch.randn(1, 3, 512)
    voice = target / targets.scale
    voice[:, 2] += 100
    where = torch.tensor([[True, True, False]])
    assert targets.dense_loss(voice, target, where) == pytest.approx(0, abs=1e-9)
    assert targets.dense_loss(voice + 1, target, where) == pytest.approx(1, rel=1e-4)


def test_teacher_embeddings_are_centred_by_speaker(targets):
    centroids = (targets.embeddings[:2].mean(0), targets.embeddings[2:4].mean(0))
    assert float(centroids[0] @ centroids[1]) < 0.5  # before centring every pair is near 1
    assert torch.allclose(targets.bank.norm(dim=1), torch.ones(3), atol=1e-5)


def test_the_right_embedding_costs_nothing_and_strangers_are_no_negatives(targets):
    right = targets.embeddings[torch.tensor([0, 5])]
    cosine, nce = targets.embedding_losses(
        3 * right, torch.tensor([0, 5]), torch.tensor([targets.names["a"], -1])
    )
    assert cosine == pytest.approx(0, abs=1e-5)
    assert nce < 0.1
    _, none = targets.embedding_losses(right[1:], torch.tensor([5]), torch.tensor([-1]))
    assert none == 0


def test_voices_at_other_speeds_move_neither_centre_nor_axis():
    torch.manual_seed(7)
    embeddings, rows = torch.randn(6, 192), torch.rand(100, 512)
    names = ["a", "a", "b", "b", "c", ""]
    alone = VoiceTargets(rows, embeddings, names)
    more = torch.cat([embeddings, 5 + 3 * torch.randn(4, 192)])
    recorded = [True] * 6 + [False] * 4
    both = VoiceTargets(
        rows, more, [*names, "a × 0.9", "b × 0.9", "a × 1.1", ""], recorded=recorded
    )
    torch.testing.assert_close(both.centre, alone.centre)
    torch.testing.assert_close(both.axis, alone.axis)
    assert len(both.bank) == len(alone.bank) + 3
    mixed = VoiceTargets(rows, more, [*names, "a × 0.9", "b × 0.9", "a × 1.1", ""])
    assert (mixed.centre - alone.centre).norm() > 1


def test_speakers_are_ordered_along_the_main_axis(targets):
    place = targets.embeddings @ targets.axis
    low, middle, high = place[:3].argsort().tolist()
    scene = torch.tensor([[middle, high, low], [high, low, -1], [low, -1, -1], [high, -1, -1]])
    order = targets.order(scene)
    assert order[0].tolist() == [2, 1, 0]
    assert order[1].tolist() == [1, 0, 2]
    # alone, a speaker goes to output 0 below zero and to output 1 above
    for row, which in ((2, low), (3, high)):
        assert order[row, int(place[which] > 0)] == 0
    assert (order.sort(1).values == torch.arange(3)).all()


def test_text_becomes_characters_with_delimiters():
    assert [VOCABULARY[i] for i in encode("it's a-1 b")] == list("IT'S|A|B")
    assert len(VOCABULARY) == len(set(VOCABULARY)) == 32


def test_ctc_leaves_out_rows_without_text():
    torch.manual_seed(0)
    logits = torch.randn(3, 40, 32)
    assert ctc_loss(logits, ["HELLO", "", "YOU"]) == pytest.approx(
        float(ctc_loss(logits[[0, 2]], ["HELLO", "YOU"]))
    )
    assert ctc_loss(logits, ["", "", ""]) == 0


def test_gabor_filters_peak_at_mel_spaced_centres():
    filters = gabor_filters()
    assert filters.shape == (320, 1, 400)
    response = torch.fft.rfft(filters[::PHASES, 0], 16_000).abs()  # one bin a hertz
    centres = mel_centres(80, 60.0, 7_600.0)
    assert (response.argmax(1) - centres).abs().max() < 40
    assert (response.max(1).values.diff() > 0).all()


def test_gabor_phases_are_quarter_turns():
    four = gabor_filters()[160:164, 0]
    assert torch.allclose(four[0], -four[2], atol=1e-5)
    assert torch.allclose(four[1], -four[3], atol=1e-5)
    assert abs(float(F.cosine_similarity(four[0], four[1], dim=0))) < 0.05


def test_gabor_refuses_a_channel_without_its_phases():
    with pytest.raises(ValueError, match="multiple of 4, got 321"):
        gabor_filters(321)


def test_filterbank_finds_a_tone():
    time = torch.arange(16_000) / 16_000
    filters = mel_filters()
    wave = torch.sin(2 * torch.pi * 1_000 * time)
    wave[8_000:] = 0.001 * torch.randn(8_000, generator=torch.Generator().manual_seed(0))
    energies = filterbank(wave, filters)
    assert energies.shape == (98, 80)
    assert energies.mean(0).abs().max() < 1e-4
    loudest = int((energies[:45].mean(0) - energies[55:].mean(0)).argmax())
    low, high = 16_000 / 512 * filters[:, loudest].nonzero()[[0, -1], 0]
    assert low <= 1_000 <= high


@pytest.mark.parametrize(("scores", "rate"), [([4, 3, 2, 1], 0.0), ([4, 2, 3, 1], 0.5)])
def test_equal_error_rate(scores, rate):
    same = torch.tensor([True, True, False, False])
    assert equal_error_rate(torch.tensor(scores, dtype=torch.float), same) == pytest.approx(rate)
