"""Waveforms in, text out: normalisation, padding, the CTC vocabulary and its decoding.

Reads and writes the published JSON files; takes and gives what the published classes do.
"""

import itertools
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeGuard, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.checkpoint import CheckpointError, find, read_json, write_json

logger = logging.getLogger(__name__)

Padding = bool | str
"""True or "longest"; "max_length"; False or "do_not_pad"."""

Waves = NDArray[Any] | Tensor | Sequence[float] | Sequence[Sequence[float] | NDArray[Any] | Tensor]
"""One utterance [N], or several: [B, N], or a list of [N] of different lengths."""

Ids = int | Sequence[int] | NDArray[Any] | Tensor

PREPROCESSOR_FILE: Final = "preprocessor_config.json"
PROCESSOR_FILE: Final = "processor_config.json"
TOKENIZER_FILE: Final = "tokenizer_config.json"
SPECIAL_TOKENS_FILE: Final = "special_tokens_map.json"
ADDED_TOKENS_FILE: Final = "added_tokens.json"
VOCAB_FILE: Final = "vocab.json"

VARIANCE_FLOOR: Final = 1e-7
"""Added to the variance before the root, as published."""


class BatchFeature(dict[str, Any]):
    """A dict whose keys are attributes, too, ready for ``model(**batch)``."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no field {name!r}; there are {', '.join(self)}") from None

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Move tensors as ``Tensor.to`` does; a dtype changes floating-point tensors only."""
        for key, value in self.items():
            if isinstance(value, Tensor):
                moved = value.to(*args, **kwargs)
                keep = not value.is_floating_point() and moved.dtype != value.dtype
                self[key] = value.to(moved.device) if keep else moved
        return self


# ---------------------------------------------------------------------------------------------
# Waveforms


