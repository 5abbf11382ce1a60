import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from model.checkpoint import CheckpointError
from model.processor import (
    Wav2Vec2CTCTokenizer,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Processor,
)

TOKENS = [*("<pad>", "<s>", "</s>", "<unk>", "|"), *"ETAONIHSRDLUMWCFGYPBVK'XJQZ.?", "TH", "Ä"]
VOCAB = {token: i for i, token in enumerate(TOKENS)}
PLAIN = ["<pad>", "|", "A", "B", "[UNK]"]  # no <s>: both add it beside the vocabulary


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vocab")
    (path / "vocab.json").write_text(json.dumps(VOCAB))
    return path


@pytest.fixture(scope="module")
def ours(folder) -> Wav2Vec2CTCTokenizer:
    return Wav2Vec2CTCTokenizer(folder / "vocab.json")


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json"))


def waves(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [(rng.standard_normal(n) * 0.3 + 0.1).astype(np.float32) for n in lengths]


def same(ours, theirs) -> None:
    assert set(ours) == set(theirs)
    for key, value in ours.items():
        other = theirs[key]
        assert len(value) == len(other)
        for row, wanted in zip(value, other, strict=True):
            assert np.asarray(row).dtype == np.asarray(wanted).dtype
            np.testing.assert_allclose(np.asarray(row), np.asarray(wanted), atol=2e-6, err_msg=key)


# -- waveforms


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    "call",
    [
        {"padding": True, "return_tensors": "pt"},
        {"padding": "longest", "return_tensors": "np"},
        {"padding": "max_length", "max_length": 1200, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 700, "truncation": True, "return_tensors": "np"},
        {"padding": True, "pad_to_multiple_of": 512, "return_tensors": "pt"},
        {
            **{"padding": True, "max_length": 700, "truncation": True},
            **{"pad_to_multiple_of": 320, "return_tensors": "np"},
        },
        {"padding": False},
        {"padding": "do_not_pad", "max_length": 600, "truncation": True},
        {"padding": True, "return_attention_mask": True, "return_tensors": "pt"},
    ],
)
def test_prepares_batches_as_published(call, mask, normalize):
    settings = {"return_attention_mask": mask, "do_normalize": normalize}
    batch = waves(1000, 640, 801)
    ours = Wav2Vec2FeatureExtractor(**settings)(batch, sampling_rate=16_000, **call)
    theirs = transformers.Wav2Vec2FeatureExtractor(**settings)(batch, sampling_rate=16_000, **call)
    same(ours, theirs)


@pytest.mark.parametrize(
    "raw",
    [
        waves(800)[0],
        waves(800)[0].astype(np.float64),
        waves(800)[0].tolist(),
        np.stack(waves(800, 800)),
        [w.tolist() for w in waves(800, 800)],
        (waves(800)[0], waves(800)[0]),
    ],
    ids=["array", "float64", "list", "2d", "lists", "tuple"],
)
def test_takes_every_published_form_of_audio(raw):
    ours = Wav2Vec2FeatureExtractor()(raw, sampling_rate=16_000, return_tensors="pt")
    theirs = transformers.Wav2Vec2FeatureExtractor()(raw, sampling_rate=16_000, return_tensors="pt")
    same(ours, theirs)


def test_takes_tensors():
    extract = Wav2Vec2FeatureExtractor()
    array = np.stack(waves(640, 640))
    assert torch.equal(
        extract(torch.from_numpy(array), sampling_rate=16_000, return_tensors="pt").input_values,
        extract(array, sampling_rate=16_000, return_tensors="pt").input_values,
    )


def test_pads_prepared_utterances_as_published():
    examples = [{"input_values": w} for w in waves(500, 900)]
    call = {"padding": True, "return_tensors": "pt", "return_attention_mask": True}
    same(
        Wav2Vec2FeatureExtractor().pad(examples, **call),
        transformers.Wav2Vec2FeatureExtractor().pad(examples, **call),
    )


