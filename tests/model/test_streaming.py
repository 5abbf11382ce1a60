"""The contracts of the cached-state encoder: what a stream gives is what the whole wave gives."""

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.encoder import UniSpeechSatModel
from model.features import normalize_running
from model.heads import (
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForSequenceClassification,
    UniSpeechSatForXVector,
    VoiceMoments,
)
from model.state import Window, ring_positions
from model.streaming import StreamingModel
from tests.model.tiny import HOP, KINDS, config, emitted, encoder, stream, wave

EXACT = 1e-5

windows = st.builds(
    Window,
    chunk=st.integers(1, 12),
    left=st.integers(0, 30),
    right=st.integers(0, 9),
    warm_up=st.integers(1, 60),
)
kinds = st.sampled_from(sorted(KINDS))
quick = settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # to shrink a failure takes minutes
)
MODELS: dict[str, UniSpeechSatModel] = {}


def model_of(kind: str) -> UniSpeechSatModel:
    if kind not in MODELS:
        MODELS[kind] = encoder(kind)
    return MODELS[kind]


def forward(model: UniSpeechSatModel, audio: Tensor, window: Window) -> Tensor:
    with torch.inference_mode():
        return model(audio, streaming=window).last_hidden_state


@quick
@given(kind=kinds, window=windows, samples=st.integers(70, 1500), seed=st.integers(0, 9))
def test_streaming_equals_the_masked_forward(
    kind: str, window: Window, samples: int, seed: int
) -> None:
    model, audio = model_of(kind), wave(1, samples, seed) + 0.5
    steps = stream(model, audio, window)
    expected = forward(model, audio, window)[0]
    got = emitted(steps)
    assert got.shape == expected.shape  # every frame of the wave, the last ones included
    torch.testing.assert_close(got, expected, atol=EXACT, rtol=0)


