"""The embedded checkpoint while it is trained: one encoder and three heads on it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from model.attention import Attention
from model.config import UniSpeechSatConfig
from model.encoder import UniSpeechSatModel
from model.features import ConvLayer
from model.heads import (
    UniSpeechSatForAudioFrameClassification,
    UniSpeechSatForCTC,
    UniSpeechSatForXVector,
)
from model.state import Window
from recipes.gabor import gabor_filters
from recipes.settings import Settings

VOCABULARY = ("<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ")
"""Characters of the CTC head, the published order; <pad> is the blank."""


class Shape(Settings):
    """Size of the encoder; the front end's hop is 320 samples.

    Attributes:
        layers: Transformer layers.
        width: their width.
        heads: attention heads.
        feed_forward: inner width.
        positions: taps of the position convolution.
        position_groups: its groups.
        tdnn: widths of the x-vector head's frame layers.
    """

    layers: int = 6
    width: int = 256
    heads: int = 4
    feed_forward: int = 768
    positions: int = 32
    position_groups: int = 16
    conv_dim: tuple[int, ...] = (320, 256)
    conv_kernel: tuple[int, ...] = (400, 3)
    conv_stride: tuple[int, ...] = (160, 2)
    tdnn: tuple[int, ...] = (256, 512)

    def config(self, **head: Any) -> UniSpeechSatConfig:
        """The published configuration of this encoder with the keys of one ``head`` added."""
        return UniSpeechSatConfig(
            hidden_size=self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            intermediate_size=self.feed_forward,
            conv_dim=self.conv_dim,
            conv_kernel=self.conv_kernel,
            conv_stride=self.conv_stride,
            conv_bias=False,
            feat_extract_norm="layer",
            do_stable_layer_norm=True,
            num_conv_pos_embeddings=self.positions,
            num_conv_pos_embedding_groups=self.position_groups,
            hidden_dropout=0.0,
            activation_dropout=0.0,
            attention_dropout=0.0,
            final_dropout=0.0,
            layerdrop=0.0,
            apply_spec_augment=False,
            attn_implementation="eager",  # on a CPU its backward pass beats SDPA's; never saved
            **head,
        )

    def heads_configs(self) -> dict[str, UniSpeechSatConfig]:
        """Configurations of the three checkpoints by folder name."""
        return {
            "diarization": self.config(
                use_weighted_layer_sum=True,
                id2label={i: f"SPEAKER_{i}" for i in range(3)},
                architectures=["UniSpeechSatForAudioFrameClassification"],
            ),
            "speaker": self.config(
                use_weighted_layer_sum=True,
                tdnn_dim=self.tdnn,
                tdnn_kernel=(1,) * len(self.tdnn),
                tdnn_dilation=(1,) * len(self.tdnn),
                xvector_output_dim=192,
                architectures=["UniSpeechSatForXVector"],
            ),
            "ctc": self.config(
                vocab_size=len(VOCABULARY),
                ctc_loss_reduction="mean",
                ctc_zero_infinity=True,
                architectures=["UniSpeechSatForCTC"],
            ),
        }


@dataclass(slots=True)
class Outputs:
    """What the student says of a batch, one row every 20 ms.

    Attributes:
        features: [B, T, C], the front end's normalised output.
        hidden: [B, T, D], the last layer's.
        activity: [B, T, 3] logits.
        voice: [B, T, 512], frame outputs of the x-vector head.
        characters: [B, T, 32] logits.
    """

    features: Tensor
    hidden: Tensor
    activity: Tensor
    voice: Tensor
    characters: Tensor


class Student(nn.Module):
    """Three published head models around one shared encoder."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        configs = shape.heads_configs()
        self.encoder = UniSpeechSatModel(shape.config())
        self.diarization = UniSpeechSatForAudioFrameClassification(configs["diarization"])
        self.speaker = UniSpeechSatForXVector(configs["speaker"])
        self.ctc = UniSpeechSatForCTC(configs["ctc"])
        for head in (self.diarization, self.speaker, self.ctc):
            head.unispeech_sat = self.encoder
        with torch.no_grad():
            self.first_filters.copy_(gabor_filters(shape.conv_dim[0], shape.conv_kernel[0]))
            self.ctc.lm_head.bias[0] = 4.0  # most frames are blank: spare the run learning so

        _stay_in_float32(self.first_layer.conv)

    @property
    def first_layer(self) -> ConvLayer:
        """The first convolution, its norm and its activation."""
        layer = self.encoder.feature_extractor.conv_layers[0]
        assert isinstance(layer, ConvLayer)
        return layer

    @property
    def first_filters(self) -> Tensor:
        """Weights of the first convolution: [320, 1, 400]."""
        return self.first_layer.conv.weight

    def drop(self, share: float) -> None:
        """Sets the dropout of every layer while training; masks of frames count from now on."""
        self.encoder.config.apply_spec_augment = True
        self.encoder.config.mask_time_prob = 0.0  # masks are given, not drawn
        for module in self.encoder.modules():
            if isinstance(module, nn.Dropout):
                module.p = share
            elif isinstance(module, Attention):
                module.dropout = share

    def forward(
        self, wave: Tensor, window: Window | None = None, masked: Tensor | None = None
    ) -> Outputs:
        """wave: [B, N] → outputs of T frames, as a stream with ``window`` would give them.

        masked: [B, T] bool, frames the layers do not see (see `drop`).
        """
        encoded = self.encoder(
            wave, output_hidden_states=True, streaming=window, mask_time_indices=masked
        )
        return Outputs(
            features=encoded.extract_features,
            hidden=encoded.last_hidden_state,
            activity=self.diarization.of(encoded),
            voice=self.speaker.of(encoded),
            characters=self.ctc.of(encoded),
        )

    def embed(self, voice: Tensor, mass: Tensor) -> Tensor:
        """Pools frames into embeddings.  voice: [P, T, 512], mass: [P, T] → [P, 192].

        ``mass`` is how much of a frame belongs to the speaker; each row's sum must be positive.
        """
        voice, n = voice.float(), mass.sum(1, keepdim=True)
        mean = torch.einsum("pt,ptc->pc", mass / n, voice)
        square = torch.einsum("pt,ptc->pc", mass / n, voice**2)
        variance = (square - mean**2) * n / (n - 1).clamp(min=1e-6)
        pooled = torch.cat([mean, (variance.clamp(min=0) + 1e-5).sqrt()], 1)
        with torch.autocast(pooled.device.type, enabled=False):
            return self.speaker.feature_extractor(pooled)


def _stay_in_float32(conv: nn.Conv1d) -> None:
    """Keeps a convolution out of autocast.

    Rounded to bfloat16, a waveform and its filters leak at −50 dB from the loud low bands into
    the high ones, which are no louder than that.
    """
    plain = conv.forward

    def forward(input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            if input.device.type != "cuda":
                return plain(input)
            # one channel and hundreds of taps: cuDNN is slow at it, and would round to TF32
            frames = input[:, 0].unfold(1, conv.kernel_size[0], conv.stride[0])
            return (frames @ conv.weight[:, 0].T).transpose(1, 2)

    conv.forward = forward