def test_left_padding_normalises_the_real_samples():
    extract = Wav2Vec2FeatureExtractor(padding_side="left", return_attention_mask=True)
    batch = extract(waves(500, 900), padding=True, sampling_rate=16_000, return_tensors="np")
    short = batch.input_values[0]
    assert not short[:400].any()
    assert short[400:].mean() == pytest.approx(0, abs=1e-5)
    assert short[400:].std() == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"raw_speech": waves(9)[0], "sampling_rate": 8000}, "expects 16000 Hz.*got .* 8000 Hz"),
        ({"raw_speech": np.zeros((1, 2, 9))}, r"mono \[N\] or \[B, N\], got \[1, 2, 9\]"),
        ({"raw_speech": [np.zeros((2, 9))]}, r"mono \[N\], got \[2, 9\] \(utterance 0\)"),
        ({"raw_speech": []}, "expected samples, got none"),
        ({"raw_speech": [waves(9)[0], []]}, r"got none \(utterance 1\)"),
        ({"raw_speech": ["a"]}, "expected numbers"),
        ({"raw_speech": waves(9, 8), "return_tensors": "pt"}, "lengths 8 to 9: pass padding=True"),
        ({"raw_speech": waves(9), "return_tensors": "tf"}, "'pt', 'np' or None, got 'tf'"),
        ({"raw_speech": waves(9), "padding": "most"}, "padding: expected .* got 'most'"),
        ({"raw_speech": waves(9), "padding": "max_length"}, "max_length: expected a length"),
        ({"raw_speech": waves(9), "truncation": True}, "max_length: expected a length"),
    ],
)
def test_refuses_bad_audio(call, message):
    with pytest.raises(ValueError, match=message):
        Wav2Vec2FeatureExtractor()(**{"sampling_rate": 16_000, **call})


def test_says_when_the_rate_is_not_given(caplog):
    with caplog.at_level(logging.WARNING):
        Wav2Vec2FeatureExtractor()(waves(400)[0])
    assert "sampling_rate" in caplog.text


def test_batches_are_dicts_with_attributes_that_move():
    batch = Wav2Vec2FeatureExtractor(return_attention_mask=True)(
        waves(400)[0], sampling_rate=16_000, return_tensors="pt"
    )
    batch.to(torch.float16)
    assert batch.input_values.dtype == torch.float16
    assert batch["attention_mask"].dtype == torch.int32
    with pytest.raises(AttributeError, match="no field 'labels'"):
        _ = batch.labels


# -- text


@given(
    ids=st.lists(st.sampled_from([*VOCAB.values(), *(4, 0, 6, 6), 99]), max_size=30),
    skip=st.booleans(),
    clean=st.sampled_from([None, True, False]),
    group=st.booleans(),
    spaces=st.booleans(),
)
def test_decodes_as_published(ours, theirs, ids, skip, clean, group, spaces):
    call = {
        **{"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean},
        **{"group_tokens": group, "spaces_between_special_tokens": spaces},
    }
    assert ours.decode(ids, **call) == theirs.decode(ids, **call)
    for chars, words in ((True, False), (False, True), (True, True)):
        offsets = {"output_char_offsets": chars, "output_word_offsets": words}
        mine, wanted = ours.decode(ids, **call, **offsets), theirs.decode(ids, **call, **offsets)
        assert mine.text == wanted.text
        assert mine.char_offsets == wanted.char_offsets
        assert mine.word_offsets == wanted.word_offsets


def test_decodes_a_path_to_words_with_frames(ours):
    path = [VOCAB[t] for t in ["<pad>", "H", "H", "I", "<pad>", "|", "|", "A", "<pad>", "A"]]
    got = ours.decode(torch.tensor(path), output_word_offsets=True)
    assert got.text == "HI AA"
    assert got.word_offsets == [
        {"word": "HI", "start_offset": 1, "end_offset": 4},
        {"word": "AA", "start_offset": 7, "end_offset": 10},
    ]
    assert type(got.word_offsets[0]["start_offset"]) is int


def test_decodes_batches_as_published(ours, theirs):
    batch = torch.tensor([[7, 7, 4, 0, 9, 9], [0, 0, 0, 0, 0, 0]])
    assert ours.batch_decode(batch) == theirs.batch_decode(batch)
    mine = ours.batch_decode(batch, output_word_offsets=True)
    wanted = theirs.batch_decode(batch, output_word_offsets=True)
    assert (mine.text, mine.word_offsets) == (wanted.text, wanted.word_offsets)
    assert mine["char_offsets"] == [None, None]


@given(text=st.text(st.sampled_from("ABETH|' .xß<ſé"), max_size=12), token=st.sampled_from(TOKENS))
def test_encodes_as_published(ours, theirs, text, token):
    for line in (text, f"{text}{token}A", f"A {token} {text}"):
        assert ours.tokenize(line) == theirs.tokenize(line)
        assert ours.encode(line) == theirs(line).input_ids


def test_lower_case_text_meets_an_upper_case_vocabulary(folder):
    path = folder / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(path, do_lower_case=True)
    theirs = transformers.Wav2Vec2CTCTokenizer(str(path), do_lower_case=True)
    for line in ("hello you", "Hi <unk> the TH end"):
        assert ours.encode(line) == theirs(line).input_ids
    ids = ours.encode("hi you")
    assert ours.decode(ids) == theirs.decode(ids) == "hi you"


@pytest.mark.parametrize(
    "call",
    [
        {},
        {"padding": True, "return_tensors": "pt"},
        {"padding": "max_length", "max_length": 8},
        {"padding": True, "max_length": 3, "truncation": True, "return_tensors": "np"},
        {"padding": True, "pad_to_multiple_of": 4, "return_attention_mask": False},
    ],
)
def test_pads_labels_as_published(ours, theirs, call):
    mine, wanted = ours(["HI", "HELLO"], **call), theirs(["HI", "HELLO"], **call)
    assert set(mine) == set(wanted)
    for key, value in mine.items():
        assert (
            np.asarray(value, dtype=object).tolist()
            == np.asarray(wanted[key], dtype=object).tolist()
        )
    assert ours("HI")["input_ids"] == theirs("HI")["input_ids"]


def test_tokens_beside_the_vocabulary_get_the_published_ids(tmp_path):
    vocab = {token: i for i, token in enumerate(PLAIN)}
    (tmp_path / "vocab.json").write_text(json.dumps(vocab))
    path = tmp_path / "vocab.json"
    ours = Wav2Vec2CTCTokenizer(path, unk_token="[UNK]")
    theirs = transformers.Wav2Vec2CTCTokenizer(str(path), unk_token="[UNK]")
    assert ours.get_vocab() == theirs.get_vocab()
    assert len(ours) == len(theirs)
    assert ours.vocab_size == theirs.vocab_size
    assert ours.encode("<s>A B</s>X") == theirs("<s>A B</s>X").input_ids
    ids = [1, 5, 2, 6, 3, 77]
    assert ours.decode(ids) == theirs.decode(ids)
    ours.save_pretrained(tmp_path / "saved")
    again = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "saved")
    reread = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == reread.get_vocab() == ours.get_vocab()


