"""What the family does with frames: CTC, sequence and frame classification, x-vectors.

Every head splits its `forward` in two: run the encoder, then `of` (encoder outputs → the head's
own). A streaming step hands the same `of` an `EncoderStep`, which is why one encoder pass can
serve many heads.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import UniSpeechSatConfig
from model.encoder import Output, PreTrainedModel, UniSpeechSatModel
from model.linear import Linear
from model.state import Slots, Window, rows_for


@dataclass
class CausalLMOutput(Output):
    """CTC. loss: scalar; logits: [B, T, V]; hidden_states, attentions as the encoder's."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutput(Output):
    """One decision an utterance. loss: scalar; logits: [B, labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class TokenClassifierOutput(Output):
    """One decision a frame. loss: scalar; logits: [B, T, labels]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class XVectorOutput(Output):
    """Speaker embeddings. loss: scalar; logits, embeddings: [B, xvector_output_dim]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    embeddings: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Encoded(Protocol):
    """What a head reads: whole utterances' outputs and a step's both have it."""

    @property
    def last_hidden_state(self) -> Tensor: ...  # noqa: D102
    @property
    def hidden_states(self) -> tuple[Tensor, ...] | None: ...  # noqa: D102


class HeadModel(PreTrainedModel):
    """An encoder with a head on it, and softmax weights over its layers where the config asks."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        self.unispeech_sat = UniSpeechSatModel(config)
        self.layer_weights: nn.Parameter | None = None

    def _weigh_layers(self) -> None:
        if self.config.use_weighted_layer_sum:
            count = self.config.num_hidden_layers + 1
            self.layer_weights = nn.Parameter(torch.full((count,), 1 / count))

    def _init_head(self, *linears: nn.Linear) -> None:
        for linear in linears:
            self._init_linear(linear)

    def _encode(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None,
        output_attentions: bool | None,
        output_hidden_states: bool | None,
        head_mask: Tensor | Sequence[Tensor | None] | None,
        streaming: Window | None,
    ) -> tuple[Any, tuple[Tensor, ...] | None]:
        """Encoder outputs, and the hidden states the caller asked to be given as well."""
        wanted = self.config.output_hidden_states
        wanted = wanted if output_hidden_states is None else output_hidden_states
        outputs = self.unispeech_sat(
            input_values,
            attention_mask=attention_mask,
            output_attentions=output_attentions,
            output_hidden_states=wanted or self.layer_weights is not None,
            return_dict=True,
            head_mask=head_mask,
            streaming=streaming,
        )
        return outputs, outputs.hidden_states if wanted else None

    def mixed(self, encoded: Encoded) -> Tensor:
        """The layer mixture this head reads (arXiv 2105.01051, section 3). → [B, T, D]"""
        if self.layer_weights is None:
            return encoded.last_hidden_state
        assert encoded.hidden_states is not None
        weights = self.layer_weights.softmax(dim=-1)
        mixture = weights[0] * encoded.hidden_states[0]
        for weight, hidden in zip(weights[1:], encoded.hidden_states[1:], strict=True):
            mixture = mixture + weight * hidden
        return mixture

    def _result(self, output: Output, return_dict: bool | None) -> Any:
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


