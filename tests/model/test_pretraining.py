import math

import pytest
import torch
import transformers
from torch import Tensor

from model.pretraining import (
    UniSpeechSatForPreTraining,
    UniSpeechSatGumbelVectorQuantizer,
    codebook_perplexity,
    cosine_logits,
    diversity_loss,
    mix_utterances,
    overlaid,
    prediction_loss,
    utterance_contrastive_loss,
)
from tests.model.tiny import config, wave

KEYS = {
    **{"num_clusters": 7, "num_codevectors_per_group": 6, "num_codevector_groups": 2},
    **{"mask_time_prob": 0.5, "mask_time_length": 4, "num_negatives": 10},
}
SAMPLES = 1000


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pretrainer(kind: str = "base", **keys) -> UniSpeechSatForPreTraining:
    torch.manual_seed(3)
    return UniSpeechSatForPreTraining(config(kind, **{**KEYS, **keys})).eval()


def clusters(model: UniSpeechSatForPreTraining, rows: int) -> Tensor:
    frames = model.config.frames(SAMPLES)
    return torch.randint(0, model.config.num_clusters, (rows, frames), generator=seeded())


# -- the published class


@pytest.mark.parametrize("kind", ["base", "large"])
@pytest.mark.parametrize("padded", [False, True])
def test_without_labels_it_is_the_published_class(kind, padded):
    ours = pretrainer(kind)
    values = {k: v for k, v in ours.config.to_dict().items() if k != "model_type"}
    theirs = transformers.UniSpeechSatForPreTraining(
        transformers.UniSpeechSatConfig(**values)
    ).eval()
    theirs.load_state_dict(ours.state_dict())
    batch = {"input_values": wave(2, SAMPLES)}
    if padded:
        batch["attention_mask"] = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [640]])).long()
    with torch.inference_mode():
        mine = ours(**batch, output_hidden_states=True)
        wanted = theirs(**batch, output_hidden_states=True)
    assert set(mine.keys()) == set(wanted.keys())
    torch.testing.assert_close(mine.logits, wanted.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.projected_states, wanted.projected_states, atol=1e-4, rtol=0)
    assert mine.loss is None
    assert mine.prediction_loss is None
    plain = ours(**batch, return_dict=False)
    torch.testing.assert_close(plain[0], mine.logits)


@pytest.mark.parametrize("training", [False, True])
def test_quantises_as_the_published_class(training):
    settings = config(**KEYS)
    ours = UniSpeechSatGumbelVectorQuantizer(settings).train(training)
    values = {k: v for k, v in settings.to_dict().items() if k != "model_type"}
    module = transformers.models.unispeech_sat.modeling_unispeech_sat
    theirs = module.UniSpeechSatGumbelVectorQuantizer(transformers.UniSpeechSatConfig(**values))
    theirs.train(training).load_state_dict(ours.state_dict())
    x = torch.randn(2, 5, settings.hidden_size, generator=seeded())
    torch.manual_seed(0)
    codes, perplexity = ours(x)
    torch.manual_seed(0)
    wanted, wanted_perplexity = theirs(x)
    torch.testing.assert_close(codes, wanted)
    torch.testing.assert_close(perplexity, wanted_perplexity)


def test_scores_candidates_as_the_published_class():
    target, predicted = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4)
    negatives = torch.randn(5, 2, 3, 4)
    call = (target, negatives, predicted, 0.1)
    torch.testing.assert_close(
        UniSpeechSatForPreTraining.compute_contrastive_logits(*call),
        transformers.UniSpeechSatForPreTraining.compute_contrastive_logits(*call),
    )


# -- the objective, by hand


def test_logits_are_cosines_over_the_temperature():
    x = torch.tensor([[3.0, 4.0]])
    embeddings = torch.tensor([[1.0, 0.0], [0.0, -2.0]])
    assert cosine_logits(x, embeddings, 0.1)[0].tolist() == pytest.approx([6.0, -8.0])


def test_prediction_counts_masked_labelled_frames_only():
    logits = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [9.0, 9.0], [5.0, 0.0]]])
    labels = torch.tensor([[0, 0, -100, 1]])
    mask = torch.tensor([[True, True, True, False]])
    by_hand = (math.log(1 + math.exp(-1)) + math.log(1 + math.exp(2))) / 2
    assert float(prediction_loss(logits, labels, mask)) == pytest.approx(by_hand)
    assert float(prediction_loss(logits, labels, mask & False)) == 0