@quick
@given(kind=st.sampled_from(["large", "gabor"]), samples=st.integers(70, 1500))
def test_one_chunk_of_a_whole_utterance_equals_the_published_forward(
    kind: str, samples: int
) -> None:
    """With layer norm nothing is approximated: the stream's mask is the only difference."""
    model, audio = model_of(kind), wave(1, samples)
    window = Window(chunk=samples // HOP + 2, left=0)
    with torch.inference_mode():
        whole = model(audio).last_hidden_state[0]
    torch.testing.assert_close(emitted(stream(model, audio, window)), whole, atol=EXACT, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_stream_as_each_alone(kind: str) -> None:
    """The masked forward of a padded batch has each row's own end."""
    model, window = model_of(kind), Window(4, 11, 3, warm_up=1000)
    audio, mask = wave(2, 1200), torch.ones(2, 1200)
    audio[1, 700:] = 0
    mask[1, 700:] = 0
    with torch.inference_mode():
        batch = model(audio, attention_mask=mask, streaming=window).last_hidden_state
    alone = forward(model, audio[1:, :700], window)[0]
    if kind == "base":
        # running GroupNorm statistics of a padded row see its padding, as the published norm does
        alone, batch = alone[:20], batch[:, :20]
    torch.testing.assert_close(batch[1, : len(alone)], alone, atol=EXACT, rtol=0)


@quick
@given(kind=kinds, window=windows, data=st.data())
def test_a_slot_is_the_same_alone_or_beside_any_neighbours(
    kind: str, window: Window, data: st.DataObject
) -> None:
    model = model_of(kind)
    slots = data.draw(st.permutations(range(5)))[:3]
    poison = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e38]))
    audio = wave(3, window.chunk * HOP * 6)
    alone = emitted(stream(model, audio[1:2], window))
    audio[0, data.draw(st.integers(0, audio.shape[1] - 1)) :] = poison
    state = model.zeros(5, window)
    beside = stream(model, audio, window, state, torch.tensor(slots))
    torch.testing.assert_close(emitted(beside, row=1), alone, atol=EXACT, rtol=0)
    assert all(step.last_hidden_state[1:].isfinite().all() for step in beside)
    others = [slot for slot in range(5) if slot not in slots]
    assert all((tensor[others] == 0).all() for _, tensor in state.tensors())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_non_finite_chunk_is_reported_and_begins_that_slot_anew(kind: str, poison: float) -> None:
    model, window = model_of(kind), Window(4, 12, 2)
    size = window.chunk * HOP
    audio = wave(2, size * 8)
    audio[0, size * 3 + 5] = poison
    state = model.zeros(2, window)
    steps = [model.step(part, state) for part in audio.split(size, dim=1)]
    assert [step.reset.tolist() for step in steps] == [[n == 3, False] for n in range(8)]
    assert all(step.last_hidden_state.isfinite().all() for step in steps)
    fresh = audio[:1, size * 3 :].clone()
    fresh[:, :size] = 0
    state = model.zeros(1, window)
    again = [model.step(part, state) for part in fresh.split(size, dim=1)]
    for expected, got in zip(again, steps[3:], strict=True):
        assert got.start[0] == expected.start[0]
        torch.testing.assert_close(
            got.last_hidden_state[0], expected.last_hidden_state[0], atol=EXACT, rtol=0
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_slot_goes_on_bit_for_bit_in_another_state(kind: str) -> None:
    model, window = model_of(kind), Window(5, 13, 4)
    size = window.chunk * HOP
    parts = wave(1, size * 12).split(size, dim=1)
    state = model.zeros(1, window, normalize=True)
    whole = [model.step(part, state) for part in parts]
    state = model.zeros(4, window, normalize=True)
    slot = torch.tensor([2])
    for part in parts[:7]:
        model.step(part, state, slot)
    elsewhere = model.zeros(3, window, normalize=True)
    elsewhere.load(1, state.save(2))
    for part, expected in zip(parts[7:], whole[7:], strict=True):
        got = model.step(part, elsewhere, torch.tensor([1]))
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(got.start, expected.start)


def test_a_slot_of_another_model_or_no_slot_at_all_is_refused() -> None:
    model = model_of("large")
    state = model.zeros(2, Window(4, 8, 2))
    other = model.zeros(2, Window(4, 9, 2))
    with pytest.raises(ValueError, match=r"keys\.0: expected \(14, 4, 8\).*got \(15, 4, 8\)"):
        state.load(0, other.save(0))
    with pytest.raises(ValueError, match="expected the bytes of a saved slot"):
        state.load(0, b"nothing of the kind")
    with pytest.raises(ValueError, match="expected a slot in 0…1, got 2"):
        state.load(2, state.save(0))


def test_reset_makes_a_slot_new_and_leaves_the_others() -> None:
    model, window = model_of("base"), Window(4, 8, 2)
    audio = wave(2, window.chunk * HOP)
    state = model.zeros(2, window)
    first = model.step(audio, state)
    state.reset(torch.tensor([0]))
    second = model.step(audio, state)
    assert torch.equal(first.last_hidden_state[0], second.last_hidden_state[0])
    assert second.start.tolist() == [first.start[0], first.start[0] + window.chunk]


def test_addresses_of_the_state_never_change() -> None:
    model, window = model_of("base"), Window(3, 7, 2)
    state = model.zeros(2, window, normalize=True)
    before = {name: tensor.data_ptr() for name, tensor in state.tensors()}
    stream(model, wave(2, 700), window, state)
    state.reset(torch.tensor([0, 1]))
    assert {name: tensor.data_ptr() for name, tensor in state.tensors()} == before


def test_a_step_for_an_unknown_or_repeated_slot_is_an_error() -> None:
    model, window = model_of("base"), Window(4, 8, 2)
    state = model.zeros(2, window)
    chunk = torch.zeros(1, 80)
    with pytest.raises(ValueError, match="slots: expected 0…1, got 2"):
        model.step(chunk, state, torch.tensor([2]))
    with pytest.raises(ValueError, match=r"slots: expected each once, got \[1, 1\]"):
        model.step(chunk.repeat(2, 1), state, torch.tensor([1, 1]))
    with pytest.raises(ValueError, match="expected 2 rows, one a slot, got 1"):
        model.step(chunk, state)
    with pytest.raises(ValueError, match=r"chunk: expected \[B, 80\], got \(1, 79\)"):
        model.step(chunk[:, :79], state, torch.tensor([0]))
    with pytest.raises(ValueError, match="chunk: expected at least 1 frame"):
        Window(0, 8)


@quick
@given(window=windows, samples=st.integers(70, 900))
def test_running_normalisation_of_a_stream_equals_that_of_the_wave(
    window: Window, samples: int
) -> None:
    model, audio = model_of("large"), wave(1, samples) * 0.01 + 0.3
    expected = forward(model, normalize_running(audio, window, HOP), window)[0]
    state = model.zeros(1, window, normalize=True)
    got = emitted(stream(model, audio, window, state))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_running_normalisation_settles_on_the_level_of_the_whole() -> None:
    """The approximation's error: 1/√20,000 of the deviation for the mean, as much for the scale."""
    audio = wave(1, HOP * 4000) * 0.02 + 0.1
    window = Window(10, 50, warm_up=1000)
    running = normalize_running(audio, window, HOP)[:, HOP * 1000 :]
    whole = (audio - audio.mean()) / audio.std()
    assert (running - whole[:, HOP * 1000 :]).square().mean().sqrt() < 0.02


def test_ring_positions_name_the_last_frame_written_to_each_entry() -> None:
    ends = torch.tensor([-3, 0, 2, 5, 11])
    assert ring_positions(ends, 4).tolist() == [
        [-4, -7, -6, -5],
        [-4, -3, -2, -1],
        [0, 1, -2, -1],
        [4, 1, 2, 3],
        [8, 9, 10, 7],
    ]
    assert ring_positions(ends, 0).shape == (5, 0)


HEADS: list[Any] = [
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForXVector,
    UniSpeechSatForCTC,
    UniSpeechSatForSequenceClassification,
]


def family(kind: str = "large", **keys: Any) -> list[Any]:
    """One model of each kind of head, all with the same encoder weights."""
    torch.manual_seed(3)
    models = [head(config(kind, **keys)).eval() for head in HEADS]
    for model in models[1:]:
        model.unispeech_sat.load_state_dict(models[0].unispeech_sat.state_dict())
    for model in models:
        if model.layer_weights is not None:
            torch.nn.init.normal_(model.layer_weights)
    return models


@pytest.mark.parametrize("kind", KINDS)
def test_heads_of_one_encoder_share_a_pass_and_equal_their_own_forward(kind: str) -> None:
    models = family(kind, use_weighted_layer_sum=True)
    window = Window(6, 20, 3)
    streaming = StreamingModel(models, window)
    assert streaming.encoders == 1
    audio = wave(1, streaming.chunk_samples * 7)
    state = streaming.zeros(3)
    passes = [
        streaming.step(part, state, torch.tensor([1]))
        for part in audio.split(streaming.chunk_samples, dim=1)
    ]
    mask = torch.cat([p.mask for p in passes], dim=1)[0]
    T = int(mask.sum())
    with torch.inference_mode():
        encoded = models[0].unispeech_sat(audio, streaming=window, output_hidden_states=True)
        activity, voice, ctc, labels = (model.of(encoded)[0] for model in models)
    for name, expected in (("activity", activity), ("ctc", ctc), ("labels", labels)):
        got = p_cat(passes, name)[mask]
        torch.testing.assert_close(got, expected[:T], atol=EXACT, rtol=0)
    outputs = p_cat(passes, "voice")[p_cat(passes, "voice_mask")]
    assert len(outputs) == T - models[1].context
    torch.testing.assert_close(outputs, voice[: len(outputs)], atol=EXACT, rtol=0)


def p_cat(passes: list[Any], name: str) -> Tensor:
    return torch.cat([getattr(p, name) for p in passes], dim=1)[0]


def test_heads_of_other_encoders_get_their_own_pass() -> None:
    models = family()
    with torch.no_grad():
        models[2].unispeech_sat.encoder.layer_norm.bias += 1
    streaming = StreamingModel(models, Window(6, 20, 3))
    assert streaming.encoders == 2
    with pytest.raises(ValueError, match="one head of a kind, got two UniSpeechSatForCTC"):
        StreamingModel([models[2], models[2]], Window(6, 20, 3))
    with pytest.raises(ValueError, match="expected a model with a head, got UniSpeechSatModel"):
        StreamingModel([models[2].unispeech_sat], Window(6, 20, 3))


def test_a_non_finite_chunk_also_clears_the_tdnn() -> None:
    streaming = StreamingModel(family(), Window(6, 20, 3))
    audio = wave(1, streaming.chunk_samples * 6)
    clean = audio.clone()
    audio[0, streaming.chunk_samples * 2] = float("nan")
    clean[:, streaming.chunk_samples * 2 : streaming.chunk_samples * 3] = 0
    state, fresh = streaming.zeros(1), streaming.zeros(1)
    parts = audio.split(streaming.chunk_samples, dim=1)
    passes = [streaming.step(part, state) for part in parts]
    again = [streaming.step(p, fresh) for p in clean.split(streaming.chunk_samples, dim=1)[2:]]
    for got, expected in zip(passes[2:], again, strict=True):
        assert got.voice is not None
        assert expected.voice is not None
        torch.testing.assert_close(got.voice, expected.voice, atol=EXACT, rtol=0)
        assert torch.equal(got.voice_mask, expected.voice_mask)


@quick
@given(window=windows, samples=st.integers(400, 1500))
def test_running_pooling_equals_the_pooled_embedding_of_the_whole(
    window: Window, samples: int
) -> None:
    model: Any = family()[1]
    streaming = StreamingModel([model], window)
    audio = wave(1, samples)
    with torch.inference_mode():
        expected = model(audio, streaming=window).embeddings
    moments = VoiceMoments.zeros(1, 2, model.config.tdnn_dim[-1])
    state = streaming.zeros(1)
    size = streaming.chunk_samples
    for begin in range(0, samples + (streaming.lead + window.chunk) * HOP, size):
        part = audio[:, begin : begin + size]
        valid = torch.tensor([part.shape[1]])
        part = torch.nn.functional.pad(part, (0, size - part.shape[1]))
        step = streaming.step(part, state, valid=valid)
        assert step.voice is not None
        assert step.voice_mask is not None
        weight = torch.stack([step.voice_mask, torch.zeros_like(step.voice_mask)], dim=2)
        moments.step(step.voice, weight.float())
    with torch.inference_mode():
        got = model.embed(moments.mass, moments.first, moments.second)
    torch.testing.assert_close(got[:, 0], expected, atol=1e-4, rtol=0)
    assert moments.mass[0, 1] == 0
    assert got.isfinite().all()
