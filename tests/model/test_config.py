"""The config reads, keeps and writes the published ``config.json``, and names what is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from model.config import UniSpeechSatConfig
from model.features import carries
from tests.model.tiny import KINDS, config


def test_defaults_are_the_published_ones() -> None:
    theirs = transformers.UniSpeechSatConfig()
    ours = UniSpeechSatConfig()
    for key, value in ours.to_dict().items():
        expected = getattr(theirs, key, None)
        expected = list(expected) if isinstance(expected, tuple) else expected
        if key in ("id2label", "label2id"):
            expected = {str(k): v for k, v in expected.items()}
        if key not in ("adapter_attn_dim", "add_adapter"):
            assert value == expected, key


def test_a_file_read_and_written_again_loses_nothing(tmp_path: Path) -> None:
    values = {"model_type": "unispeech-sat", "hidden_size": 24, "num_attention_heads": 3}
    values |= {"tokenizer_class": "Wav2Vec2CTCTokenizer", "id2label": {"0": "no", "1": "yes"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    read = UniSpeechSatConfig.from_pretrained(tmp_path)
    read.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written.items() >= values.items()
    assert read.label2id == {"no": 0, "yes": 1}
    assert UniSpeechSatConfig.from_pretrained(tmp_path / "again") == read
    assert transformers.UniSpeechSatConfig.from_pretrained(tmp_path / "again").hidden_size == 24


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"hidden_size": "wide"}, "hidden_size: expected int, got 'wide'"),
        ({"conv_bias": 1}, "conv_bias: expected bool, got 1"),
        ({"conv_dim": [8, 0]}, "conv_dim: expected a list of positive integers"),
        ({"conv_dim": [8, 8]}, "conv_dim, conv_stride and conv_kernel: expected three lists"),
        ({"tdnn_dim": [8]}, "tdnn_dim, tdnn_kernel and tdnn_dilation: expected three lists"),
        ({"hidden_size": 100}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"feat_extract_norm": "batch"}, "feat_extract_norm: expected group or layer, got 'batch'"),
        ({"hidden_act": None}, "hidden_act: expected str, got null"),
        ({"attn_implementation": "magic"}, "attn_implementation: expected one of eager, sdpa"),
    ],
)
def test_a_bad_value_names_its_key_and_what_was_expected(
    keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        UniSpeechSatConfig(**keys)


def test_another_architecture_or_no_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model_type: expected 'unispeech-sat', got 'hubert'"):
        UniSpeechSatConfig.from_dict({"model_type": "hubert"})
    path = tmp_path / "config.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object, got list"):
        UniSpeechSatConfig.from_json_file(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: expected a JSON object"):
        UniSpeechSatConfig.from_json_file(path)


def test_frames_fields_and_carries_of_the_published_front_end() -> None:
    published = UniSpeechSatConfig()
    assert published.inputs_to_logits_ratio == 320
    assert published.receptive_field == 400
    assert published.frame_delay == 1
    assert carries(published) == [5, 1, 1, 1, 1, 1, 1]
    assert [published.frames(n) for n in (0, 399, 400, 719, 720, 16_000)] == [0, 0, 1, 1, 2, 49]


@pytest.mark.parametrize("kind", KINDS)
def test_whole_hops_leave_frame_delay_frames_incomplete(kind: str) -> None:
    small = config(kind)
    hop = small.inputs_to_logits_ratio
    assert all(small.frames(n * hop) == n - small.frame_delay for n in range(4, 40))
    with pytest.raises(ValueError, match="expected kernel ≥ stride"):
        carries(config(kind, conv_kernel=(2,), conv_stride=(5,), conv_dim=(8,)))