def test_contrast_of_two_utterances_by_hand():
    # utterance 0 has two frames along x, utterance 1 one along y: cosines are 1 and 0
    states = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 5.0], [0.0, 3.0]])
    utterance = torch.tensor([0, 0, 1])
    kappa = 0.5
    # frames 0 and 1: positives score 1/κ and 0, the negative (third target) scores 0
    first = (math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(0 - 0))) / 2
    # frame 2: positive scores 1/κ, negatives 0 and 1/κ
    last = math.log(1 + (math.exp(0) + math.exp(2)) / math.exp(2))
    loss = utterance_contrastive_loss(states, targets, utterance, kappa)
    assert float(loss) == pytest.approx((first + first + last) / 3)


def test_contrast_draws_its_negatives_from_other_utterances():
    x = torch.randn(40, 8, generator=seeded())
    utterance = torch.arange(40) // 10
    every = utterance_contrastive_loss(x, x, utterance, 0.1)
    enough = utterance_contrastive_loss(x, x, utterance, 0.1, 30, seeded())
    few = [float(utterance_contrastive_loss(x, x, utterance, 0.1, 3, seeded(s))) for s in (1, 1, 2)]
    assert float(enough) == pytest.approx(float(every))
    assert few[0] == few[1] != few[2]
    assert few[0] < float(every)


def test_one_utterance_has_nothing_to_contrast():
    x = torch.randn(4, 8, requires_grad=True)
    loss = utterance_contrastive_loss(x, x, torch.zeros(4), 0.1, 3)
    loss.backward()
    assert loss.item() == 0
    assert x.grad is not None
    assert not x.grad.any()


def test_perplexity_and_diversity_by_hand():
    even = torch.full((3, 2, 4), 0.25)
    assert float(codebook_perplexity(even)) == pytest.approx(8)
    assert float(diversity_loss(codebook_perplexity(even), 8)) == pytest.approx(0)
    one = torch.zeros(3, 2, 4)
    one[:, :, 0] = 1
    assert float(codebook_perplexity(one)) == pytest.approx(2)
    assert float(diversity_loss(codebook_perplexity(one), 8)) == pytest.approx(0.75)
    halves = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])  # each frame is sure, the mean is even
    assert float(codebook_perplexity(halves)) == pytest.approx(2)


@pytest.mark.parametrize("kind", ["base", "large"])
def test_the_loss_is_the_weighted_sum_of_its_parts(kind):
    keys = {"content_loss_weight": 0.5, "utterance_contrastive_layer": 2}
    model = pretrainer(kind, **keys, output_hidden_states=True)
    labels = clusters(model, 3)
    with torch.inference_mode():
        out = model(wave(3, SAMPLES), labels=labels, generator=seeded(5))
        again = model(wave(3, SAMPLES), labels=labels, generator=seeded(5))
    assert torch.equal(out.loss, again.loss)
    torch.testing.assert_close(
        out.loss,
        0.5 * out.prediction_loss + out.contrastive_loss + 0.1 * out.diversity_loss,
    )
    mask = out.mask_time_indices
    torch.testing.assert_close(out.prediction_loss, prediction_loss(out.logits, labels, mask))
    speaker = out.hidden_states[2][mask]
    if kind == "large":
        speaker = model.layer_norm_for_extract(speaker)
    codes, perplexity = model.quantizer(speaker[None])
    torch.testing.assert_close(out.codevector_perplexity, perplexity)
    torch.testing.assert_close(out.projected_quantized_states[mask], model.project_q(codes[0]))
    assert not out.projected_quantized_states[~mask].any()
    everything = utterance_contrastive_loss(
        model.speaker_proj(speaker), model.project_q(codes[0]), mask.nonzero()[:, 0], 0.1
    )
    assert 0 < out.contrastive_loss.item() <= everything.item()


def test_padding_is_neither_masked_nor_counted():
    model = pretrainer()
    real = model.config.frames(640)
    labels = clusters(model, 2)
    padding = (torch.arange(SAMPLES) < torch.tensor([[SAMPLES], [640]])).long()
    with torch.inference_mode():
        out = model(wave(2, SAMPLES), padding, labels=labels, generator=seeded())
        labels[1, real:] = 0
        again = model(wave(2, SAMPLES), padding, labels=labels, generator=seeded())
    assert not out.mask_time_indices[1, real:].any()
    assert torch.equal(out.loss, again.loss)


def test_a_given_mask_is_used():
    model = pretrainer()
    mask = torch.zeros(2, model.config.frames(SAMPLES), dtype=torch.bool)
    mask[:, 5:9] = True
    out = model(wave(2, SAMPLES), mask_time_indices=mask, labels=clusters(model, 2))
    assert torch.equal(out.mask_time_indices, mask)
    empty = model(wave(2, SAMPLES), mask_time_indices=mask & False, labels=clusters(model, 2))
    assert (empty.prediction_loss + empty.contrastive_loss).item() == 0
    assert torch.isfinite(empty.loss)