class Wav2Vec2FeatureExtractor:
    """Normalises and pads waveforms. Source: the published class of this name.

    Args:
        feature_size: Values a sample: 1.
        sampling_rate: Samples a second that the model was trained on.
        padding_value: What stands after the end of a shorter utterance.
        return_attention_mask: Give the mask of real samples unless the call says otherwise.
            Checkpoints with ``feat_extract_norm="layer"`` want it, ``"group"`` ones do not.
        do_normalize: Zero mean and unit variance for every utterance.
        padding_side: "right" or "left".
        **extra: Unknown keys of the JSON file, written back by `save_pretrained`.
    """

    model_input_names: Final = ("input_values", "attention_mask")

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 16_000,
        padding_value: float = 0.0,
        return_attention_mask: bool = False,
        do_normalize: bool = True,
        padding_side: str = "right",
        **extra: Any,
    ) -> None:
        if feature_size != 1:
            raise ValueError(f"feature_size: expected 1 (mono), got {feature_size}")
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side: expected 'right' or 'left', got {padding_side!r}")
        self.feature_size = feature_size
        self.sampling_rate = sampling_rate
        self.padding_value = padding_value
        self.return_attention_mask = return_attention_mask
        self.do_normalize = do_normalize
        self.padding_side = padding_side
        self.extra = extra

    def __call__(
        self,
        raw_speech: Waves,
        padding: Padding = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        sampling_rate: int | None = None,
    ) -> BatchFeature:
        """Utterances → ``input_values`` [B, N] and, where wanted, ``attention_mask`` [B, N].

        As published, statistics are taken over the real samples where there is a mask, else over
        the padded utterance.

        Args:
            raw_speech: Mono, samples as floats.
            padding: True or "longest"; "max_length"; False or "do_not_pad".
            max_length: Samples, for "max_length" and ``truncation``.
            truncation: Cut to ``max_length``.
            pad_to_multiple_of: Round lengths up to a multiple of this many samples.
            return_attention_mask: Overrides the extractor's own setting.
            return_tensors: "pt", "np" or None for a list of float32 arrays [N].
            sampling_rate: Of ``raw_speech``; checked against the model's.

        Raises:
            ValueError: another sampling rate, more than one channel, no utterance or an empty
                one, an unknown padding, or lengths that cannot be stacked.
        """
        if sampling_rate is None:
            logger.warning("sampling_rate not given: a wave at another rate would go unnoticed")
        elif sampling_rate != self.sampling_rate:
            raise ValueError(
                f"sampling_rate: the model expects {self.sampling_rate} Hz, "
                f"got a wave at {sampling_rate} Hz: resample it first"
            )
        strategy = _strategy(padding)
        batch = self._pad(
            _waves(raw_speech),
            strategy,
            max_length,
            truncation,
            pad_to_multiple_of,
            self.return_attention_mask if return_attention_mask is None else return_attention_mask,
        )
        if self.do_normalize:
            masks = None if strategy == "do_not_pad" else batch.get("attention_mask")
            batch["input_values"] = self.zero_mean_unit_var_norm(
                batch["input_values"], masks, self.padding_value
            )
        return _converted(batch, return_tensors)

    @staticmethod
    def zero_mean_unit_var_norm(
        input_values: Sequence[NDArray[np.float32]],
        attention_mask: Sequence[NDArray[Any]] | None,
        padding_value: float = 0.0,
    ) -> list[NDArray[np.float32]]:
        """Each utterance [N] to zero mean and unit variance over its real samples."""
        normed: list[NDArray[np.float32]] = []
        for i, wave in enumerate(input_values):
            real = wave if attention_mask is None else wave[attention_mask[i].astype(bool)]
            values = (wave - real.mean()) / np.sqrt(real.var() + VARIANCE_FLOOR)
            if attention_mask is not None:
                values = np.where(attention_mask[i], values, np.float32(padding_value))
            normed.append(values.astype(np.float32))
        return normed

    def pad(
        self,
        processed_features: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: Padding = True,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Pad utterances that are normalised already: the collate function of a data loader.

        Raises:
            ValueError: no ``input_values``, or as `__call__`.
        """
        waves = _column(processed_features, "input_values")
        batch = self._pad(
            _waves(waves),
            _strategy(padding),
            max_length,
            truncation,
            pad_to_multiple_of,
            self.return_attention_mask if return_attention_mask is None else return_attention_mask,
        )
        return _converted(batch, return_tensors)

    def _pad(
        self,
        waves: list[NDArray[np.float32]],
        strategy: str,
        max_length: int | None,
        truncation: bool,
        multiple: int | None,
        with_mask: bool,
    ) -> BatchFeature:
        rows, masks = _padded(
            waves,
            strategy,
            max_length,
            truncation,
            multiple,
            np.float32(self.padding_value),
            self.padding_side,
        )
        batch = BatchFeature(input_values=rows)
        if with_mask:
            batch["attention_mask"] = masks
        return batch

    def to_dict(self) -> dict[str, Any]:
        """The published keys of ``preprocessor_config.json``, and the unknown ones."""
        return {
            **self.extra,
            "do_normalize": self.do_normalize,
            "feature_extractor_type": "Wav2Vec2FeatureExtractor",
            "feature_size": self.feature_size,
            "padding_side": self.padding_side,
            "padding_value": self.padding_value,
            "return_attention_mask": self.return_attention_mask,
            "sampling_rate": self.sampling_rate,
        }

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **overrides: Any) -> Self:
        """Read ``preprocessor_config.json``, or the extractor's part of ``processor_config.json``.

        Raises:
            CheckpointError: neither is there, or it is of another class or has a bad value.
        """
        path = find(path_or_id, PREPROCESSOR_FILE, PROCESSOR_FILE)
        if path is None:
            raise CheckpointError(f"{path_or_id}: expected {PREPROCESSOR_FILE}, found none")
        values = read_json(path)
        if path.name == PROCESSOR_FILE:
            values = values.get("feature_extractor")
            if not isinstance(values, dict):
                raise CheckpointError(f"{path}: expected an object feature_extractor")
        values = dict(values)
        kind = values.pop("feature_extractor_type", cls.__name__)
        if kind != cls.__name__:
            raise CheckpointError(
                f"{path}: feature_extractor_type: expected {cls.__name__}, got {kind!r}"
            )
        try:
            return cls(**{**values, **overrides})
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json``."""
        write_json(Path(folder) / PREPROCESSOR_FILE, self.to_dict())


def _waves(raw: Any) -> list[NDArray[np.float32]]:
    """What callers pass → one float32 array [N] an utterance."""
    if isinstance(raw, Tensor | np.ndarray):
        array = _array(raw)
        if array.ndim not in (1, 2):
            raise ValueError(f"raw_speech: expected mono [N] or [B, N], got {list(array.shape)}")
        waves = [array] if array.ndim == 1 else list(array)
    else:
        items: list[Any] = list(raw)
        nested = bool(items) and isinstance(items[0], np.ndarray | Tensor | list | tuple)
        nested = nested and np.ndim(items[0]) > 0
        waves = [_array(item) for item in items] if nested else [_array(items)]
    if not waves:
        raise ValueError("raw_speech: expected at least one utterance, got none")
    for i, wave in enumerate(waves):
        if wave.ndim != 1:
            raise ValueError(
                f"raw_speech: expected mono [N], got {list(wave.shape)} (utterance {i})"
            )
        if not wave.size:
            raise ValueError(f"raw_speech: expected samples, got none (utterance {i})")
    return waves


def _array(values: Any) -> NDArray[np.float32]:
    if isinstance(values, Tensor):
        values = values.detach().cpu().numpy()
    try:
        return np.asarray(values, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise ValueError(f"raw_speech: expected numbers, one a sample ({error})") from error


def _strategy(padding: Padding) -> Literal["longest", "max_length", "do_not_pad"]:
    value = getattr(padding, "value", padding)
    match value:
        case True | "longest":
            return "longest"
        case False | None | "do_not_pad":
            return "do_not_pad"
        case "max_length":
            return "max_length"
        case _:
            raise ValueError(
                "padding: expected True, False, 'longest', 'max_length' or 'do_not_pad', "
                f"got {padding!r}"
            )


def _padded(
    rows: Sequence[NDArray[Any]],
    strategy: str,
    max_length: int | None,
    truncation: bool,
    multiple: int | None,
    fill: Any,
    side: str,
) -> tuple[list[NDArray[Any]], list[NDArray[np.int32]]]:
    """Cut and pad rows [N] → rows [N'] and their masks (1 where a value is real)."""
    if max_length is None and (truncation or strategy == "max_length"):
        raise ValueError("max_length: expected a length for truncation or padding, got none")

    def rounded(length: int) -> int:
        return length if multiple is None else -(-length // multiple) * multiple

    if truncation:
        assert max_length is not None
        rows = [row[: rounded(max_length)] for row in rows]
    if strategy == "longest":
        max_length = max(len(row) for row in rows)
    out: list[NDArray[Any]] = []
    masks: list[NDArray[np.int32]] = []
    for row in rows:
        short = 0
        if strategy != "do_not_pad":
            assert max_length is not None
            short = max(rounded(max_length) - len(row), 0)
        width = (0, short) if side == "right" else (short, 0)
        out.append(np.pad(row, width, constant_values=fill) if short else row)
        masks.append(np.pad(np.ones(len(row), np.int32), width))
    return out, masks


def _column(features: Mapping[str, Any] | Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """One field of a batch, or of a list of examples."""
    try:
        if isinstance(features, Mapping):
            values = features[key]
            single = np.ndim(values[0]) == 0
            return [values] if single else list(values)
        return [example[key] for example in features]
    except KeyError as error:
        raise ValueError(f"expected examples with {key}, got {features!r:.200}") from error


def _converted(batch: BatchFeature, return_tensors: str | None) -> BatchFeature:
    kind = getattr(return_tensors, "value", return_tensors)
    if kind is None:
        return batch
    if kind not in ("pt", "np"):
        raise ValueError(f"return_tensors: expected 'pt', 'np' or None, got {return_tensors!r}")
    for key, rows in batch.items():
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise ValueError(
                f"{key}: cannot stack lengths {lengths[0]} to {lengths[-1]}: pass padding=True"
            )
        stacked = np.stack([np.asarray(row) for row in rows])
        batch[key] = stacked if kind == "np" else torch.from_numpy(stacked)
    return batch


# ---------------------------------------------------------------------------------------------
# Text


@dataclass
class Wav2Vec2CTCTokenizerOutput:
    """Decoded text with the frames of its characters and words, where asked for.

    An offset is ``{"char" | "word": str, "start_offset": int, "end_offset": int}`` in frames, the
    end exclusive. For a batch each field is a list.
    """

    text: Any
    char_offsets: Any = None
    word_offsets: Any = None

    def __getitem__(self, key: str) -> Any:
        return getattr(self, key)


class Wav2Vec2CTCTokenizer:
    """Text ↔ the ids of a CTC head. Source: the published class of this name.

    Args:
        vocab_file: ``vocab.json``, token → id, or language → token → id; or that mapping itself.
        bos_token: Beginning of sentence; may be None, as may the next three.
        eos_token: End of sentence.
        unk_token: Stands for what the vocabulary lacks.
        pad_token: Padding, and the blank of CTC.
        word_delimiter_token: Stands between words.
        replace_word_delimiter_char: What decoding writes for it.
        do_lower_case: The vocabulary is upper case, the text lower case.
        target_lang: Language of a nested vocabulary.
        clean_up_tokenization_spaces: Default of `decode`.
        added_tokens: Tokens beside the vocabulary → id.
        **extra: Unknown keys of the JSON file, written back by `save_pretrained`.

    Raises:
        ValueError: a vocabulary that is not tokens to ids, or an unknown language.
    """

    model_input_names: Final = ("input_ids", "attention_mask")

    def __init__(
        self,
        vocab_file: str | Path | Mapping[str, Any],
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        unk_token: str | None = "<unk>",
        pad_token: str | None = "<pad>",
        word_delimiter_token: str | None = "|",
        replace_word_delimiter_char: str = " ",
        do_lower_case: bool = False,
        target_lang: str | None = None,
        clean_up_tokenization_spaces: bool = False,
        added_tokens: Mapping[str, int] | None = None,
        additional_special_tokens: Sequence[str] = (),
        **extra: Any,
    ) -> None:
        named = not isinstance(vocab_file, Mapping)
        self.vocab = read_json(Path(vocab_file)) if named else dict(vocab_file)
        self.bos_token = bos_token
        self.eos_token = eos_token
        self.unk_token = unk_token
        self.pad_token = pad_token
        self.word_delimiter_token = word_delimiter_token
        self.replace_word_delimiter_char = replace_word_delimiter_char
        self.do_lower_case = do_lower_case
        self.clean_up_tokenization_spaces = clean_up_tokenization_spaces
        self.additional_special_tokens = list(additional_special_tokens)
        self.extra = extra
        self._given = dict(added_tokens or {})
        self.target_lang: str | None = None
        self._use(self._language(target_lang))
        self.target_lang = target_lang

    def _language(self, target_lang: str | None) -> dict[str, int]:
        vocab = self.vocab
        if target_lang is not None:
            if not _is_nested(vocab):
                raise ValueError(
                    f"target_lang: expected a vocabulary by language for {target_lang!r}"
                )
            if target_lang not in vocab:
                known = ", ".join(sorted(vocab))
                raise ValueError(f"target_lang: expected one of {known}, got {target_lang!r}")
            vocab = vocab[target_lang]
        if _is_nested(vocab):
            known = ", ".join(sorted(vocab))
            raise ValueError(f"target_lang: expected one of {known}, got none")
        if not _is_flat(vocab):
            raise ValueError("vocabulary: expected tokens to ids, a whole number each")
        return vocab

    def _use(self, encoder: dict[str, int]) -> None:
        """Make a flat vocabulary the current one, with ids after it for tokens that it lacks."""
        self.encoder = encoder
        self.decoder = {i: token for token, i in encoder.items()}
        self.added_tokens_encoder: dict[str, int] = {
            token: i for token, i in self._given.items() if i not in self.decoder
        }
        for token in (*self._special(), self.word_delimiter_token):
            if token is not None and token not in encoder:
                self.added_tokens_encoder.setdefault(
                    token, len(encoder) + len(self.added_tokens_encoder)
                )
        self._added_decoder = {i: token for token, i in self.added_tokens_encoder.items()}
        # Tokens of several characters stay whole. Those of the vocabulary swallow the spaces around
        # them, special ones beside it do not: so the published tokenizer marks them.
        whole = {token for token in encoder if len(token) > 1}
        apart = sorted(
            {*whole, *self._special(), *self.added_tokens_encoder}, key=len, reverse=True
        )
        self._whole = whole
        self._split = re.compile(f"({'|'.join(map(re.escape, apart))})") if apart else None

    def set_target_lang(self, target_lang: str) -> None:
        """Switch to another language of a nested vocabulary.

        Raises:
            ValueError: the vocabulary is flat, or lacks the language.
        """
        self._use(self._language(target_lang))
        self.target_lang = target_lang

    # -- special tokens

    def _special(self) -> list[str]:
        named = (self.bos_token, self.eos_token, self.unk_token, self.pad_token)
        return [
            token
            for token in dict.fromkeys((*named, *self.additional_special_tokens))
            if token is not None
        ]

    @property
    def all_special_tokens(self) -> list[str]:
        """Tokens that ``skip_special_tokens`` drops."""
        return self._special()

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of `all_special_tokens`."""
        return [self._id(token) for token in self._special()]

    @property
    def pad_token_id(self) -> int | None:
        """Id of padding, which is the blank of CTC."""
        return self._id_or_none(self.pad_token)

    @property
    def unk_token_id(self) -> int | None:
        """Id of what the vocabulary lacks."""
        return self._id_or_none(self.unk_token)

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning of a sentence."""
        return self._id_or_none(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end of a sentence."""
        return self._id_or_none(self.eos_token)

    @property
    def word_delimiter_token_id(self) -> int | None:
        """Id of what stands between words."""
        return self._id_or_none(self.word_delimiter_token)

    def _id_or_none(self, token: str | None) -> int | None:
        return None if token is None else self._id(token)

    @property
    def vocab_size(self) -> int:
        """Entries of the vocabulary, without the tokens added beside it."""
        return len(self.decoder)

    def __len__(self) -> int:
        return len(self.get_vocab())

    def get_vocab(self) -> dict[str, int]:
        """Token → id, with the tokens added beside the vocabulary."""
        return {**self.encoder, **self.added_tokens_encoder}

    # -- text → ids

    def tokenize(self, text: str) -> list[str]:
        """Text → tokens: characters, and those of several characters that the vocabulary has."""
        if self._split is None:
            return self._characters(text)
        pieces = [piece for piece in self._split.split(text) if piece is not None]
        known = self._whole | set(self._special()) | set(self.added_tokens_encoder)
        # the split alternates: text, token, text, …; a token may stand at odd places only
        for i in range(1, len(pieces), 2):
            if pieces[i] in self._whole:
                pieces[i - 1] = pieces[i - 1].rstrip()
                pieces[i + 1] = pieces[i + 1].lstrip()
        tokens: list[str] = []
        for i, piece in enumerate(pieces):
            if i % 2 and piece in known:
                tokens.append(piece)
            else:
                tokens.extend(self._characters(piece))
        return tokens

    def _characters(self, text: str) -> list[str]:
        text = text.upper() if self.do_lower_case else text
        if self.word_delimiter_token is not None:
            text = text.replace(" ", self.word_delimiter_token)
        return list(text)

    def convert_tokens_to_ids(self, tokens: str | Sequence[str]) -> int | list[int]:
        """Tokens → ids, ``unk_token`` for those that the vocabulary lacks.

        Raises:
            ValueError: one is lacking and there is no ``unk_token``.
        """
        return self._id(tokens) if isinstance(tokens, str) else [self._id(t) for t in tokens]

    def _id(self, token: str) -> int:
        for name in (token, self.unk_token):
            if name is not None:
                found = self.encoder.get(name, self.added_tokens_encoder.get(name))
                if found is not None:
                    return found
        raise ValueError(f"{token!r} is not in the vocabulary, and there is no unk_token")

    def encode(self, text: str) -> list[int]:
        """Text → ids."""
        return [self._id(token) for token in self.tokenize(text)]

    def __call__(
        self,
        text: str | Sequence[str],
        padding: Padding = False,
        max_length: int | None = None,
        truncation: bool = False,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Text → ``input_ids`` and ``attention_mask``; one text without tensors gives flat lists.

        Raises:
            ValueError: as `Wav2Vec2FeatureExtractor.__call__`.
        """
        texts = [text] if isinstance(text, str) else list(text)
        batch = self.pad(
            {"input_ids": [self.encode(one) for one in texts]},
            padding,
            max_length,
            pad_to_multiple_of,
            return_attention_mask,
            return_tensors,
            truncation=truncation,
        )
        if isinstance(text, str) and return_tensors is None:
            return BatchFeature({key: rows[0] for key, rows in batch.items()})
        return batch

    def pad(
        self,
        encoded_inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
        padding: Padding = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
        *,
        truncation: bool = False,
    ) -> BatchFeature:
        """Pad ids that were encoded already: the collate function of a data loader.

        Raises:
            ValueError: no ``input_ids``, no ``pad_token`` to pad with, or as `__call__`.
        """
        strategy = _strategy(padding)
        fill = self.pad_token_id
        if fill is None and strategy != "do_not_pad":
            raise ValueError("padding: expected a pad_token, the tokenizer has none")
        if isinstance(encoded_inputs, Mapping):
            rows = encoded_inputs.get("input_ids")
            rows = None if rows is None else list(rows)
        else:
            rows = _column(encoded_inputs, "input_ids")
        if rows is None:
            raise ValueError("expected examples with input_ids")
        if rows and np.ndim(rows[0]) == 0:
            rows = [rows]
        ids = [np.asarray(row, dtype=np.int64) for row in rows]
        padded, masks = _padded(
            ids, strategy, max_length, truncation, pad_to_multiple_of, fill, "right"
        )
        batch = BatchFeature(input_ids=padded)
        if return_attention_mask is not False:
            batch["attention_mask"] = [mask.astype(np.int64) for mask in masks]
        if return_tensors is None:
            return BatchFeature({key: [row.tolist() for row in v] for key, v in batch.items()})
        return _converted(batch, return_tensors)

    # -- ids → text

    def convert_ids_to_tokens(self, ids: Ids, skip_special_tokens: bool = False) -> str | list[str]:
        """Ids → tokens, ``unk_token`` for unknown ids."""
        values = _ids(ids)
        tokens = [self._token(i) for i in values]
        if skip_special_tokens:
            special = set(self._special())
            tokens = [token for token in tokens if token not in special]
        return tokens[0] if np.ndim(cast("Any", ids)) == 0 and tokens else tokens

    def _token(self, i: int) -> str:
        token = self.decoder.get(i, self._added_decoder.get(i, self.unk_token))
        if token is None:
            raise ValueError(f"id {i} is not in the vocabulary, and there is no unk_token")
        return token

    def decode(
        self,
        token_ids: Ids,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        *,
        group_tokens: bool = True,
        spaces_between_special_tokens: bool = False,
    ) -> Any:
        """The ids of the best path through CTC logits → text.

        Repeats are joined, then blanks (``pad_token``) dropped. As published,
        ``skip_special_tokens`` drops blanks *before* repeats are joined, so doubled letters
        are lost with it: leave it off for CTC paths.

        Args:
            token_ids: [T], an id a frame.
            skip_special_tokens: Leave out special tokens, ``<unk>`` for one.
            clean_up_tokenization_spaces: No space before punctuation and English clitics.
            output_char_offsets: Also give the frames of every character.
            output_word_offsets: Also give the frames of every word.
            group_tokens: Join repeats; off for labels rather than a path.
            spaces_between_special_tokens: Put a space between all tokens.

        Returns:
            The text, or `Wav2Vec2CTCTokenizerOutput` where offsets are asked for.
        """
        tokens = [self._token(i) for i in _ids(token_ids)]
        if skip_special_tokens:
            special = set(self._special()) - {self.word_delimiter_token}
            tokens = [token for token in tokens if token not in special]
        chars = self._chars(tokens, group_tokens)
        string = (" " if spaces_between_special_tokens else "").join(c["char"] for c in chars)
        text = string.strip()
        if self.do_lower_case:
            text = text.lower()
        clean = clean_up_tokenization_spaces
        if self.clean_up_tokenization_spaces if clean is None else clean:
            text = clean_up_tokenization(text)
        if not (output_char_offsets or output_word_offsets):
            return text
        words = self._words(chars) if output_word_offsets or not tokens else None
        return Wav2Vec2CTCTokenizerOutput(
            text, chars if output_char_offsets or not tokens else None, words
        )

    def _chars(self, tokens: Iterable[str], group: bool) -> list[dict[str, Any]]:
        """The path's characters with their frames: repeats joined, blanks dropped."""
        chars: list[dict[str, Any]] = []
        end = 0
        runs = itertools.groupby(tokens) if group else ((token, (token,)) for token in tokens)
        for token, run in runs:
            start, end = end, end + sum(1 for _ in run)
            if token == self.pad_token:
                continue
            delimiter = token == self.word_delimiter_token
            char = self.replace_word_delimiter_char if delimiter else token
            chars.append({"char": char, "start_offset": start, "end_offset": end})
        return chars

    def _words(self, chars: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Runs of characters between delimiters, with the frames from first to last."""
        words: list[dict[str, Any]] = []
        runs = itertools.groupby(chars, lambda c: c["char"] == self.replace_word_delimiter_char)
        for delimiter, run in runs:
            if delimiter:
                continue
            letters = list(run)
            words.append(
                {
                    "word": "".join(c["char"] for c in letters),
                    "start_offset": letters[0]["start_offset"],
                    "end_offset": letters[-1]["end_offset"],
                }
            )
        return words

    def batch_decode(
        self,
        sequences: Iterable[Ids],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        output_char_offsets: bool = False,
        output_word_offsets: bool = False,
        **kwargs: Any,
    ) -> Any:
        """`decode` for every sequence.

        Returns:
            A list of texts, or one `Wav2Vec2CTCTokenizerOutput` of lists.
        """
        decoded = [
            self.decode(
                sequence,
                skip_special_tokens,
                clean_up_tokenization_spaces,
                output_char_offsets,
                output_word_offsets,
                **kwargs,
            )
            for sequence in sequences
        ]
        if not (output_char_offsets or output_word_offsets):
            return decoded
        return Wav2Vec2CTCTokenizerOutput(
            *([one[field] for one in decoded] for field in ("text", "char_offsets", "word_offsets"))
        )

    # -- files

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **overrides: Any) -> Self:
        """Read ``vocab.json`` and, where present, the JSON files beside it.

        Raises:
            CheckpointError: no vocabulary, or a file with a bad value.
        """
        vocab = find(path_or_id, VOCAB_FILE)
        if vocab is None:
            raise CheckpointError(f"{path_or_id}: expected {VOCAB_FILE}, found none")
        values: dict[str, Any] = {}
        added: dict[str, int] = {}
        if path := find(path_or_id, ADDED_TOKENS_FILE):
            added |= {token: int(i) for token, i in read_json(path).items()}
        for name in (SPECIAL_TOKENS_FILE, TOKENIZER_FILE):
            if path := find(path_or_id, name):
                values |= {key: _content(value) for key, value in read_json(path).items()}
        kind = values.pop("tokenizer_class", None)
        if kind not in (None, cls.__name__, f"{cls.__name__}Fast"):
            raise CheckpointError(
                f"{path_or_id}: tokenizer_class: expected {cls.__name__}, got {kind!r}"
            )
        for i, token in (values.pop("added_tokens_decoder", None) or {}).items():
            added[_content(token)] = int(i)
        extra = values.pop("extra_special_tokens", None)  # its name in newer files
        if isinstance(extra, list) and extra:
            values["additional_special_tokens"] = extra
        values = {k: v for k, v in values.items() if k not in _NOT_TOKENIZER_KEYS}
        values |= overrides
        try:
            return cls(vocab, added_tokens=added, **values)
        except CheckpointError:
            raise
        except ValueError as error:
            raise CheckpointError(f"{vocab}: {error}") from error

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``vocab.json``, ``tokenizer_config.json`` and ``special_tokens_map.json``.

        ``added_tokens.json`` is written where tokens stand beside the vocabulary.
        """
        folder = Path(folder)
        special = {
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "unk_token": self.unk_token,
        }
        described: dict[str, Any] = {}
        for token in {*self._whole, *self._special(), *self.added_tokens_encoder}:
            strips = token in self._whole
            described[str(self._id(token))] = {
                "content": token,
                "lstrip": strips,
                "normalized": False,
                "rstrip": strips,
                "single_word": False,
                "special": token in self._special(),
            }
        config = {
            **self.extra,
            **special,
            "added_tokens_decoder": described,
            "clean_up_tokenization_spaces": self.clean_up_tokenization_spaces,
            "do_lower_case": self.do_lower_case,
            "replace_word_delimiter_char": self.replace_word_delimiter_char,
            "target_lang": self.target_lang,
            "tokenizer_class": "Wav2Vec2CTCTokenizer",
            "word_delimiter_token": self.word_delimiter_token,
        }
        if self.additional_special_tokens:
            config["additional_special_tokens"] = self.additional_special_tokens
        write_json(folder / VOCAB_FILE, self.vocab)
        write_json(folder / TOKENIZER_FILE, config)
        write_json(
            folder / SPECIAL_TOKENS_FILE, {k: v for k, v in special.items() if v is not None}
        )
        (folder / ADDED_TOKENS_FILE).unlink(missing_ok=True)
        if self.added_tokens_encoder:
            write_json(folder / ADDED_TOKENS_FILE, self.added_tokens_encoder)


# Keys that other classes or versions write into tokenizer_config.json and that mean nothing here.
_NOT_TOKENIZER_KEYS: Final = frozenset({"added_tokens", "vocab_file", "backend", "name_or_path"})


def clean_up_tokenization(text: str) -> str:
    """No space before punctuation and English clitics, as the published function of this name."""
    for mark in (" .", " ?", " !", " ,"):
        text = text.replace(mark, mark[1])
    text = text.replace(" ' ", "'")
    for clitic in (" n't", " 'm", " 's", " 've", " 're"):
        text = text.replace(clitic, clitic[1:])
    return text


def _is_flat(vocab: Mapping[str, Any]) -> TypeGuard[dict[str, int]]:
    return bool(vocab) and all(
        isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in vocab.values()
    )


def _is_nested(vocab: Mapping[str, Any]) -> TypeGuard[dict[str, dict[str, int]]]:
    return bool(vocab) and all(isinstance(inner, dict) for inner in vocab.values())


def _ids(ids: Any) -> list[int]:
    if isinstance(ids, Tensor):
        ids = ids.detach().cpu().numpy()
    values = np.asarray(ids)
    if values.ndim > 1:
        raise ValueError(f"token_ids: expected one sequence [T], got {list(values.shape)}")
    if values.size and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"token_ids: expected whole numbers, got {values.dtype}")
    return [int(i) for i in np.atleast_1d(values)]


def _content(value: Any) -> Any:
    """A token that a file spells as an object ({"content": "<s>", …}) → its text."""
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        return value["content"]
    if isinstance(value, list):
        return [_content(item) for item in value]
    return value


# ---------------------------------------------------------------------------------------------
# Both


class Wav2Vec2Processor:
    """A feature extractor and a tokenizer under one name. Source: the published class."""

    def __init__(
        self, feature_extractor: Wav2Vec2FeatureExtractor, tokenizer: Wav2Vec2CTCTokenizer
    ) -> None:
        self.feature_extractor = feature_extractor
        self.tokenizer = tokenizer

    def __call__(
        self,
        audio: Waves | None = None,
        text: str | Sequence[str] | None = None,
        *,
        sampling_rate: int | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Audio → the extractor's batch; text → the tokenizer's; both → audio with ``labels``.

        Raises:
            ValueError: neither is given, or as the two classes' calls.
        """
        if audio is None and text is None:
            raise ValueError("expected audio, text or both, got neither")
        if audio is None:
            assert text is not None
            return self.tokenizer(text, **kwargs)
        inputs = self.feature_extractor(audio, sampling_rate=sampling_rate, **kwargs)
        if text is not None:
            shared = {k: v for k, v in kwargs.items() if k in ("padding", "return_tensors")}
            inputs["labels"] = self.tokenizer(text, **shared)["input_ids"]
        return inputs

    def pad(
        self,
        input_features: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        labels: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Pad extracted audio, encoded labels, or both (then ``labels`` joins the batch).

        Raises:
            ValueError: neither is given.
        """
        if input_features is None:
            if labels is None:
                raise ValueError("expected input_features, labels or both, got neither")
            return self.tokenizer.pad(labels, **kwargs)
        batch = self.feature_extractor.pad(input_features, **kwargs)
        if labels is not None:
            batch["labels"] = self.tokenizer.pad(labels, **kwargs)["input_ids"]
        return batch

    def decode(self, *args: Any, **kwargs: Any) -> Any:
        """`Wav2Vec2CTCTokenizer.decode`."""
        return self.tokenizer.decode(*args, **kwargs)

    def batch_decode(self, *args: Any, **kwargs: Any) -> Any:
        """`Wav2Vec2CTCTokenizer.batch_decode`."""
        return self.tokenizer.batch_decode(*args, **kwargs)

    @classmethod
    def from_pretrained(cls, path_or_id: str | Path, **tokenizer_overrides: Any) -> Self:
        """Read both parts; ``target_lang`` and other overrides go to the tokenizer.

        Raises:
            CheckpointError: a part is missing or bad.
        """
        return cls(
            Wav2Vec2FeatureExtractor.from_pretrained(path_or_id),
            Wav2Vec2CTCTokenizer.from_pretrained(path_or_id, **tokenizer_overrides),
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the JSON files of both parts."""
        self.feature_extractor.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        (Path(folder) / PROCESSOR_FILE).unlink(missing_ok=True)
