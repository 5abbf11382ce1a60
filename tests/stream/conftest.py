"""A small random checkpoint, audio files, and an alarm for whatever blocks the event loop."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from blockbuster import BlockBuster, blockbuster_ctx


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """A call of ours that blocks the event loop fails the test."""
    with blockbuster_ctx(["stream", "sinks", "model"]) as alarm:
        yield alarm


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three heads over one random encoder, at the embedded checkpoint's hop and receptive field."""
    import torch

    from model.config import UniSpeechSatConfig
    from model.heads import (
        UniSpeechSatForAudioFrameClassification,
        UniSpeechSatForCTC,
        UniSpeechSatForXVector,
    )

    torch.manual_seed(7)
    config = UniSpeechSatConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        conv_dim=(16, 16),
        conv_kernel=(400, 3),
        conv_stride=(160, 2),
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        use_weighted_layer_sum=True,
        vocab_size=8,
        num_labels=3,
        tdnn_dim=(8, 8, 12),
        tdnn_kernel=(5, 3, 1),
        tdnn_dilation=(1, 2, 1),
        xvector_output_dim=6,
    )
    root = tmp_path_factory.mktemp("checkpoint")
    heads = {
        "diarization": UniSpeechSatForAudioFrameClassification,
        "speaker": UniSpeechSatForXVector,
        "ctc": UniSpeechSatForCTC,
    }
    encoder = None
    for name, kind in heads.items():
        model = kind(config)
        encoder = encoder or model.unispeech_sat.state_dict()
        model.unispeech_sat.load_state_dict(encoder)
        if name == "diarization":
            # Random activity hovers about one half: turns come and go, which the tests need.
            torch.nn.init.normal_(model.classifier.weight, std=2.0)
        if name == "ctc":
            torch.nn.init.normal_(model.lm_head.weight, std=2.0)
        model.save_pretrained(root / name)
        (root / name / "preprocessor_config.json").write_text(json.dumps({"do_normalize": False}))
    symbols = ["<pad>", "|", *"aeiost"]
    (root / "ctc" / "vocab.json").write_text(json.dumps({s: i for i, s in enumerate(symbols)}))
    return [str(root / name) for name in heads]


def speechlike(samples: int, seed: int = 0) -> np.ndarray:
    """Noise in bursts, float32 [samples]: louder and softer, so that random heads say something."""
    rng = np.random.default_rng(seed)
    level = np.repeat(rng.uniform(0.0, 0.4, samples // 4000 + 1), 4000)[:samples]
    return (rng.standard_normal(samples) * level).astype(np.float32)


@pytest.fixture(scope="session")
def audio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight seconds and a bit, 16 kHz mono."""
    import soundfile

    path = tmp_path_factory.mktemp("audio") / "eight.wav"
    soundfile.write(path, speechlike(8 * 16_000 + 777), 16_000, subtype="FLOAT")
    return path