class UniSpeechSatForCTC(HeadModel):
    """Characters by connectionist temporal classification (Graves et al., 2006).

    Source: the published class of this name.
    """

    def __init__(self, config: UniSpeechSatConfig, target_lang: str | None = None) -> None:
        super().__init__(config)
        if config.vocab_size is None:
            raise ValueError("vocab_size: expected the number of CTC symbols, got null")
        if target_lang is not None and config.adapter_attn_dim is None:
            raise ValueError(
                f"target_lang: expected a config with adapter_attn_dim, got {target_lang!r} without"
            )
        self.target_lang = target_lang
        self.dropout = nn.Dropout(config.final_dropout)
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
        self._init_head(self.lm_head)

    def of(self, encoded: Encoded) -> Tensor:
        """Encoder outputs → logits [B, T, V]."""
        return self.lm_head(self.dropout(encoded.last_hidden_state))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        streaming: Window | None = None,
    ) -> Any:
        """As `UniSpeechSatModel.forward`; labels: [B, U] ids, negative ones are padding.

        Returns:
            `CausalLMOutput`, with the CTC loss when labels are given.

        Raises:
            ValueError: a label past the vocabulary.
        """
        config = self.config
        assert config.vocab_size is not None
        if labels is not None and int(labels.max()) >= config.vocab_size:
            raise ValueError(
                f"labels: expected ids below vocab_size ({config.vocab_size}), "
                f"got {int(labels.max())}"
            )
        outputs, states = self._encode(
            input_values,
            attention_mask,
            output_attentions,
            output_hidden_states,
            head_mask,
            streaming,
        )
        logits = self.of(outputs)
        loss = None if labels is None else self._loss(logits, input_values, attention_mask, labels)
        return self._result(CausalLMOutput(loss, logits, states, outputs.attentions), return_dict)

    def _loss(
        self, logits: Tensor, input_values: Tensor, attention_mask: Tensor | None, labels: Tensor
    ) -> Tensor:
        B, N = input_values.shape
        if attention_mask is None:
            samples = torch.full((B,), N, device=logits.device)
        else:
            samples = attention_mask.sum(dim=1).to(torch.int64)
        real = labels >= 0
        log_probs = logits.log_softmax(dim=-1, dtype=torch.float32).transpose(0, 1)
        with torch.backends.cudnn.flags(enabled=False):
            return F.ctc_loss(
                log_probs,
                labels.masked_select(real),
                self.config.frames(samples),
                real.sum(dim=1),
                blank=self.config.pad_token_id,
                reduction=self.config.ctc_loss_reduction,
                zero_infinity=self.config.ctc_zero_infinity,
            )

    def load_adapter(self, target_lang: str, path_or_id: str | Path | None = None) -> None:
        """Put another language's adapter and vocabulary head in place.

        ``path_or_id`` is where the model itself was loaded from unless given.
        """
        from model.checkpoint import load_adapter

        load_adapter(self, target_lang, path_or_id)
        self.target_lang = target_lang


class UniSpeechSatForSequenceClassification(HeadModel):
    """One label an utterance, from the mean over its frames.

    Source: the published class of this name.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        _refuse_adapter(config, "sequence classification")
        self._weigh_layers()
        self.projector = Linear(config.hidden_size, config.classifier_proj_size)
        self.classifier = nn.Linear(config.classifier_proj_size, config.num_labels)
        self._init_head(self.projector, self.classifier)

    def of(self, encoded: Encoded) -> Tensor:
        """Encoder outputs → projected frames [B, T, classifier_proj_size], to be averaged."""
        return self.projector(self.mixed(encoded))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        streaming: Window | None = None,
    ) -> Any:
        """As `UniSpeechSatModel.forward`; labels: [B] class indices.

        Returns:
            `SequenceClassifierOutput`, with the cross-entropy when labels are given.
        """
        outputs, states = self._encode(
            input_values,
            attention_mask,
            output_attentions,
            output_hidden_states,
            head_mask,
            streaming,
        )
        frames = self.of(outputs)
        if attention_mask is None:
            pooled = frames.mean(dim=1)
        else:
            exists = self.feature_attention_mask(frames.shape[1], attention_mask)
            pooled = (frames * exists.unsqueeze(2)).sum(dim=1) / exists.sum(dim=1, keepdim=True)
        logits = self.classifier(pooled)
        loss = None if labels is None else F.cross_entropy(logits, labels.flatten())
        return self._result(
            SequenceClassifierOutput(loss, logits, states, outputs.attentions), return_dict
        )


class UniSpeechSatForAudioFrameClassification(HeadModel):
    """Labels for every frame: which local speakers talk.

    Source: the published class of this name.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        _refuse_adapter(config, "audio frame classification")
        self._weigh_layers()
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self._init_head(self.classifier)

    def of(self, encoded: Encoded) -> Tensor:
        """Encoder outputs → logits [B, T, labels]."""
        return self.classifier(self.mixed(encoded))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        streaming: Window | None = None,
    ) -> Any:
        """As `UniSpeechSatModel.forward`; labels: [B, T, labels], one-hot.

        Returns:
            `TokenClassifierOutput`, with the cross-entropy when labels are given.
        """
        outputs, states = self._encode(
            input_values,
            attention_mask,
            output_attentions,
            output_hidden_states,
            head_mask,
            streaming,
        )
        logits = self.of(outputs)
        loss = None
        if labels is not None:
            K = self.config.num_labels
            loss = F.cross_entropy(logits.view(-1, K), labels.reshape(-1, K).argmax(dim=1))
        return self._result(
            TokenClassifierOutput(loss, logits, states, outputs.attentions), return_dict
        )