def test_a_vocabulary_by_language(tmp_path):
    nested = {"eng": {"<pad>": 0, "A": 1, "|": 2}, "deu": {"<pad>": 0, "Ä": 1, "B": 2, "|": 3}}
    (tmp_path / "vocab.json").write_text(json.dumps(nested))
    tokenizer = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path, target_lang="eng")
    assert tokenizer.decode([1, 2, 1]) == "A A"
    tokenizer.set_target_lang("deu")
    assert tokenizer.decode([1, 3, 2]) == "Ä B"
    tokenizer.save_pretrained(tmp_path / "saved")
    again = Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "saved")
    theirs = transformers.Wav2Vec2CTCTokenizer.from_pretrained(tmp_path / "saved")
    assert again.decode([1, 3, 2]) == theirs.decode([1, 3, 2]) == "Ä B"
    with pytest.raises(ValueError, match="expected one of deu, eng, got 'fra'"):
        tokenizer.set_target_lang("fra")
    with pytest.raises(CheckpointError, match="expected one of deu, eng, got none"):
        Wav2Vec2CTCTokenizer.from_pretrained(tmp_path)


def test_refuses_a_language_of_a_flat_vocabulary(ours):
    with pytest.raises(ValueError, match="expected a vocabulary by language"):
        ours.set_target_lang("eng")


@pytest.mark.parametrize(
    ("ids", "message"),
    [([[1, 2]], r"one sequence \[T\], got \[1, 2\]"), ([0.5], "whole numbers")],
)
def test_refuses_what_is_not_a_path(ours, ids, message):
    with pytest.raises(ValueError, match=message):
        ours.decode(ids)


# -- files


def test_loads_what_transformers_saved(tmp_path, theirs):
    extractor = transformers.Wav2Vec2FeatureExtractor(
        return_attention_mask=True, do_normalize=False
    )
    transformers.Wav2Vec2Processor(extractor, theirs).save_pretrained(tmp_path)
    ours = Wav2Vec2Processor.from_pretrained(tmp_path)
    assert ours.feature_extractor.return_attention_mask
    assert not ours.feature_extractor.do_normalize
    assert ours.tokenizer.get_vocab() == theirs.get_vocab()
    assert ours.tokenizer.encode("HI <unk> THE") == theirs("HI <unk> THE").input_ids


