"""`UniSpeechSatModel`: one encoder, run over whole utterances or step by step over live streams."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from model.attention import Attention
from model.config import UniSpeechSatConfig
from model.features import (
    FeatureEncoder,
    FeatureProjection,
    activation,
    carries,
    normalize_step,
)
from model.linear import Linear
from model.masking import compute_mask_indices
from model.position import PositionalConvEmbedding
from model.state import (
    EncoderState,
    Rows,
    RunningMoments,
    Window,
    ring_positions,
    rows_for,
)


class Output:
    """Mixin of output dataclasses: fields by name, by index, or unpacked, as published ones are."""

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are not None, in order."""
        values = [getattr(self, field.name) for field in fields(self)]  # type: ignore[arg-type]
        return tuple(value for value in values if value is not None)

    def __getitem__(self, key: str | int | slice) -> Any:
        return getattr(self, key) if isinstance(key, str) else self.to_tuple()[key]

    def keys(self) -> list[str]:
        """Names of the fields that are not None."""
        names = [field.name for field in fields(self)]  # type: ignore[arg-type]
        return [name for name in names if getattr(self, name) is not None]


@dataclass
class UniSpeechSatBaseModelOutput(Output):
    """What the encoder gives for whole utterances.

    last_hidden_state: [B, T, D]
    extract_features:  [B, T, C], normalised output of the front end
    hidden_states:     L + 1 of [B, T, D]: the input of the first layer, then every layer's output
    attentions:        L of [B, H, T, T]
    """

    last_hidden_state: Tensor
    extract_features: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class EncoderStep:
    """What one step gives: C frames a row.

    last_hidden_state: [B, C, D]
    hidden_states:     L + 1 of [B, C, D]
    start:             [B] int64, index of the first frame in its stream; negative before it
    mask:              [B, C] bool, True where the frame exists
    reset:             [B] bool, True where the chunk held a non-finite sample: it was taken as
                       silence and the slot begins a new stream with it
    """

    last_hidden_state: Tensor
    hidden_states: tuple[Tensor, ...]
    start: Tensor
    mask: Tensor
    reset: Tensor