class AMSoftmaxLoss(nn.Module):
    """Additive-margin softmax (arXiv 1801.05599, equation 6) with scale 30 and margin 0.4."""

    def __init__(
        self, input_dim: int, num_labels: int, scale: float = 30.0, margin: float = 0.4
    ) -> None:
        super().__init__()
        self.scale = scale
        self.margin = margin
        self.weight = nn.Parameter(torch.randn(input_dim, num_labels))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """embeddings: [B, E], labels: [B] → scalar"""
        cosine = F.normalize(embeddings, dim=1) @ F.normalize(self.weight, dim=0)
        labels = labels.flatten()
        margin = self.margin * F.one_hot(labels, cosine.shape[1]).to(cosine.dtype)
        return F.cross_entropy(self.scale * (cosine - margin), labels)


class TDNNLayer(nn.Module):
    """A dilated convolution over frames, its weights kept as the published linear layer's."""

    def __init__(self, config: UniSpeechSatConfig, index: int) -> None:
        super().__init__()
        self.in_dim = config.tdnn_dim[max(index - 1, 0)]
        self.out_dim = config.tdnn_dim[index]
        self.kernel_size = config.tdnn_kernel[index]
        self.dilation = config.tdnn_dilation[index]
        self.kernel = nn.Linear(self.in_dim * self.kernel_size, self.out_dim)

    @property
    def context(self) -> int:
        """Frames an output sees before its own."""
        return (self.kernel_size - 1) * self.dilation

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, C] → [B, T − context, out_dim]"""
        weight = self.kernel.weight.view(self.out_dim, self.kernel_size, self.in_dim).transpose(
            1, 2
        )
        x = F.conv1d(x.transpose(1, 2), weight, self.kernel.bias, dilation=self.dilation)
        return F.relu(x).transpose(1, 2)


@dataclass
class TdnnState(Slots):
    """What the TDNN remembers: past: [S, context, channels] a layer."""

    past: list[Tensor]


@dataclass
class VoiceMoments(Slots):
    """Running weighted moments of TDNN outputs, a set for each of K local speakers.

    Statistics pooling over a whole stream needs only these; `UniSpeechSatForXVector.embed` turns
    them into embeddings at any moment.

    mass: [S, K]; first, second: [S, K, C]
    """

    mass: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def zeros(
        cls, slots: int, speakers: int, channels: int, device: torch.device | None = None
    ) -> "VoiceMoments":
        """Moments of nobody having spoken. Kept in float64: an hour is 180,000 frames."""
        options: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(
            torch.zeros(slots, speakers, **options),
            torch.zeros(slots, speakers, channels, **options),
            torch.zeros(slots, speakers, channels, **options),
        )

    def step(self, voice: Tensor, weight: Tensor, slots: Tensor | None = None) -> None:
        """Add frames. voice: [B, T, C]; weight: [B, T, K], 0 for a frame that does not exist."""
        voice, weight = voice.double(), weight.double().transpose(1, 2)
        rows = rows_for(slots, len(voice), self.slots)
        self.mass[rows] += weight.sum(dim=2)
        self.first[rows] += weight @ voice
        self.second[rows] += weight @ voice.square()


class UniSpeechSatForXVector(HeadModel):
    """Speaker embeddings: TDNN, statistics pooling, linear layer (x-vector, Snyder et al., 2018).

    Source: the published class of this name.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        self._weigh_layers()
        self.projector = Linear(config.hidden_size, config.tdnn_dim[0])
        self.tdnn = nn.ModuleList(TDNNLayer(config, i) for i in range(len(config.tdnn_dim)))
        self.feature_extractor = nn.Linear(config.tdnn_dim[-1] * 2, config.xvector_output_dim)
        self.classifier = nn.Linear(config.xvector_output_dim, config.xvector_output_dim)
        self.objective = AMSoftmaxLoss(config.xvector_output_dim, config.num_labels)
        self._init_head(self.projector, self.feature_extractor, self.classifier)
        self._init_head(*(layer.kernel for layer in self._tdnn()))

    def _tdnn(self) -> list[TDNNLayer]:
        return [layer for layer in self.tdnn if isinstance(layer, TDNNLayer)]

    @property
    def context(self) -> int:
        """Frames by which the TDNN's output is shorter than its input."""
        return sum(layer.context for layer in self._tdnn())

    def of(self, encoded: Encoded) -> Tensor:
        """Encoder outputs → TDNN outputs [B, T − context, C], before pooling."""
        x = self.projector(self.mixed(encoded))
        for layer in self.tdnn:
            x = layer(x)
        return x

    def zeros(self, slots: int) -> TdnnState:
        """State of the TDNN for streams that have not begun."""
        return TdnnState(
            [
                torch.zeros(slots, t.context, t.in_dim, device=self.device, dtype=self.dtype)
                for t in self._tdnn()
            ]
        )

    @torch.no_grad()
    def step(self, encoded: Encoded, state: TdnnState, slots: Tensor | None = None) -> Tensor:
        """Encoder frames of one step → TDNN outputs [B, C, channels], one a frame.

        Output i sees frame i and the ``context`` frames before it; it means nothing where those
        do not all exist.
        """
        x = self.projector(self.mixed(encoded))
        rows = rows_for(slots, len(x), state.slots)
        for layer, past in zip(self.tdnn, state.past, strict=True):
            x = torch.cat([past[rows], x], dim=1)
            past[rows] = x[:, x.shape[1] - past.shape[1] :]
            x = layer(x)
        return x

    def embed(self, mass: Tensor, first: Tensor, second: Tensor) -> Tensor:
        """Moments of TDNN outputs → embeddings: mean and unbiased deviation, then linear.

        mass: […], first, second: […, C] → […, xvector_output_dim]. With weights of one this is
        the published pooling of the same frames.
        """
        n = mass.double().unsqueeze(-1)
        mean = first.double() / n.clamp(min=1e-6)
        spread = (second.double() - n * mean.square()) / (n - 1).clamp(min=1e-6)
        deviation = spread.clamp(min=0).sqrt()
        pooled = torch.cat([mean, deviation], dim=-1)
        return self.feature_extractor(pooled.to(self.feature_extractor.weight.dtype))

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        labels: Tensor | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        streaming: Window | None = None,
    ) -> Any:
        """As `UniSpeechSatModel.forward`; labels: [B] speaker indices.

        Returns:
            `XVectorOutput`, with the additive-margin loss of the logits when labels are given.
        """
        outputs, states = self._encode(
            input_values,
            attention_mask,
            output_attentions,
            output_hidden_states,
            head_mask,
            streaming,
        )
        voice = self.of(outputs)
        if attention_mask is None:
            pooled = torch.cat([voice.mean(dim=1), voice.std(dim=1)], dim=-1)
        else:
            samples = attention_mask.sum(dim=1).to(torch.int64)
            lengths: list[int] = self._pooled_frames(self.config.frames(samples)).tolist()
            rows = [row[:n] for row, n in zip(voice, lengths, strict=True)]
            pooled = torch.stack([torch.cat([row.mean(dim=0), row.std(dim=0)]) for row in rows])
        embeddings = self.feature_extractor(pooled)
        logits = self.classifier(embeddings)
        loss = None if labels is None else self.objective(logits, labels)
        return self._result(
            XVectorOutput(loss, logits, embeddings, states, outputs.attentions), return_dict
        )

    def _pooled_frames(self, frames: Tensor) -> Tensor:
        """Frames of a padded row that are pooled: the published count leaves out the dilation."""
        for kernel in self.config.tdnn_kernel:
            frames = frames - (kernel - 1)
        return frames


def _refuse_adapter(config: UniSpeechSatConfig, task: str) -> None:
    if config.add_adapter:
        raise ValueError(f"add_adapter: expected false for {task}, got true")
