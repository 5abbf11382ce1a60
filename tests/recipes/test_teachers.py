import struct

import numpy as np
import pytest
import torch
from transformers import WhisperConfig, WhisperFeatureExtractor, WhisperModel

from recipes.teachers import (
    Segmentation,
    WhisperEncoder,
    read_ctranslate2,
    slaney_filters,
)


@pytest.fixture
def segmentation(tmp_path):
    """The teacher with weights of the right shapes, made up."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(60, 128, 4, bidirectional=True, batch_first=True)
    state = {f"lstm.{name}": value for name, value in lstm.state_dict().items()}
    for name, shape in (
        ("sincnet.conv1d.1", (60, 80, 5)),
        ("sincnet.conv1d.2", (60, 60, 5)),
        ("linear.0", (128, 256)),
        ("linear.1", (128, 128)),
        ("classifier", (7, 128)),
    ):
        state[f"{name}.weight"] = torch.randn(shape) / shape[1] ** 0.5
        state[f"{name}.bias"] = torch.zeros(shape[0])
    sizes = {"wav_norm1d": 1, "norm1d.0": 80, "norm1d.1": 60, "norm1d.2": 60}
    for name, size in sizes.items():
        state[f"sincnet.{name}.weight"] = torch.ones(size)
        state[f"sincnet.{name}.bias"] = torch.zeros(size)
    bank = "sincnet.conv1d.0.filterbank."
    edges = torch.linspace(30, 7600, 41)
    state[bank + "low_hz_"] = edges[:-1, None]
    state[bank + "band_hz_"] = edges.diff()[:, None]
    state[bank + "window_"] = torch.hamming_window(251, periodic=False)[:125]
    state[bank + "n_"] = 2 * torch.pi * torch.arange(-125.0, 0)[None] / 16_000
    path = tmp_path / "segmentation.pt"
    torch.save({"state_dict": state}, path)
    return Segmentation(path)


def test_its_filters_are_of_their_bands(segmentation):
    spectrum = torch.fft.rfft(segmentation.filters[:, 0], 4096).abs()
    peaks = spectrum.argmax(1) * 16_000 / 4096
    low = 50 + torch.linspace(30, 7600, 41)[:-1]
    high = torch.clamp(low + 50 + (7600 - 30) / 40, max=8000)
    for quadrature in (peaks[:40], peaks[40:]):
        assert (quadrature > low - 80).all()
        assert (quadrature < high + 80).all()


def test_it_speaks_on_the_student_s_frames(segmentation):
    wave = 0.1 * torch.randn(2, 5 * 16_000)
    heard = segmentation.activity(wave, 249)
    assert heard.shape == (2, 249, 3)
    assert heard.min() >= 0
    assert heard.max() <= 1
    known = segmentation.logits(wave).softmax(-1) @ segmentation.members
    # frame 100 is centred on sample 32,360, the teacher's 118th on 32,355
    torch.testing.assert_close(heard[:, 100], known[:, 118], atol=0.02, rtol=0.0)


def test_it_is_as_exact_beside_a_student_of_half_the_precision(segmentation):
    wave = 0.1 * torch.randn(1, 5 * 16_000)
    with torch.autocast("cpu", torch.bfloat16):
        heard = segmentation.activity(wave, 249)
    torch.testing.assert_close(heard, segmentation.activity(wave, 249))


def write_ctranslate2(path, variables, version=6):
    """A ``model.bin``: float16 arrays by name, and whole numbers of one byte."""

    def text(value):
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    parts = [struct.pack("<I", version), text("WhisperSpec"), struct.pack("<II", 3, len(variables))]
    for name, value in variables.items():
        array = np.asarray(value)
        kind = {"float16": 4, "int8": 1}[array.dtype.name]
        shape = struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        parts += [text(name), shape, struct.pack("<BI", kind, array.nbytes), array.tobytes()]
    path.write_bytes(b"".join(parts))


@pytest.fixture
def whisper():
    """A small model of the published class, its position embeddings made up like the rest."""
    torch.manual_seed(0)
    config = WhisperConfig(
        d_model=32,
        encoder_layers=2,
        encoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_layers=1,
        decoder_attention_heads=1,
        decoder_ffn_dim=8,
    )
    return WhisperModel(config).eval().encoder


def converted(encoder):
    """The variables of the encoder as CTranslate2 names them."""
    state = {name: value.half().numpy() for name, value in encoder.state_dict().items()}
    found = {"encoder/num_heads": np.int8(4)}
    found["encoder/position_encodings/encodings"] = state["embed_positions.weight"]
    for name in ("conv1", "conv2"):
        for part in ("weight", "bias"):
            found[f"encoder/{name}/{part}"] = state[f"{name}.{part}"]
    norms = {"layer_norm": "layer_norm"}
    for layer in range(2):
        ours, theirs = f"layer_{layer}", f"layers.{layer}"
        norms[f"{ours}/self_attention/layer_norm"] = f"{theirs}.self_attn_layer_norm"
        norms[f"{ours}/ffn/layer_norm"] = f"{theirs}.final_layer_norm"
        query, key, value = (f"{theirs}.self_attn.{part}_proj" for part in "qkv")
        width = len(state[f"{query}.bias"])
        attention = f"encoder/{ours}/self_attention"
        found[f"{attention}/linear_0/weight"] = np.concatenate(
            [state[f"{name}.weight"] for name in (query, key, value)]
        )
        found[f"{attention}/linear_0/bias"] = np.concatenate(
            [state[f"{query}.bias"], np.zeros(width, np.float16), state[f"{value}.bias"]]
        )
        for part in ("weight", "bias"):
            found[f"{attention}/linear_1/{part}"] = state[f"{theirs}.self_attn.out_proj.{part}"]
            for number, name in enumerate(("fc1", "fc2")):
                found[f"encoder/{ours}/ffn/linear_{number}/{part}"] = state[
                    f"{theirs}.{name}.{part}"
                ]
    for ours, theirs in norms.items():
        found[f"encoder/{ours}/gamma"] = state[f"{theirs}.weight"]
        found[f"encoder/{ours}/beta"] = state[f"{theirs}.bias"]
    return found


def test_whisper_s_encoder_is_the_published_one(whisper, tmp_path):
    write_ctranslate2(tmp_path / "model.bin", converted(whisper))
    ours = WhisperEncoder(tmp_path)
    wave = (0.1 * np.random.default_rng(0).standard_normal(480_000)).astype(np.float32)
    wave[200_000:] = 0
    features = WhisperFeatureExtractor()(wave, sampling_rate=16_000, return_tensors="pt")
    torch.testing.assert_close(
        ours.features(torch.from_numpy(wave)[None]), features.input_features, atol=1e-4, rtol=0
    )
    with torch.no_grad():
        whisper.half().float()
        expected = whisper(features.input_features).last_hidden_state
    torch.testing.assert_close(
        ours.encode(torch.from_numpy(wave)[None]), expected, atol=1e-3, rtol=0
    )
    rows = ours.rows([wave[:32_000], wave[32_000:64_000]])
    assert [row.shape for row in rows] == [(100, 32)] * 2
    assert rows[0].dtype == np.float16


def test_a_file_that_is_not_float_is_refused_by_its_name(tmp_path):
    path = tmp_path / "model.bin"
    write_ctranslate2(path, {"encoder/conv1/weight": np.zeros((2, 2), np.int8)})
    with pytest.raises(ValueError, match=r"model\.bin: encoder/conv1/weight: .*quantised"):
        list(read_ctranslate2(path))
    write_ctranslate2(path, {}, version=5)
    with pytest.raises(ValueError, match="expected CTranslate2's binary version 6, got 5"):
        list(read_ctranslate2(path))


def test_slaney_s_filters_have_unit_area():
    filters = slaney_filters()
    assert filters.shape == (201, 80)
    # the wide ones, which the grid of 40 Hz resolves
    assert (40 * filters.sum(0))[40:] == pytest.approx([1.0] * 40, abs=0.1)
