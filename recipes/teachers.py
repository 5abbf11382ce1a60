"""The teachers of our training: CAM++ (voices), segmentation-3.0 (activity), Whisper (content).

All three are written here, inference only, straight from the tensors of the published files, and
run on any device.

Source: Wang et al., "CAM++: A Fast and Efficient Network for Speaker Verification Using
Context-Aware Masking" (Interspeech 2023), figures 1–2; weights of 3D-Speaker (Apache-2.0).
Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022); weights of
Whisper tiny.en (MIT).
"""

import math
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BLOCKS = ((12, 1), (24, 2), (16, 2))
"""Layers and dilation of each densely connected block (section 2.2)."""

SEGMENT = 100
"""Frames of one segment of the context-aware mask's pooling."""


CLASSES = ((), (0,), (1,), (2,), (0, 1), (0, 2), (1, 2))
"""Who talks in each of the segmentation teacher's classes (Plaquet & Bredin 2023, section 2)."""


def mel_filters(bins: int = 80, size: int = 512, rate: int = 16_000, low: float = 20.0) -> Tensor:
    """Kaldi's triangular filters, equally spaced on its mel scale.  → [size/2 + 1, bins]."""

    def mel(hertz: Tensor) -> Tensor:
        return 1127.0 * torch.log1p(hertz / 700.0)

    first, last = mel(torch.tensor([low, rate / 2])).tolist()
    edges = torch.linspace(first, last, bins + 2)
    position = mel(torch.arange(size // 2 + 1) * rate / size)[:, None]
    filters = _triangles(position, edges)
    filters[-1] = 0  # Kaldi leaves the Nyquist bin out
    return filters


def filterbank(wave: Tensor, filters: Tensor) -> Tensor:
    """Kaldi's log-mel energies, 25 ms Povey windows every 10 ms.  [N] → [(N − 400)/160 + 1, 80].

    Each channel's mean over the utterance is removed, as the teacher was trained.
    """
    frames = wave.unfold(-1, 400, 160)
    frames = frames - frames.mean(-1, keepdim=True)
    previous = torch.cat([frames[..., :1], frames[..., :-1]], -1)
    window = torch.hann_window(400, periodic=False, device=wave.device) ** 0.85
    spectrum = torch.fft.rfft((frames - 0.97 * previous) * window, 512).abs() ** 2
    energies = (spectrum @ filters).clamp(min=torch.finfo(torch.float32).eps).log()
    return energies - energies.mean(-2, keepdim=True)


class Campplus:
    """CAM++ as a function of its state dict, in evaluation mode."""

    def __init__(
        self, path: Path, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        state: dict[str, Tensor] = torch.load(path, map_location=device or "cpu", weights_only=True)
        state = {key: value.float() for key, value in state.items()}
        self.tensors: dict[str, Tensor] = {k: v.to(dtype) for k, v in state.items() if v.ndim > 1}
        self.norms = {
            key.removesuffix(".running_mean"): _affine(state, key.removesuffix(".running_mean"))
            for key in state
            if key.endswith(".running_mean")
        }
        self.state = {k: v.to(dtype) for k, v in state.items()}
        self.dtype = dtype
        self.filters = mel_filters().to(device)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        scale, shift = self.norms[name]
        view = (-1,) + (1,) * (x.ndim - 2)
        return x * scale.to(x.dtype).view(view) + shift.to(x.dtype).view(view)

    def _residual(self, x: Tensor, name: str, stride: int) -> Tensor:
        w = self.tensors
        y = F.conv2d(x, w[f"{name}.conv1.weight"], stride=(stride, 1), padding=1)
        y = F.relu(self._norm(y, f"{name}.bn1"))
        y = self._norm(F.conv2d(y, w[f"{name}.conv2.weight"], padding=1), f"{name}.bn2")
        if f"{name}.shortcut.0.weight" in w:
            x = F.conv2d(x, w[f"{name}.shortcut.0.weight"], stride=(stride, 1))
            x = self._norm(x, f"{name}.shortcut.1")
        return F.relu(x + y)

    def _front(self, x: Tensor) -> Tensor:
        """[B, 80, T] → [B, 320, T]: the two-dimensional head over frequency."""
        w = self.tensors
        x = F.relu(self._norm(F.conv2d(x[:, None], w["head.conv1.weight"], padding=1), "head.bn1"))
        for name, stride in (("1.0", 2), ("1.1", 1), ("2.0", 2), ("2.1", 1)):
            x = self._residual(x, f"head.layer{name}", stride)
        x = F.conv2d(x, w["head.conv2.weight"], stride=(2, 1), padding=1)
        return F.relu(self._norm(x, "head.bn2")).flatten(1, 2)

    def _masked(self, x: Tensor, name: str, dilation: int) -> Tensor:
        """One densely connected layer with its context-aware mask (equations 1–5)."""
        w = self.tensors
        x = F.relu(self._norm(x, f"{name}.nonlinear1.batchnorm"))
        x = F.conv1d(x, w[f"{name}.linear1.weight"])
        x = F.relu(self._norm(x, f"{name}.nonlinear2.batchnorm"))
        mask = f"{name}.cam_layer"
        y = F.conv1d(x, w[f"{mask}.linear_local.weight"], padding=dilation, dilation=dilation)
        segment = F.avg_pool1d(x, SEGMENT, SEGMENT, ceil_mode=True)
        segment = segment.repeat_interleave(SEGMENT, -1)[..., : x.shape[-1]]
        context = x.mean(-1, keepdim=True) + segment
        hidden = F.relu(
            F.conv1d(context, w[f"{mask}.linear1.weight"], self.state[f"{mask}.linear1.bias"])
        )
        gate = F.conv1d(hidden, w[f"{mask}.linear2.weight"], self.state[f"{mask}.linear2.bias"])
        return y * gate.sigmoid()

    @torch.inference_mode()
    def voice(self, wave: Tensor) -> Tensor:
        """[N] samples in ±1 → [T, 512]: the channels before pooling, one row every 20 ms.

        Row t is centred on sample 320 t + 200.
        """
        return self.voices(wave[None])[0]

    @torch.inference_mode()
    def voices(self, waves: Tensor) -> Tensor:
        """Recordings of one length.  [B, N] → [B, T, 512]"""
        w = self.tensors
        x = filterbank(waves, self.filters).transpose(1, 2).to(self.dtype)
        x = self._front(x)
        x = F.conv1d(x, w["xvector.tdnn.linear.weight"], stride=2, padding=2)
        x = F.relu(self._norm(x, "xvector.tdnn.nonlinear.batchnorm"))
        for block, (layers, dilation) in enumerate(BLOCKS, start=1):
            for layer in range(1, layers + 1):
                name = f"xvector.block{block}.tdnnd{layer}"
                x = torch.cat([x, self._masked(x, name, dilation)], 1)
            transit = f"xvector.transit{block}"
            x = F.relu(self._norm(x, f"{transit}.nonlinear.batchnorm"))
            x = F.conv1d(x, w[f"{transit}.linear.weight"])
        return F.relu(self._norm(x, "xvector.out_nonlinear.batchnorm")).transpose(1, 2).float()

    @torch.inference_mode()
    def embed(self, voice: Tensor, weight: Tensor | None = None) -> Tensor:
        """[T, 512] → [192]: mean and deviation over time, one dense layer.

        weight: [T], what each row counts in both; None is all the same.
        """
        if weight is None:
            return self.embeds(voice[None])[0]
        total = weight.sum()
        mean = weight @ voice / total
        freedom = total - (weight**2).sum() / total
        pooled = torch.cat([mean, (weight @ (voice - mean) ** 2 / freedom).sqrt()])
        return self._dense(pooled[None])[0]

    @torch.inference_mode()
    def embeds(self, voices: Tensor) -> Tensor:
        """[B, T, 512] → [B, 192]"""
        return self._dense(torch.cat([voices.mean(1), voices.std(1)], 1))

    def _dense(self, pooled: Tensor) -> Tensor:
        weight = self.tensors["xvector.dense.linear.weight"][..., 0].float()
        return self._norm(pooled @ weight.T, "xvector.dense.nonlinear.batchnorm")


class StandIn:
    """In `Campplus`'s place where its weights are not at hand: a fixed projection of energies.

    It knows a voice by its spectrum, which is enough to see that the recipes run.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        generator = torch.Generator().manual_seed(0)
        self.filters = mel_filters().to(device)
        self.project = (torch.randn(80, 512, generator=generator) / 80**0.5).to(device)
        self.dense = (torch.randn(1024, 192, generator=generator) / 1024**0.5).to(device)

    def voices(self, waves: Tensor) -> Tensor:
        """As `Campplus.voices`."""
        energies = filterbank(waves, self.filters)
        energies = energies[:, : energies.shape[1] // 2 * 2].unflatten(1, (-1, 2)).mean(2)
        return F.relu(energies @ self.project)

    def embeds(self, voices: Tensor) -> Tensor:
        """As `Campplus.embeds`."""
        return torch.cat([voices.mean(1), voices.std(1)], 1) @ self.dense


class Segmentation:
    """segmentation-3.0 as a function of its state dict: who of three local speakers talks.

    Source: Plaquet & Bredin, "Powerset multi-class cross entropy loss for neural speaker
    diarization" (Interspeech 2023); Ravanelli & Bengio, "Speaker recognition from raw waveform with
    SincNet" (SLT 2018), equations 2–8; weights of pyannote (MIT).

    Attributes:
        samples: as many as it was trained to hear at a time.
    """

    samples = 160_000

    def __init__(self, path: Path, device: torch.device | None = None) -> None:
        self.state: dict[str, Tensor] = torch.load(
            path, map_location=device or "cpu", weights_only=True
        )["state_dict"]
        self.filters = self._sinc()
        self.lstm = torch.nn.LSTM(60, 128, 4, bidirectional=True, batch_first=True)
        prefix = "lstm."
        self.lstm.load_state_dict(
            {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
        )
        self.lstm.to(device)
        self.members = torch.zeros(len(CLASSES), 3, device=device)
        for row, talking in enumerate(CLASSES):
            self.members[row, list(talking)] = 1

    def _sinc(self) -> Tensor:
        """Forty band-pass filters and their quadratures.  → [80, 1, 251]"""
        bank = "sincnet.conv1d.0.filterbank."
        time, window = self.state[bank + "n_"], self.state[bank + "window_"]
        low = 50 + self.state[bank + "low_hz_"].abs()
        high = (low + 50 + self.state[bank + "band_hz_"].abs()).clamp(50, 8000)
        width = 2 * (high - low)
        even = ((high * time).sin() - (low * time).sin()) / (time / 2) * window
        odd = ((low * time).cos() - (high * time).cos()) / (time / 2) * window
        cosine = torch.cat([even, width, even.flip(1)], 1) / width
        sine = torch.cat([odd, torch.zeros_like(width), -odd.flip(1)], 1) / width
        return torch.cat([cosine, sine])[:, None]

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.instance_norm(
            x, weight=self.state[f"{name}.weight"], bias=self.state[f"{name}.bias"]
        )

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    @torch.inference_mode()
    def logits(self, wave: Tensor) -> Tensor:
        """[B, N] samples in ±1 → [B, T, 7]; row k is centred on sample 270 k + 495."""
        x = self._norm(wave[:, None], "sincnet.wav_norm1d")
        x = F.conv1d(x, self.filters, stride=10).abs()
        for layer in range(3):
            if layer:
                name = f"sincnet.conv1d.{layer}"
                x = F.conv1d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"])
            x = F.leaky_relu(self._norm(F.max_pool1d(x, 3), f"sincnet.norm1d.{layer}"))
        x, _ = self.lstm(x.transpose(1, 2))
        for layer in range(2):
            x = F.leaky_relu(self._linear(x, f"linear.{layer}"))
        return self._linear(x, "classifier")

    def activity(self, wave: Tensor, frames: int) -> Tensor:
        """[B, N] samples of ten seconds or less → [B, frames, 3] probabilities.

        Row t is centred on sample 320 t + 360, as the student's.
        """
        with torch.autocast(wave.device.type, enabled=False):  # a teacher's word is exact
            known = self.logits(wave).softmax(-1) @ self.members
        at = ((320 * torch.arange(frames, device=wave.device) + 360 - 495) / 270).clamp(
            0, known.shape[1] - 1.001
        )
        left = at.long()
        share = (at - left)[:, None]
        return known[:, left].lerp(known[:, left + 1], share)


class WhisperEncoder:
    """The encoder of a Whisper model in CTranslate2's format, 30 s at a time.

    Attributes:
        hops: what one window holds.
    """

    hops = 1500

    def __init__(self, folder: Path, device: torch.device | None = None) -> None:
        self.state = {
            name.removeprefix("encoder/"): tensor.to(device)
            for name, tensor in read_ctranslate2(folder / "model.bin")
            if name.startswith("encoder/")
        }
        self.heads = int(self.state["num_heads"])
        self.layers = sum(name.endswith("/ffn/linear_0/weight") for name in self.state)
        self.filters = slaney_filters().to(device)
        self.device = device

    def features(self, wave: Tensor) -> Tensor:
        """Log-mel energies, 25 ms Hann windows every 10 ms.  [B, N] → [B, 80, N / 160]"""
        window = torch.hann_window(400, device=wave.device)
        spectrum = torch.stft(wave, 400, 160, window=window, return_complex=True)[..., :-1]
        energies = (self.filters.T @ spectrum.abs().square()).clamp(min=1e-10).log10()
        floor = energies.amax((1, 2), keepdim=True) - 8
        return (torch.maximum(energies, floor) + 4) / 4

    @torch.inference_mode()
    def encode(self, wave: Tensor) -> Tensor:
        """[B, 480,000] samples in ±1 → [B, 1500, 384]"""
        w = self.state
        x = self.features(wave)
        x = F.gelu(F.conv1d(x, w["conv1/weight"], w["conv1/bias"], padding=1))
        x = F.gelu(F.conv1d(x, w["conv2/weight"], w["conv2/bias"], stride=2, padding=1))
        x = x.transpose(1, 2) + w["position_encodings/encodings"]
        for layer in range(self.layers):
            name = f"layer_{layer}/self_attention"
            y = self._linear(self._norm(x, f"{name}/layer_norm"), f"{name}/linear_0")
            query, key, value = y.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(query, key, value)
            x = x + self._linear(y.transpose(1, 2).flatten(2), f"{name}/linear_1")
            name = f"layer_{layer}/ffn"
            y = F.gelu(self._linear(self._norm(x, f"{name}/layer_norm"), f"{name}/linear_0"))
            x = x + self._linear(y, f"{name}/linear_1")
        return self._norm(x, "layer_norm")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.state[f"{name}/weight"], self.state[f"{name}/bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        gamma, beta = self.state[f"{name}/gamma"], self.state[f"{name}/beta"]
        return F.layer_norm(x, gamma.shape, gamma, beta)

    def rows(
        self, waves: Sequence[NDArray[np.float32]], gap: int = 10
    ) -> list[NDArray[np.float16]]:
        """Utterances of whole hops → [hops, 384] each, row t centred on sample 320 t.

        They are heard in one window, ``gap`` hops of silence between them.
        """
        window = np.zeros(self.hops * 320, np.float32)
        starts, at = list[int](), 0
        for wave in waves:
            part = wave[: len(window) - at]
            window[at : at + len(part)] = part
            starts.append(at // 320)
            at += len(wave) + gap * 320
        out = self.encode(torch.from_numpy(window)[None].to(self.device))[0].half().cpu().numpy()
        return [
            out[start : start + len(wave) // 320] for start, wave in zip(starts, waves, strict=True)
        ]


def read_ctranslate2(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Name and float32 value of the variables of a ``model.bin``, of its binary version 6.

    A file is its versions and the specification's name, then a variable after the other: name,
    shape, type, size in bytes, values; strings carry their length and end with a zero.

    Raises:
        ValueError: another version, or a type that is not floating point (a quantised model).
    """
    types = {0: np.float32, 1: np.int8, 2: np.int16, 3: np.int32, 4: np.float16}
    with path.open("rb") as file:

        def number(form: str) -> int:
            return struct.unpack(f"<{form}", file.read(struct.calcsize(form)))[0]

        def text() -> str:
            return file.read(number("H"))[:-1].decode()

        version = number("I")
        if version != 6:
            raise ValueError(f"{path}: expected CTranslate2's binary version 6, got {version}")
        text(), number("I")
        for _ in range(number("I")):
            name = text()
            shape = [number("I") for _ in range(number("B"))]
            kind = types.get(number("B"))
            size = number("I")
            if kind is None or (kind is np.int8 and shape):
                raise ValueError(f"{path}: {name}: expected floating point, got a quantised model")
            values = np.frombuffer(file.read(size), kind).reshape(shape)
            yield name, torch.from_numpy(values.astype(np.float32))


def slaney_filters(bins: int = 80, size: int = 400, rate: int = 16_000) -> Tensor:
    """Triangular filters of unit area on Slaney's mel scale, as Whisper has.  → [size/2 + 1, bins]

    Source: Slaney, "Auditory Toolbox" (1998): linear to 1 kHz, then 27 steps for a factor of 6.4.
    """
    top = 15 + 27 * math.log(rate / 2 / 1000) / math.log(6.4)
    mels = torch.linspace(0, top, bins + 2, dtype=torch.float64)
    edges = torch.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))
    hertz = (torch.arange(size // 2 + 1) * rate / size).double()[:, None]
    return (_triangles(hertz, edges) * 2 / (edges[2:] - edges[:-2])).float()


def _triangles(at: Tensor, edges: Tensor) -> Tensor:
    """Each rises from an edge to 1 at the next, and falls.  at: [F, 1], edges: [N + 2] → [F, N]"""
    rising = (at - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - at) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp(min=0)


def _affine(state: dict[str, Tensor], name: str) -> tuple[Tensor, Tensor]:
    """A batch norm in evaluation mode as (scale, shift)."""
    mean, variance = state[f"{name}.running_mean"], state[f"{name}.running_var"]
    scale = state.get(f"{name}.weight", torch.ones_like(mean)) / (variance + 1e-5).sqrt()
    return scale, state.get(f"{name}.bias", torch.zeros_like(mean)) - mean * scale


def equal_error_rate(scores: Tensor, same: Tensor) -> float:
    """The rate at which false accepts equal false rejects; ``scores`` and ``same`` are [P]."""
    order = scores.argsort(descending=True)
    hits = same[order].double()
    miss = 1 - hits.cumsum(0) / hits.sum()
    false = (1 - hits).cumsum(0) / (1 - hits).sum()
    at = int((miss - false).abs().argmin())
    return float((miss[at] + false[at]) / 2) if math.isfinite(float(miss[at])) else 1.0