def test_transformers_loads_what_we_saved(tmp_path, ours):
    extractor = Wav2Vec2FeatureExtractor(return_attention_mask=True, do_normalize=False)
    Wav2Vec2Processor(extractor, ours).save_pretrained(tmp_path)
    theirs = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert theirs.feature_extractor.return_attention_mask
    assert not theirs.feature_extractor.do_normalize
    assert theirs.tokenizer.get_vocab() == ours.get_vocab()
    assert theirs.tokenizer("HI <unk> THE").input_ids == ours.encode("HI <unk> THE")
    assert theirs.decode([7, 0, 7]) == ours.decode([7, 0, 7])


def test_reads_the_older_files_of_the_hub(tmp_path):
    old = {
        "config.json": {"model_type": "unispeech-sat"},
        "vocab.json": VOCAB,
        "special_tokens_map.json": {
            "bos_token": {"content": "<s>", "lstrip": False, "__type": "AddedToken"},
            "unk_token": "<unk>",
        },
        "tokenizer_config.json": {
            **{"do_lower_case": False, "return_attention_mask": False, "do_normalize": True},
            **{"tokenizer_class": "Wav2Vec2CTCTokenizer", "pad_token": "<pad>"},
        },
        "preprocessor_config.json": {
            **{"do_normalize": True, "feature_size": 1, "padding_side": "right"},
            **{"padding_value": 0, "return_attention_mask": False, "sampling_rate": 16000},
        },
    }
    for name, values in old.items():
        (tmp_path / name).write_text(json.dumps(values))
    ours = Wav2Vec2Processor.from_pretrained(tmp_path)
    theirs = transformers.Wav2Vec2Processor.from_pretrained(tmp_path)
    assert ours.tokenizer.encode("HI <s>") == theirs.tokenizer("HI <s>").input_ids
    audio = waves(900, 500)
    same(
        ours(audio, sampling_rate=16_000, padding=True, return_tensors="pt"),
        theirs(audio, sampling_rate=16_000, padding=True, return_tensors="pt"),
    )


def test_keeps_unknown_keys(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"sampling_rate": 8000, "novel": [1]}')
    extractor = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path)
    extractor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "preprocessor_config.json").read_text())
    assert saved["novel"] == [1]
    assert saved["sampling_rate"] == 8000


def test_makes_audio_and_labels_together(folder, ours):
    processor = Wav2Vec2Processor(Wav2Vec2FeatureExtractor(), ours)
    theirs = transformers.Wav2Vec2Processor(
        transformers.Wav2Vec2FeatureExtractor(),
        transformers.Wav2Vec2CTCTokenizer(str(folder / "vocab.json")),
    )
    call = {
        **{"audio": waves(900, 500), "text": ["HI", "HELLO"], "sampling_rate": 16_000},
        **{"padding": True, "return_tensors": "pt"},
    }
    same(processor(**call), theirs(**call))
    assert processor(text="HI").input_ids == ours.encode("HI")
    batch = processor.pad(
        [{"input_values": w} for w in waves(900, 500)],
        labels=[{"input_ids": [1]}, {"input_ids": [2, 3]}],
        return_tensors="pt",
    )
    assert batch.input_values.shape == (2, 900)
    assert batch.labels.tolist() == [[1, 0], [2, 3]]
    with pytest.raises(ValueError, match="got neither"):
        processor()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "expected preprocessor_config.json, found none"),
        ({"preprocessor_config.json": "[1]"}, "expected a JSON object, got list"),
        ({"preprocessor_config.json": "{"}, "expected a JSON object"),
        ({"preprocessor_config.json": '{"feature_size": 80}'}, r"feature_size: expected 1 \(mono"),
        (
            {"preprocessor_config.json": '{"feature_extractor_type": "WhisperFeatureExtractor"}'},
            "expected Wav2Vec2FeatureExtractor, got 'Whisper",
        ),
        ({"preprocessor_config.json": "{}"}, "expected vocab.json, found none"),
        ({"preprocessor_config.json": "{}", "vocab.json": '{"A": "x"}'}, "tokens to ids"),
        (
            {
                **{"preprocessor_config.json": "{}", "vocab.json": '{"A": 1}'},
                "tokenizer_config.json": '{"tokenizer_class": "BertTokenizer"}',
            },
            "tokenizer_class: expected Wav2Vec2CTCTokenizer, got 'BertTokenizer'",
        ),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=message) as caught:
        Wav2Vec2Processor.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
