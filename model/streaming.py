"""Many heads over one stream: encoders whose weights are identical run once for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.checkpoint import content_hash
from model.encoder import EncoderStep, PreTrainedModel, UniSpeechSatModel
from model.heads import (
    TdnnState,
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForSequenceClassification,
    UniSpeechSatForXVector,
)
from model.state import EncoderState, Slots, Window


@dataclass
class PassState(Slots):
    """State of S streams: an encoder's each for the encoders that differ, and the TDNN's."""

    encoders: list[EncoderState]
    tdnn: list[TdnnState]


@dataclass
class Pass:
    """What one step gives of all heads, C frames a row; None for a head that is not there.

    start:      [B] int64, index of the first frame in its stream; negative before it
    mask:       [B, C] bool, the frame exists
    reset:      [B] bool, the chunk held a non-finite sample and began a new stream
    activity:   [B, C, local speakers] logits
    voice:      [B, C, tdnn_dim[-1]]; output i is centred on frame start + i − voice_delay
    voice_mask: [B, C] bool, all frames the output sees exist
    ctc:        [B, C, V] logits
    labels:     [B, C, classifier_proj_size], projected frames of sequence classification
    """

    start: Tensor
    mask: Tensor
    reset: Tensor
    activity: Tensor | None = None
    voice: Tensor | None = None
    voice_mask: Tensor | None = None
    ctc: Tensor | None = None
    labels: Tensor | None = None


@dataclass
class _Group:
    """Heads that read one encoder."""

    encoder: UniSpeechSatModel
    heads: list[PreTrainedModel] = field(default_factory=list)


class StreamingModel:
    """One cached encoder pass for every set of heads with the same encoder.

    Args:
        models: head models, at most one of each kind, in evaluation mode from here on.
        window: chunk, look-ahead and left context.
        normalize: the checkpoints' ``do_normalize``, one for each model or one for all.

    Raises:
        ValueError: no model, two heads of one kind, frame rates that differ, or a model that is
            no head.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        window: Window,
        normalize: bool | Sequence[bool] = False,
    ) -> None:
        if not models:
            raise ValueError("expected at least one head model, got none")
        flags = [normalize] * len(models) if isinstance(normalize, bool) else list(normalize)
        self.window = window
        self.activity: UniSpeechSatForAudioFrameClassification | None = None
        self.voice: UniSpeechSatForXVector | None = None
        self.ctc: UniSpeechSatForCTC | None = None
        self.labels: UniSpeechSatForSequenceClassification | None = None
        groups: dict[tuple[str, bool], _Group] = {}
        for model, flag in zip(models, flags, strict=True):
            model.eval()
            self._place(model)
            encoder = model.encoder_model
            key = (_identity(encoder), flag)
            groups.setdefault(key, _Group(encoder)).heads.append(model)
        self._groups = list(groups.values())
        self._normalize = [flag for _, flag in groups]
        configs = [group.encoder.config for group in self._groups]
        if len({(c.inputs_to_logits_ratio, c.frame_delay) for c in configs}) > 1:
            found = [f"{c.inputs_to_logits_ratio}/{c.receptive_field}" for c in configs]
            raise ValueError(
                f"expected heads with one hop and receptive field, got {', '.join(found)} samples"
            )
        self.config = configs[0]

    def _place(self, model: PreTrainedModel) -> None:
        for name, kind in (
            ("activity", UniSpeechSatForAudioFrameClassification),
            ("voice", UniSpeechSatForXVector),
            ("ctc", UniSpeechSatForCTC),
            ("labels", UniSpeechSatForSequenceClassification),
        ):
            if isinstance(model, kind):
                if getattr(self, name) is not None:
                    raise ValueError(f"expected one head of a kind, got two {kind.__name__}")
                setattr(self, name, model)
                return
        raise ValueError(f"expected a model with a head, got {type(model).__name__}")

    @property
    def encoders(self) -> int:
        """Encoder passes a step takes."""
        return len(self._groups)

    @property
    def voice_delay(self) -> int:
        """Frames from the centre of a TDNN output's view to the frame it comes with."""
        return 0 if self.voice is None else self.voice.context // 2

    @property
    def chunk_samples(self) -> int:
        """Samples a step takes from each row."""
        return self.window.chunk * self.config.inputs_to_logits_ratio

    @property
    def lead(self) -> int:
        """Frames that are not yet out when their chunk of audio is in: look-ahead and delay."""
        return self.window.right + self.config.frame_delay

    def zeros(self, slots: int) -> PassState:
        """State of ``slots`` streams that have not begun."""
        return PassState(
            encoders=[
                group.encoder.zeros(slots, self.window, normalize=flag)
                for group, flag in zip(self._groups, self._normalize, strict=True)
            ],
            tdnn=[] if self.voice is None else [self.voice.zeros(slots)],
        )

    @torch.inference_mode()
    def step(
        self,
        chunk: Tensor,
        state: PassState,
        slots: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> Pass:
        """Feed every row's stream one chunk; see `UniSpeechSatModel.step`.

        chunk: [B, chunk_samples]; slots, valid: [B] int64 or None.
        """
        result: Pass | None = None
        for group, inner in zip(self._groups, state.encoders, strict=True):
            encoded = group.encoder.step(chunk, inner, slots, valid)
            if result is None:
                result = Pass(encoded.start, encoded.mask, encoded.reset)
            for head in group.heads:
                self._apply(head, encoded, state, slots, result)
        assert result is not None
        return result

    def _apply(
        self,
        head: PreTrainedModel,
        encoded: EncoderStep,
        state: PassState,
        slots: Tensor | None,
        result: Pass,
    ) -> None:
        if isinstance(head, UniSpeechSatForAudioFrameClassification):
            result.activity = head.of(encoded)
        elif isinstance(head, UniSpeechSatForCTC):
            result.ctc = head.of(encoded)
        elif isinstance(head, UniSpeechSatForSequenceClassification):
            result.labels = head.of(encoded)
        elif isinstance(head, UniSpeechSatForXVector):
            [tdnn] = state.tdnn
            if bool(encoded.reset.any()):  # a slot that begins anew forgets its TDNN frames as well
                rows = torch.arange(len(encoded.reset), device=encoded.reset.device)
                tdnn.reset((rows if slots is None else slots.to(rows.device))[encoded.reset])
            result.voice = head.step(encoded, tdnn, slots)
            frame = encoded.start.unsqueeze(1) + torch.arange(
                self.window.chunk, device=encoded.start.device
            )
            result.voice_mask = encoded.mask & (frame >= head.context)


def _identity(encoder: UniSpeechSatModel) -> str:
    """Two encoders with one identity compute the same: same weights, same reading of them."""
    config = encoder.config
    reading = (
        config.num_attention_heads,
        config.conv_stride,
        config.hidden_act,
        config.feat_extract_activation,
        config.do_stable_layer_norm,
        config.layer_norm_eps,
        config.num_conv_pos_embedding_groups,
        str(encoder.dtype),
    )
    return f"{content_hash(encoder.state_dict())}:{reading}"