@pytest.mark.parametrize(
    ("keys", "labels", "message"),
    [
        ({}, torch.zeros(2, 3, dtype=torch.long), r"labels: expected \[2, 49\], got \[2, 3\]"),
        ({}, torch.full((2, 49), 7), "clusters below 7, got 7"),
        ({"apply_spec_augment": False}, torch.zeros(2, 49), "apply_spec_augment: expected true"),
        ({"proj_codevector_dim": 8}, torch.zeros(2, 49), "to be equal, got 16 and 8"),
        (
            {"utterance_contrastive_layer": 4},
            torch.zeros(2, 49, dtype=torch.long),
            "expected 1 to 3, got 4",
        ),
    ],
)
def test_refuses_what_it_cannot_learn_from(keys, labels, message):
    with pytest.raises(ValueError, match=message):
        pretrainer(**keys)(wave(2, SAMPLES), labels=labels)


@pytest.mark.parametrize("kind", ["base", "large"])
def test_a_few_steps_of_training_lower_the_loss(kind):
    model = pretrainer(kind).train()
    audio, labels = wave(4, SAMPLES), clusters(pretrainer(kind), 4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    torch.manual_seed(0)
    losses: list[float] = []
    for step in range(25):
        out = model(audio, labels=labels, generator=seeded(step % 3))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        losses.append(out.loss.item())
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    idle = [name for name, p in model.named_parameters() if p.grad is None]
    assert all("layer_norm_for_extract" in name for name in idle)
    assert kind == "base" or not idle


# -- utterance mixing


def test_overlays_at_an_energy_ratio_by_hand():
    primary, other = torch.full((6,), 2.0), torch.tensor([1.0, -1.0, 1.0, -1.0])
    mixed = overlaid(primary, other, at=3, start=1, length=2, ratio_db=0.0)
    assert mixed.tolist() == pytest.approx([2, 2, 2, 0, 4, 2])
    louder = overlaid(primary, other, at=0, start=0, length=1, ratio_db=-20 * math.log10(3))
    assert float(louder[0]) == pytest.approx(2 + 2 * 3)
    silent = overlaid(primary, torch.zeros(4), at=0, start=0, length=4, ratio_db=0.0)
    assert torch.equal(silent, primary)


def test_mixes_at_most_half_of_an_utterance_with_a_piece_of_another():
    audio = wave(6, 400)
    lengths = torch.tensor([400, 400, 300, 400, 200, 400])
    audio[2, 300:] = audio[4, 200:] = 0
    before = audio.clone()
    touched = 0
    for seed in range(20):
        mixed = mix_utterances(audio, lengths, prob=0.5, generator=seeded(seed))
        for row, (was, now, n) in enumerate(zip(audio, mixed, lengths, strict=True)):
            changed = (was != now).nonzero().flatten()
            if not len(changed):
                continue
            touched += 1
            at, length = int(changed[0]), int(changed[-1] - changed[0]) + 1
            assert at + length <= n
            assert length <= n // 2
            added = (now - was)[at : at + length]
            pieces = [w.unfold(0, length, 1) for i, w in enumerate(audio) if i != row]
            best = max(float(torch.cosine_similarity(p, added, dim=1).max()) for p in pieces)
            assert best == pytest.approx(1, abs=1e-4)
    assert torch.equal(audio, before)
    assert 35 < touched < 85  # half of 120


def test_mixing_is_seeded_and_can_be_off():
    audio = wave(4, 100)
    draws = [mix_utterances(audio, prob=1, generator=seeded(s)) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(mix_utterances(audio, prob=0), audio)
    assert torch.equal(mix_utterances(audio[:1], prob=1), audio[:1])
    normed = mix_utterances(audio, prob=1, normalize=True, generator=seeded())
    assert normed.mean(dim=1).tolist() == pytest.approx([0] * 4, abs=1e-5)
    assert normed.std(dim=1, correction=0).tolist() == pytest.approx([1] * 4, abs=1e-3)
    with pytest.raises(ValueError, match="prob: expected 0 to 1"):
        mix_utterances(audio, prob=2)
    with pytest.raises(ValueError, match=r"expected \[B, N\], got \[100\]"):
        mix_utterances(audio[0])


def test_an_entry_nobody_uses_has_a_finite_gradient():
    logits = torch.tensor([[[200.0, -200.0, -200.0]]], requires_grad=True)
    perplexity = codebook_perplexity(logits.softmax(-1))
    assert perplexity.item() == pytest.approx(1, abs=1e-4)
    diversity_loss(perplexity, 3).backward()
    assert torch.isfinite(logits.grad).all()
