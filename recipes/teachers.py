"""The teachers of our training: CAM++ (voices), segmentation-3.0 (activity), Whisper (content).

CAM++, its filterbank and segmentation-3.0 are written here, inference only, straight from the
tensors of the published state dicts; Whisper runs in CTranslate2.

Source: Wang et al., "CAM++: A Fast and Efficient Network for Speaker Verification Using
Context-Aware Masking" (Interspeech 2023), figures 1–2; weights of 3D-Speaker (Apache-2.0).
Radford et al., "Robust Speech Recognition via Large-Scale Weak Supervision" (2022); weights of
Whisper tiny.en (MIT).
"""

import math
from collections.abc import Sequence
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
    rising = (position - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - position) / (edges[2:] - edges[1:-1])
    filters = torch.minimum(rising, falling).clamp(min=0)
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

    def __init__(self, path: Path, dtype: torch.dtype = torch.float32) -> None:
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.tensors: dict[str, Tensor] = {k: v.to(dtype) for k, v in state.items() if v.ndim > 1}
        self.norms = {
            key.removesuffix(".running_mean"): _affine(state, key.removesuffix(".running_mean"))
            for key in state
            if key.endswith(".running_mean")
        }
        self.state = {k: v.to(dtype) for k, v in state.items()}
        self.dtype = dtype
        self.filters = mel_filters()

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
        w = self.tensors
        x = filterbank(wave, self.filters).T[None].to(self.dtype)
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
        return F.relu(self._norm(x, "xvector.out_nonlinear.batchnorm"))[0].T.float()

    @torch.inference_mode()
    def embed(self, voice: Tensor, weight: Tensor | None = None) -> Tensor:
        """[T, 512] → [192]: mean and deviation over time, one dense layer.

        weight: [T], what each row counts in both; None is all the same.
        """
        if weight is None:
            weight = voice.new_ones(len(voice))
        total = weight.sum()
        mean = weight @ voice / total
        freedom = total - (weight**2).sum() / total
        pooled = torch.cat([mean, (weight @ (voice - mean) ** 2 / freedom).sqrt()])
        weight = self.tensors["xvector.dense.linear.weight"][..., 0].float()
        return self._norm((weight @ pooled)[None], "xvector.dense.nonlinear.batchnorm")[0]


class StandIn:
    """In `Campplus`'s place where its weights are not at hand: a fixed projection of energies.

    It knows a voice by its spectrum, which is enough to see that the recipes run.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.filters = mel_filters()
        self.project = torch.randn(80, 512, generator=generator) / 80**0.5
        self.dense = torch.randn(1024, 192, generator=generator) / 1024**0.5

    def voice(self, wave: Tensor) -> Tensor:
        """As `Campplus.voice`."""
        energies = filterbank(wave, self.filters)
        energies = energies[: len(energies) // 2 * 2].view(-1, 2, 80).mean(1)
        return F.relu(energies @ self.project)

    def embed(self, voice: Tensor) -> Tensor:
        """As `Campplus.embed`."""
        return torch.cat([voice.mean(0), voice.std(0)]) @ self.dense


class Segmentation:
    """segmentation-3.0 as a function of its state dict: who of three local speakers talks.

    Source: Plaquet & Bredin, "Powerset multi-class cross entropy loss for neural speaker
    diarization" (Interspeech 2023); Ravanelli & Bengio, "Speaker recognition from raw waveform with
    SincNet" (SLT 2018), equations 2–8; weights of pyannote (MIT).

    Attributes:
        samples: as many as it was trained to hear at a time.
    """

    samples = 160_000

    def __init__(self, path: Path) -> None:
        self.state: dict[str, Tensor] = torch.load(path, map_location="cpu", weights_only=True)[
            "state_dict"
        ]
        self.filters = self._sinc()
        self.lstm = torch.nn.LSTM(60, 128, 4, bidirectional=True, batch_first=True)
        prefix = "lstm."
        self.lstm.load_state_dict(
            {k.removeprefix(prefix): v for k, v in self.state.items() if k.startswith(prefix)}
        )
        self.members = torch.zeros(len(CLASSES), 3)
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
        known = self.logits(wave).softmax(-1) @ self.members
        at = ((320 * torch.arange(frames) + 360 - 495) / 270).clamp(0, known.shape[1] - 1.001)
        left = at.long()
        share = (at - left)[:, None]
        return known[:, left].lerp(known[:, left + 1], share)


class WhisperEncoder:
    """The encoder of a Whisper model in CTranslate2's format, 30 s at a time.

    Attributes:
        hops: what one window holds.
    """

    hops = 1500

    def __init__(self, folder: Path, threads: int = 1) -> None:
        try:
            import ctranslate2
        except ImportError as error:
            raise SystemExit("the content teacher needs ctranslate2: pip install it") from error
        from transformers import WhisperFeatureExtractor

        self.features = WhisperFeatureExtractor()
        self.wrap = ctranslate2.StorageView.from_array
        self.model = ctranslate2.models.Whisper(
            str(folder), device="cpu", compute_type="float32", intra_threads=threads
        )

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
        mel = self.features(window, sampling_rate=16_000, return_tensors="np").input_features
        out = np.array(self.model.encode(self.wrap(np.ascontiguousarray(mel, np.float32))))[0]
        return [
            out[start : start + len(wave) // 320].astype(np.float16)
            for start, wave in zip(starts, waves, strict=True)
        ]


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
