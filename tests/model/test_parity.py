"""Whole utterances equal the published implementation on the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from model import encoder, heads
from model.config import UniSpeechSatConfig
from tests.model.tiny import KEYS, KINDS, wave

CLASSES = [
    "UniSpeechSatModel",
    "UniSpeechSatForCTC",
    "UniSpeechSatForSequenceClassification",
    "UniSpeechSatForAudioFrameClassification",
    "UniSpeechSatForXVector",
]
LABELS = {
    "UniSpeechSatForCTC": torch.tensor([[1, 2, 2, 3, 4], [5, 6, -100, -100, -100]]),
    "UniSpeechSatForSequenceClassification": torch.tensor([2, 0]),
    "UniSpeechSatForXVector": torch.tensor([2, 0]),
}
TOLERANCE = 1e-4


def pair(name: str, keys: dict[str, Any], attention: str = "sdpa") -> tuple[Any, Any]:
    torch.manual_seed(7)
    theirs = getattr(transformers, name)(
        transformers.UniSpeechSatConfig(**keys, attn_implementation=attention)
    ).eval()
    ours_class = getattr(encoder, name, None) or getattr(heads, name)
    ours = ours_class(UniSpeechSatConfig(**keys, attn_implementation=attention)).eval()
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def assert_same(theirs: Any, ours: Any, frames: Tensor | None = None) -> None:
    assert ours.keys() == list(theirs.keys())
    for name in theirs:
        expected, got = theirs[name], ours[name]
        if name in ("hidden_states", "attentions"):
            assert len(expected) == len(got)
        else:
            expected, got = (expected,), (got,)
        for e, g in zip(expected, got, strict=True):
            assert e.shape == g.shape, name
            if frames is not None and e.dim() == 3:  # padding frames mean nothing
                e, g = e[frames], g[frames]
            elif frames is not None and e.dim() == 4:
                e, g = (t.transpose(1, 2)[frames] for t in (e, g))
            torch.testing.assert_close(
                g, e, atol=TOLERANCE, rtol=0, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_every_output_equals_the_published_class(name: str, kind: str, attention: str) -> None:
    keys = {**KEYS, **KINDS[kind], "use_weighted_layer_sum": kind != "large"}
    theirs, ours = pair(name, keys, attention)
    audio = wave(2, 1600)
    extra = {"labels": LABELS[name]} if name in LABELS else {}
    if name == "UniSpeechSatForAudioFrameClassification":
        T = ours.config.frames(1600)
        extra["labels"] = torch.eye(3)[torch.arange(2 * T) % 3].view(2, T, 3)
    with torch.no_grad():
        wanted = {"output_hidden_states": True, "output_attentions": attention == "eager"}
        assert_same(theirs(audio, **extra, **wanted), ours(audio, **extra, **wanted))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CLASSES)
def test_padded_batches(name: str, kind: str) -> None:
    theirs, ours = pair(name, {**KEYS, **KINDS[kind]})
    audio, mask = wave(2, 1600), torch.ones(2, 1600, dtype=torch.long)
    mask[1, 900:] = 0
    audio[1, 900:] = 0
    extra = {"labels": LABELS[name]} if name in LABELS else {}
    frames = ours.feature_attention_mask(ours.config.frames(1600), mask)
    with torch.no_grad():
        assert_same(
            theirs(audio, attention_mask=mask, **extra),
            ours(audio, attention_mask=mask, **extra),
            frames,
        )


@pytest.mark.parametrize("kernel", [15, 16])
@pytest.mark.parametrize("stable", [False, True])
@pytest.mark.parametrize("norm", ["group", "layer"])
def test_both_norms_in_both_places_with_odd_and_even_kernels(
    norm: str, stable: bool, kernel: int
) -> None:
    keys = {
        **KEYS,
        "feat_extract_norm": norm,
        "do_stable_layer_norm": stable,
        "num_conv_pos_embeddings": kernel,
        "adapter_attn_dim": 8,
    }
    theirs, ours = pair("UniSpeechSatModel", keys)
    with torch.no_grad():
        assert_same(theirs(wave(2, 900)), ours(wave(2, 900)))


@pytest.mark.parametrize("name", CLASSES)
def test_saved_by_one_and_loaded_by_the_other(name: str, tmp_path: Path) -> None:
    keys = {**KEYS, **KINDS["large"], "use_weighted_layer_sum": True}
    theirs, ours = pair(name, keys)
    audio = wave(1, 1200)
    theirs.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    with torch.no_grad():
        expected = theirs(audio)
        assert_same(expected, type(ours).from_pretrained(tmp_path / "theirs").eval()(audio))
        again = getattr(transformers, name).from_pretrained(tmp_path / "ours").eval()
        assert_same(again(audio), ours(audio))


def test_given_mask_indices_replace_frames_as_published() -> None:
    theirs, ours = pair("UniSpeechSatModel", {**KEYS, **KINDS["base"]})
    T = ours.config.frames(1600)
    indices = torch.zeros(2, T, dtype=torch.bool)
    indices[0, 3:9] = indices[1, 20:] = True
    with torch.no_grad():
        audio = wave(2, 1600)
        assert_same(
            theirs(audio, mask_time_indices=indices), ours(audio, mask_time_indices=indices)
        )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_head_mask_scales_heads_in_every_implementation(attention: str) -> None:
    """A masked head equals one whose values are zero; the published sdpa path ignores the mask."""
    _, ours = pair("UniSpeechSatModel", {**KEYS, **KINDS["large"]}, attention)
    audio = wave(1, 1200)
    mask = torch.ones(3, 4)
    mask[1, 2] = 0.25
    with torch.no_grad():
        masked = ours(audio, head_mask=mask).last_hidden_state
        plain = ours(audio).last_hidden_state
        heads_of = ours.encoder.layers[1].attention.v_proj
        heads_of.weight[16:24] *= 0.25
        heads_of.bias[16:24] *= 0.25
        scaled = ours(audio).last_hidden_state
    torch.testing.assert_close(masked, scaled, atol=1e-6, rtol=0)
    assert (masked - plain).abs().max() > 1e-5
    with pytest.raises(ValueError, match=r"head_mask: expected \[3, 4\]"):
        ours(audio, head_mask=torch.ones(3, 5))


def test_flash_attention_on_a_cpu_is_refused_with_the_way_out() -> None:
    _, ours = pair("UniSpeechSatModel", {**KEYS, **KINDS["base"]})
    ours.config.attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"flash_attention_2: expected .* CUDA .*sdpa"):
        ours(wave(1, 800))


def test_outputs_unpack_as_tuples() -> None:
    _, ours = pair("UniSpeechSatForCTC", {**KEYS, **KINDS["base"]})
    with torch.no_grad():
        logits = ours(wave(1, 800)).logits
        [same] = ours(wave(1, 800), return_dict=False)
        assert torch.equal(ours(wave(1, 800))[0], logits)
    assert torch.equal(same, logits)


def test_spec_augment_masks_in_training_only() -> None:
    keys = {**KEYS, **KINDS["large"], "mask_time_prob": 0.5, "mask_feature_prob": 0.3}
    _, ours = pair("UniSpeechSatModel", {**keys, "mask_feature_length": 4})
    audio = wave(1, 4000)
    with torch.no_grad():
        still = ours(audio).last_hidden_state
        assert torch.equal(still, ours(audio).last_hidden_state)
        torch.manual_seed(0)
        assert not torch.allclose(still, ours.train()(audio).last_hidden_state, atol=1e-3)
        ours.config.apply_spec_augment = False
        torch.testing.assert_close(ours(audio).last_hidden_state, still, atol=1e-6, rtol=0)


def test_layerdrop_skips_layers_in_training_only() -> None:
    _, ours = pair("UniSpeechSatModel", {**KEYS, **KINDS["large"], "apply_spec_augment": False})
    ours.config.layerdrop = 1.0
    audio = wave(1, 800)
    with torch.no_grad():
        assert len(ours(audio, output_hidden_states=True).hidden_states) == 4
        dropped = ours.train()(audio, output_hidden_states=True).hidden_states
    assert len(dropped) == 4
    assert all(torch.equal(dropped[0], hidden) for hidden in dropped)


def test_bad_input_is_named() -> None:
    _, ours = pair("UniSpeechSatForCTC", {**KEYS, **KINDS["base"]})
    with pytest.raises(ValueError, match=r"input_values: expected \[B, N\], got \(800,\)"):
        ours(torch.zeros(800))
    with pytest.raises(ValueError, match=r"at least 30 samples, got 3"):
        ours(torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"labels: expected ids below vocab_size \(20\), got 20"):
        ours(wave(1, 800), labels=torch.tensor([[20]]))


@pytest.mark.slow
@pytest.mark.parametrize("size", ["base", "large"])
def test_full_size_equals_the_published_model(size: str) -> None:
    large = {
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    }
    theirs, ours = pair("UniSpeechSatModel", large if size == "large" else {})
    audio = wave(1, 16_000)
    with torch.no_grad():
        torch.testing.assert_close(
            ours(audio).last_hidden_state,
            theirs(audio).last_hidden_state,
            atol=TOLERANCE,
            rtol=0,
        )
