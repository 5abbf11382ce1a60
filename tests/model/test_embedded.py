"""The checkpoint in the package, read by transformers as the published classes."""

from pathlib import Path

import pytest
import torch
import transformers

from model.heads import (
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForXVector,
)

WEIGHTS = Path(__file__).parents[2] / "model" / "weights"
HEADS = {
    "diarization": UniSpeechSatForAudioFrameClassification,
    "speaker": UniSpeechSatForXVector,
    "ctc": UniSpeechSatForCTC,
}


@pytest.mark.parametrize("head", HEADS)
def test_transformers_hears_what_we_hear(head):
    ours = HEADS[head].from_pretrained(WEIGHTS / head, dtype=torch.float32).eval()
    theirs, info = getattr(transformers, HEADS[head].__name__).from_pretrained(
        WEIGHTS / head,
        output_loading_info=True,
        attn_implementation="eager",
        dtype=torch.float32,
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs.eval()
    torch.manual_seed(0)
    wave = 0.05 * torch.randn(1, 24_000)
    with torch.inference_mode():
        expected = theirs(wave).logits
        assert torch.allclose(ours(wave).logits, expected, atol=1e-3), head


@pytest.mark.parametrize("head", HEADS)
def test_its_config_is_the_published_one(head):
    config = transformers.UniSpeechSatConfig.from_pretrained(WEIGHTS / head)
    assert config.architectures == [HEADS[head].__name__]
    assert config.inputs_to_logits_ratio == 320


def test_it_is_small():
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    tokenizer = transformers.Wav2Vec2CTCTokenizer.from_pretrained(WEIGHTS / "ctc")
    assert tokenizer.decode([5, 5, 0, 6, 4, 7]) == "ET A"
