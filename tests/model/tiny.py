"""Small random networks of both kinds of the family, and streams run through them."""

from typing import Any

import torch
from torch import Tensor

from model.config import UniSpeechSatConfig
from model.encoder import EncoderStep, UniSpeechSatModel
from model.state import EncoderState, Window

KEYS: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "final_dropout": 0.0,
    "layerdrop": 0.0,
    "vocab_size": 20,
    "num_labels": 3,
    "tdnn_dim": (16, 16, 24),
    "tdnn_kernel": (5, 3, 1),
    "tdnn_dilation": (1, 2, 1),
    "xvector_output_dim": 12,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "classifier_proj_size": 8,
}

BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
GABOR = {
    **LARGE,
    "conv_bias": False,
    "conv_dim": (24, 16),
    "conv_kernel": (25, 3),
    "conv_stride": (10, 2),
}
"""The embedded checkpoint's kind of front end: a field longer than two hops."""

KINDS = {"base": BASE, "large": LARGE, "gabor": GABOR}
HOP = 20


def config(kind: str = "base", **keys: Any) -> UniSpeechSatConfig:
    return UniSpeechSatConfig(**{**KEYS, **KINDS[kind], **keys})


def encoder(kind: str = "base", **keys: Any) -> UniSpeechSatModel:
    torch.manual_seed(1)
    return UniSpeechSatModel(config(kind, **keys)).eval()


def wave(rows: int, samples: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, samples, generator=generator)


@torch.inference_mode()
def stream(
    model: UniSpeechSatModel,
    audio: Tensor,
    window: Window,
    state: EncoderState | None = None,
    slots: Tensor | None = None,
) -> list[EncoderStep]:
    """Every step of audio [B, N], ended and flushed; what lies past its end is NaN on purpose."""
    B, N = audio.shape
    size = window.chunk * model.config.inputs_to_logits_ratio
    state = model.zeros(B, window) if state is None else state
    frames = model.config.frames(N)
    lead = window.right + model.config.frame_delay
    steps: list[EncoderStep] = []
    while len(steps) * window.chunk - lead < frames:
        part = audio[:, len(steps) * size : (len(steps) + 1) * size]
        valid = torch.full((B,), part.shape[1])
        part = torch.nn.functional.pad(part, (0, size - part.shape[1]), value=float("nan"))
        steps.append(model.step(part, state, slots, valid))
    return steps


def emitted(steps: list[EncoderStep], row: int = 0) -> Tensor:
    """The last hidden states of the frames that exist. → [T, D]"""
    states = torch.cat([step.last_hidden_state[row] for step in steps])
    return states[torch.cat([step.mask[row] for step in steps])]