class PreTrainedModel(nn.Module):
    """Base of the family: a config, and checkpoints in the published format."""

    base_model_prefix: ClassVar[str] = "unispeech_sat"

    source: str | Path | None = None
    """Where the weights were loaded from: a language's adapter is looked for there."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.config = config
        self.source: str | Path | None = None
        """Where it was loaded from: its language adapters lie there, too."""

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        *,
        attn_implementation: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **config_overrides: Any,
    ) -> Self:
        """Load a published checkpoint: a local folder or file, or a hub id.

        Raises:
            ValueError: another architecture, a broken file, or a missing, extra or mis-shaped
                tensor, each named.
        """
        from model.checkpoint import load_model

        if attn_implementation is not None:
            config_overrides["attn_implementation"] = attn_implementation
        return load_model(cls, path_or_id, dtype=dtype, device=device, **config_overrides)

    def save_pretrained(
        self, folder: str | Path, *, max_shard_size: int | str | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``, in shards if it is larger."""
        from model.checkpoint import save_model

        save_model(self, folder, max_shard_size=max_shard_size)

    @property
    def encoder_model(self) -> "UniSpeechSatModel":
        """The encoder of a head model, or the bare model itself."""
        model = getattr(self, self.base_model_prefix, self)
        assert isinstance(model, UniSpeechSatModel)
        return model

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return next(self.parameters()).dtype

    def freeze_feature_encoder(self) -> None:
        """Keep the convolutional front end as it is during training."""
        self.encoder_model.feature_extractor.requires_grad_(False)

    def freeze_base_model(self) -> None:
        """Train the head alone."""
        self.encoder_model.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Published initialisation (``UniSpeechSatPreTrainedModel._init_weights``)."""
        if self.device.type == "meta":  # to be loaded: there is nothing to fill
            return
        for module in self.modules():
            self._init_module(module)

    def _init_module(self, module: nn.Module) -> None:
        if isinstance(module, PositionalConvEmbedding):
            module.init_weights()
        elif isinstance(module, FeatureProjection):
            bound = math.sqrt(1 / module.projection.in_features)
            nn.init.uniform_(module.projection.weight, -bound, bound)
            nn.init.uniform_(module.projection.bias, -bound, bound)
        elif isinstance(module, FeatureEncoder):
            for conv in (m for m in module.modules() if isinstance(m, nn.Conv1d)):
                nn.init.kaiming_normal_(conv.weight)
                if conv.bias is not None:
                    bound = math.sqrt(conv.groups / (conv.in_channels * conv.kernel_size[0]))
                    nn.init.uniform_(conv.bias, -bound, bound)
        elif isinstance(module, Attention | FeedForward | AdapterLayer):
            for linear in (m for m in module.modules() if isinstance(m, nn.Linear)):
                self._init_linear(linear)

    def _init_linear(self, linear: nn.Linear) -> None:
        if linear.weight.is_meta:
            return
        nn.init.normal_(linear.weight, std=self.config.initializer_range)
        nn.init.zeros_(linear.bias)

    def feature_attention_mask(self, frames: int, attention_mask: Tensor) -> Tensor:
        """Sample mask → frame mask, right-padded. attention_mask: [B, N] → [B, frames] bool"""
        lengths = self.config.frames(attention_mask.sum(dim=1).to(torch.int64))
        return torch.arange(frames, device=lengths.device) < lengths.unsqueeze(1)


class FeedForward(nn.Module):
    """Source: ``UniSpeechSatFeedForward``."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.intermediate_dropout = nn.Dropout(config.activation_dropout)
        self.intermediate_dense = Linear(config.hidden_size, config.intermediate_size)
        self.gelu = config.hidden_act == "gelu"  # computed with the product, where it can be
        self.activation = nn.Identity() if self.gelu else activation(config.hidden_act)
        self.output_dense = Linear(config.intermediate_size, config.hidden_size)
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D] → [B, T, D]"""
        x = self.intermediate_dropout(self.activation(self.intermediate_dense(x, gelu=self.gelu)))
        return self.output_dropout(self.output_dense(x))


class AdapterLayer(nn.Module):
    """A language's bottleneck after a layer. Source: ``UniSpeechSatAttnAdapterLayer``."""

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        assert config.adapter_attn_dim is not None
        self.norm = nn.LayerNorm(config.hidden_size)
        self.linear_1 = nn.Linear(config.hidden_size, config.adapter_attn_dim)
        self.act_fn = nn.ReLU()
        self.linear_2 = nn.Linear(config.adapter_attn_dim, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, T, D] → [B, T, D]"""
        return self.linear_2(self.act_fn(self.linear_1(self.norm(x))))


class EncoderLayer(nn.Module):
    """One Transformer layer, norms after (Base) or before (Large, "stable") its two halves.

    Source: ``UniSpeechSatEncoderLayer`` and ``UniSpeechSatEncoderLayerStableLayerNorm``.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.stable = config.do_stable_layer_norm
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.feed_forward = FeedForward(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        adapted = self.stable and config.adapter_attn_dim is not None
        self.adapter_layer = AdapterLayer(config) if adapted else None

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        cache: tuple[Tensor, Tensor] | None = None,
        queries: int | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """x: [B, T, D] → [B, Q, D], attention or None; see `Attention.forward`."""
        inner = self.layer_norm(x) if self.stable else x
        attended, weights = self.attention(
            inner, mask, head_mask, cache, queries, output_attentions
        )
        x = x[:, :queries]
        x = x + self.dropout(attended)
        if self.stable:
            x = x + self.feed_forward(self.final_layer_norm(x))
            if self.adapter_layer is not None:
                x = x + self.adapter_layer(x)
        else:
            x = self.layer_norm(x)
            x = self.final_layer_norm(x + self.feed_forward(x))
        return x, weights


class Encoder(nn.Module):
    """Position embedding and Transformer layers.

    Source: ``UniSpeechSatEncoder`` and ``UniSpeechSatEncoderStableLayerNorm``.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__()
        self.config = config
        self.pos_conv_embed = PositionalConvEmbedding(config)
        self.layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False

    def embed(self, x: Tensor, position: Tensor) -> Tensor:
        """Input of the first layer. x, position: [B, T, D] → [B, T, D]"""
        x = x + position
        return self.dropout(x if self.config.do_stable_layer_norm else self.layer_norm(x))

    def finish(self, x: Tensor) -> Tensor:
        """Output of the last layer → last hidden state. [B, T, D] → [B, T, D]"""
        return self.layer_norm(x) if self.config.do_stable_layer_norm else x

    def run(
        self,
        x: Tensor,
        mask: Tensor | None,
        head_mask: Sequence[Tensor | None],
        output_attentions: bool,
        output_hidden_states: bool,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """All layers. x: [B, T, D] → L + 1 hidden states or the last alone, and attentions."""
        hidden, attentions = [x], list[Tensor]()
        for layer, heads in zip(self.layers, head_mask, strict=True):
            # LayerDrop (arXiv 1909.11556): a dropped layer passes its input on
            drop = self.training and self.config.layerdrop > 0
            if drop and torch.rand(()).item() < self.config.layerdrop:
                hidden.append(x)
                continue
            if not output_hidden_states:
                hidden.clear()  # memory that the next layer may use again, still in the cache
            if self.gradient_checkpointing and self.training:
                x, weights = torch.utils.checkpoint.checkpoint(
                    layer, x, mask, heads, None, None, output_attentions, use_reentrant=False
                )
            else:
                x, weights = layer(x, mask, heads, output_attentions=output_attentions)
            hidden.append(x)
            if weights is not None:
                attentions.append(weights)
        return hidden, attentions


class UniSpeechSatModel(PreTrainedModel):
    """The encoder without a head.

    `forward` takes whole utterances, as published, and with ``streaming`` computes for every
    frame just what `step` would have, in one pass: training sees the mask that inference has.
    """

    def __init__(self, config: UniSpeechSatConfig) -> None:
        super().__init__(config)
        self.feature_extractor = FeatureEncoder(config)
        self.feature_projection = FeatureProjection(config)
        self.masked_spec_embed = nn.Parameter(torch.empty(config.hidden_size).uniform_())
        self.encoder = Encoder(config)
        self.init_weights()

    def forward(
        self,
        input_values: Tensor,
        attention_mask: Tensor | None = None,
        mask_time_indices: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        head_mask: Tensor | Sequence[Tensor | None] | None = None,
        streaming: Window | None = None,
    ) -> Any:
        """Encode whole utterances.

        Args:
            input_values: [B, N] samples at 16 kHz, prepared by the feature extractor.
            attention_mask: [B, N], 1 for a sample, 0 for right padding.
            mask_time_indices: [B, T] bool, frames replaced by the learnt mask embedding.
            output_attentions: also return the attention matrices (eager).
            output_hidden_states: also return every layer's output.
            return_dict: False for a plain tuple.
            head_mask: [L, H] (or [H] for all layers): the factor of each head's output.
            streaming: see only what a stream with this window would have seen. Attentions are
                not returned.

        Returns:
            `UniSpeechSatBaseModelOutput`, or its fields as a tuple.

        Raises:
            ValueError: not a [B, N] batch, or shorter than one frame.
        """
        config = self.config
        if input_values.dim() != 2:
            raise ValueError(f"input_values: expected [B, N], got {tuple(input_values.shape)}")
        if config.frames(input_values.shape[1]) == 0:
            raise ValueError(
                f"input_values: expected at least {config.receptive_field} samples, "
                f"got {input_values.shape[1]}"
            )
        wants_states = _chosen(output_hidden_states, config.output_hidden_states)
        wants_attentions = _chosen(output_attentions, config.output_attentions)
        features = self.feature_extractor(input_values, streaming).transpose(1, 2)
        T = features.shape[1]
        exists = None
        if attention_mask is not None:
            exists = self.feature_attention_mask(T, attention_mask)
        x, normed = self.feature_projection(features)
        x = self._spec_augment(x, mask_time_indices, exists)
        if exists is not None:
            x = torch.where(exists.unsqueeze(2), x, torch.zeros_like(x))
        heads = head_masks(head_mask, config)
        if streaming is None:
            x = self.encoder.embed(x, self.encoder.pos_conv_embed(x))
            keys = None if exists is None else exists[:, None, None, :]
            hidden, attentions = self.encoder.run(x, keys, heads, wants_attentions, wants_states)
        else:
            hidden, attentions = (
                self._run_streaming(x, exists, streaming, heads, wants_states),
                [],
            )
        output = UniSpeechSatBaseModelOutput(
            last_hidden_state=self.encoder.finish(hidden[-1]),
            extract_features=normed,
            hidden_states=tuple(hidden) if wants_states else None,
            attentions=tuple(attentions) if attentions else None,
        )
        return output if _chosen(return_dict, config.return_dict) else output.to_tuple()

    def _spec_augment(self, x: Tensor, indices: Tensor | None, exists: Tensor | None) -> Tensor:
        """SpecAugment (arXiv 1904.08779) on projected frames. x: [B, T, D] → [B, T, D]"""
        config = self.config
        if not config.apply_spec_augment:
            return x
        B, T, D = x.shape
        if indices is None and config.mask_time_prob > 0 and self.training:
            indices = compute_mask_indices(
                (B, T),
                config.mask_time_prob,
                config.mask_time_length,
                attention_mask=exists,
                min_masks=config.mask_time_min_masks,
            )
        if indices is not None:
            indices = indices.to(x.device, torch.bool)
            x = torch.where(indices.unsqueeze(2), self.masked_spec_embed.to(x.dtype), x)
        if config.mask_feature_prob > 0 and self.training:
            dropped = compute_mask_indices(
                (B, D),
                config.mask_feature_prob,
                config.mask_feature_length,
                min_masks=config.mask_feature_min_masks,
            )
            x = x.masked_fill(dropped.to(x.device).unsqueeze(1), 0)
        return x

    def _run_streaming(
        self,
        x: Tensor,
        exists: Tensor | None,
        window: Window,
        head_mask: list[Tensor | None],
        output_hidden_states: bool,
    ) -> list[Tensor]:
        """All chunks of a stream at once: each has its own copy of its look-ahead frames.

        x: [B, T, D] → L + 1 of [B, T, D], or the last alone
        """
        B, T, D = x.shape
        C, R, L = window.chunk, window.right, window.left
        history = self.encoder.pos_conv_embed.history
        lead = R + self.config.frame_delay  # frames of chunk 0 that precede the stream
        N = -(-(T + lead) // C)
        first = torch.arange(N, device=x.device) * C - lead
        frame = first.unsqueeze(1) + torch.arange(-history, C + R, device=x.device)  # [N, h + W]
        inside = (frame >= 0) & (frame < T)
        windows = x[:, frame.clamp(0, T - 1)] * inside.unsqueeze(2)  # [B, N, h + W, D]
        position = self.encoder.pos_conv_embed.window(windows.flatten(0, 1))
        tokens = windows[:, :, history:].reshape(B, N * (C + R), D)
        tokens = self.encoder.embed(tokens, position.reshape(B, N * (C + R), D))

        frame = frame[:, history:].flatten()  # [N · W]
        chunk = torch.arange(N, device=x.device).repeat_interleave(C + R)
        cached = (torch.arange(C + R, device=x.device) < C).repeat(N)
        own = chunk.unsqueeze(1) == chunk
        earlier = cached & (frame < first[chunk].unsqueeze(1))
        seen = own | (earlier & (frame >= (first[chunk] - L).unsqueeze(1)))  # [query, key]
        keys = inside[:, history:].flatten().expand(B, -1)
        if exists is not None:
            keys = keys & exists[:, frame.clamp(0, T - 1)]
        mask = seen & keys[:, None, None, :]
        hidden, _ = self.encoder.run(tokens, mask, head_mask, False, output_hidden_states)
        return [
            h.view(B, N, C + R, D)[:, :, :C].reshape(B, N * C, D)[:, lead : lead + T]
            for h in hidden
        ]

    def zeros(self, slots: int, window: Window, normalize: bool = False) -> EncoderState:
        """State of ``slots`` streams that have not begun, on the model's device.

        Args:
            slots: how many streams there is room for.
            window: chunk, look-ahead and left context.
            normalize: the checkpoint's ``do_normalize``: track each stream's level.
        """
        config, device, dtype = self.config, self.device, self.dtype
        if slots < 1:
            raise ValueError(f"slots: expected at least 1, got {slots}")
        inputs = (1, *config.conv_dim[:-1])
        heads, width = config.num_attention_heads, config.hidden_size
        ring = (slots, window.left + window.chunk + window.right, heads, width // heads)
        grouped = config.feat_extract_norm == "group"
        frames = self.encoder.pos_conv_embed.history + window.right
        return EncoderState(
            received=torch.zeros(slots, dtype=torch.int64, device=device),
            steps=torch.zeros(slots, dtype=torch.int64, device=device),
            wave=RunningMoments.zeros(slots, 1, device),
            conv=[
                torch.zeros(slots, channels, carry, device=device, dtype=dtype)
                for channels, carry in zip(inputs, carries(config), strict=True)
            ],
            group=RunningMoments.zeros(slots, config.conv_dim[0] if grouped else 0, device),
            projected=torch.zeros(slots, frames, width, device=device, dtype=dtype),
            keys=[torch.zeros(ring, device=device, dtype=dtype) for _ in self.encoder.layers],
            values=[torch.zeros(ring, device=device, dtype=dtype) for _ in self.encoder.layers],
            window=window,
            normalize=normalize,
        )

    @torch.no_grad()
    def step(
        self,
        chunk: Tensor,
        state: EncoderState,
        slots: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> EncoderStep:
        """Feed one chunk to each row's stream and emit one chunk of frames.

        After n steps the frames before ``n · chunk − right − frame_delay`` are out. A stream ends
        with a chunk of fewer valid samples; steps of none then flush what is left.

        Args:
            chunk: [B, window.chunk · hop] samples; what lies past ``valid`` is not looked at.
            state: of all slots, updated in place.
            slots: [B] int64, the slot of each row; None feeds every slot in order.
            valid: [B] int64 samples of each row that exist; None is all.

        Raises:
            ValueError: a chunk of another length, or a slot unknown or given twice.
        """
        window, hop = state.window, self.config.inputs_to_logits_ratio
        N = window.chunk * hop
        if chunk.dim() != 2 or chunk.shape[1] != N:
            raise ValueError(f"chunk: expected [B, {N}], got {tuple(chunk.shape)}")
        B = chunk.shape[0]
        rows = rows_for(slots, B, state.slots)
        device = self.device
        if isinstance(rows, Tensor):
            rows = rows.to(device)
        chunk = chunk.to(device)
        valid = torch.full((B,), N, device=device) if valid is None else valid.to(device)
        exists = torch.arange(N, device=device) < valid.unsqueeze(1)

        finite = (chunk.isfinite() | ~exists).all(dim=1)
        if not bool(finite.all()):
            chunk = chunk.masked_fill(~finite.unsqueeze(1), 0)
            state.reset(torch.arange(state.slots, device=device)[rows][~finite])
        encoded = self._advance(chunk.masked_fill(~exists, 0), exists, state, rows, valid)
        encoded.reset = ~finite
        return encoded

    def _advance(
        self,
        chunk: Tensor,
        exists: Tensor,
        state: EncoderState,
        rows: Rows,
        valid: Tensor,
    ) -> EncoderStep:
        """`step` once its input is known to be good: no branch on a tensor's value from here on."""
        window, device = state.window, chunk.device
        total = state.received[rows] + valid
        if state.normalize:
            chunk = normalize_step(chunk, exists, state, rows)
        features = self.feature_extractor.step(chunk.to(self.dtype), state, total, rows)
        x, _ = self.feature_projection(features.transpose(1, 2))

        start = state.steps[rows] * window.chunk - window.right - self.config.frame_delay
        hidden = self._step_layers(x, state, start, self.config.frames(total), rows)
        state.received[rows] = total
        state.steps[rows] += 1
        frame = start.unsqueeze(1) + torch.arange(window.chunk, device=device)
        return EncoderStep(
            last_hidden_state=self.encoder.finish(hidden[-1]),
            hidden_states=tuple(hidden),
            start=start,
            mask=(frame >= 0) & (frame < self.config.frames(total).unsqueeze(1)),
            reset=torch.zeros_like(start, dtype=torch.bool),
        )

    def _step_layers(
        self, x: Tensor, state: EncoderState, start: Tensor, frames: Tensor, rows: Rows
    ) -> list[Tensor]:
        """New projected frames → the C emitted ones, at every layer. x: [B, C, D] → L + 1 of it

        start: [B] index of the first emitted frame; frames: [B] how many the stream has so far.
        """
        window, encoder = state.window, self.encoder
        C, L = window.chunk, window.left
        history = encoder.pos_conv_embed.history
        new = start.unsqueeze(1) + torch.arange(window.right, window.right + C, device=x.device)
        inside = (new >= 0) & (new < frames.unsqueeze(1))
        x = torch.where(inside.unsqueeze(2), x, torch.zeros_like(x))
        known = torch.cat([state.projected[rows], x], dim=1)  # [B, history + W, D]
        state.projected[rows] = known[:, C:]

        computed = start.unsqueeze(1) + torch.arange(C + window.right, device=x.device)
        cached = ring_positions(start, L)
        position = torch.cat([cached, computed], dim=1)
        mask = (position >= 0) & (position < frames.unsqueeze(1))
        x = encoder.embed(known[:, history:], encoder.pos_conv_embed.window(known))
        hidden = [x[:, :C]]
        written = min(C, L)  # of a chunk longer than the ring its end stays
        entry = computed[:, C - written : C] % max(L, 1)
        slot = torch.arange(state.slots, device=x.device)[rows].unsqueeze(1)
        last = len(encoder.layers) - 1
        for i, (layer, keys, values) in enumerate(
            zip(encoder.layers, state.keys, state.values, strict=True)
        ):
            cache = (keys[rows], values[rows])
            # nobody reads what the last layer makes of the look-ahead
            x, _ = layer(x, mask[:, None, None, :], None, cache, C if i == last else None)
            if written:
                new = slice(L + C - written, L + C)
                keys[slot, entry] = cache[0][:, new].clone()
                values[slot, entry] = cache[1][:, new].clone()
            hidden.append(x[:, :C])
        return hidden


def _chosen(argument: bool | None, default: bool) -> bool:
    return default if argument is None else argument


def head_masks(
    head_mask: Tensor | Sequence[Tensor | None] | None, config: UniSpeechSatConfig
) -> list[Tensor | None]:
    """One factor [H] a layer, from [H], [L, H], or a list of those with None for all ones.

    Raises:
        ValueError: another shape.
    """
    L, H = config.num_hidden_layers, config.num_attention_heads
    if head_mask is None:
        return [None] * L
    if isinstance(head_mask, Tensor):
        head_mask = [head_mask] * L if head_mask.dim() == 1 else list(head_mask)
    masks = list(head_mask)
    for mask in masks:
        if len(masks) != L or (mask is not None and mask.numel() not in (H,)):
            shape = [None if m is None else tuple(m.shape) for m in masks]
            raise ValueError(f"head_mask: expected [{L}, {H}] or [{H}], got {shape}")
    return [None if mask is None else mask.flatten() for mask in masks]
