"""The sound of many scenes at once, on the device that trains: what `recipes.simulate` does to one.

A GPU learns many thousand times faster than speech is spoken, and a core mixes some hundred times
faster (`README.md` has both). So scenes are only drawn on the CPU (`Simulator.silent`: who is heard
with which hop of the corpus), and their levels, rooms, noises and microphones are made here, batch
by batch, from the corpus in the device's memory. The distributions are those of `Acoustics`; three
things are done otherwise: filters are applied to the spectrum and have no phase, noise of a colour
does not repeat, and of the codecs there is µ-law alone.

A batch is drawn from a generator of the device: it is the same again on the same kind of device.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.corpus import HOP, RATE, Corpus
from recipes.rooms import Bank
from recipes.simulate import FADE, Acoustics

TAIL = 9600
"""Samples of the longest response of a room."""

EVENT = 6400
"""Samples of the longest knock or rustle."""


class Mixer:
    """Scenes that were only drawn → what the microphone hears."""

    def __init__(
        self, corpus: Corpus, acoustics: Acoustics, rooms: Bank | None, device: torch.device
    ) -> None:
        self.acoustics, self.device = acoustics, device
        self.audio = torch.from_numpy(np.array(corpus.audio)).to(device)
        lengths = [len(noise) for noise in corpus.noises]
        self.noise_lengths = torch.tensor(lengths, device=device)
        self.noise_starts = self.noise_lengths.cumsum(0) - self.noise_lengths
        self.noise = torch.from_numpy(np.concatenate(corpus.noises)).to(device) if lengths else None
        self.rooms: Tensor | None = None
        if rooms is not None:
            responses = torch.from_numpy(np.array(rooms.responses, np.float32))
            self.rooms = F.pad(responses, (0, TAIL - responses.shape[-1])).to(device)

    def __call__(
        self, sound: Tensor, activity: Tensor, clean: Tensor, generator: torch.Generator
    ) -> Tensor:
        """sound: [B, S, hops], activity: [B, hops, S] bool, clean: [B] bool → [B, hops · 320]

        ``sound`` is the hop of the corpus that each local speaker is heard with, or −1.
        """
        how, draw = self.acoustics, _Draw(generator, self.device)
        B, S, _ = sound.shape
        tracks = self._tracks(sound)
        level = draw.uniform(how.level_db, B)
        own = how.speaker_level_db * draw.normal(B, S)
        gain = _decibels(level[:, None] + own) / _rms_of(tracks, activity)
        tracks = tracks.flatten(2) * gain[..., None]
        reverberant = (draw.share(how.reverb, B) & ~clean).nonzero()[:, 0]
        if len(reverberant):
            responses = self._rooms(draw, len(reverberant), S)
            tracks[reverberant] = _convolved(tracks[reverberant], responses)
        wave = tracks.sum(1)
        nobody = (sound < 0).flatten(1).all(1)
        wave = torch.where(clean[:, None], wave, self._dirty(wave, level, nobody, draw))
        peak = wave.abs().amax(1, keepdim=True)
        return wave * (0.99 / peak.clamp(min=0.99))

    def _tracks(self, sound: Tensor) -> Tensor:
        """[B, S, hops] → [B, S, hops, 320]; a cut piece of speech fades in and out."""
        heard = sound >= 0
        tracks = self.audio[sound.clamp(min=0).long()].float() / 32768
        tracks *= heard[..., None]
        before, after = F.pad(sound, (1, 0), value=-2), F.pad(sound, (0, 1), value=-2)
        begins = heard & ((before[..., :-1] < 0) | (before[..., :-1] + 1 != sound))
        ends = heard & (after[..., 1:] - 1 != sound)
        ramp = torch.linspace(0, 1, FADE, device=self.device)
        tracks[..., :FADE] *= torch.where(begins[..., None], ramp, 1)
        tracks[..., -FADE:] *= torch.where(ends[..., None], ramp.flip(0), 1)
        return tracks

    def _rooms(self, draw: "_Draw", scenes: int, speakers: int) -> Tensor:
        """Responses of a room for each speaker: of the bank, or a diffuse tail.  → [K, S, 9600]"""
        how = self.acoustics
        time = torch.arange(TAIL, device=self.device) / RATE
        reverb = draw.uniform(how.reverb_s, scenes)[:, None, None]
        tail = draw.normal(scenes, speakers, TAIL) * torch.exp(-6.9 * time / reverb)
        begin = draw.uniform((0.001, 0.02), scenes, speakers)[..., None]
        tail *= (time >= begin) & (time < reverb)
        ratio = draw.uniform((-2, 12), scenes, speakers)[..., None]
        tail *= _decibels(-ratio) / (tail.square().sum(-1, keepdim=True) + 1e-12).sqrt()
        tail[..., 0] = 1.0
        if self.rooms is None:
            return tail
        room = draw.below(len(self.rooms), scenes)
        places = draw.uniform((0, 1), scenes, self.rooms.shape[1]).argsort(1)
        place = places[:, torch.arange(speakers, device=self.device) % places.shape[1]]
        banked = draw.share(how.rooms, scenes)[:, None, None]
        return torch.where(banked, self.rooms[room[:, None], place], tail)

    def _dirty(self, wave: Tensor, level: Tensor, nobody: Tensor, draw: "_Draw") -> Tensor:
        """What the microphone hears beside the speakers, and what the line takes away."""
        how = self.acoustics
        B, N = wave.shape
        loudness = _decibels(level)[:, None]
        tone = self._coloured(draw, B, N)
        wave = wave + tone * loudness * _decibels(-draw.uniform(how.room_tone_snr_db, B, 1))
        if self.noise is not None:
            noisy = (draw.share(how.noise, B) | nobody)[:, None]
            noise = self._noise(draw, B, N)
            noise = noise * loudness * _decibels(-draw.uniform(how.noise_snr_db, B, 1))
            wave = wave + noise * noisy
        if how.clatter:
            clattering = draw.share(how.clatter, B).nonzero()[:, 0]
            ratio = _decibels(-draw.uniform(how.clatter_snr_db, B))
            gain = loudness[clattering, 0] * ratio[clattering]
            wave.index_add_(0, clattering, self._clatter(draw, len(clattering), N) * gain[:, None])
        return self._heard(wave, draw)

    def _coloured(self, draw: "_Draw", B: int, N: int) -> Tensor:
        """Noise whose power falls by 0…6 dB an octave, RMS 1.  → [B, N]"""
        spectrum = torch.fft.rfft(draw.normal(B, N))
        frequency = torch.fft.rfftfreq(N, 1 / RATE, device=self.device).clamp(min=2.0)
        spectrum *= frequency ** -draw.uniform((0, 1), B, 1)
        return _unit(torch.fft.irfft(spectrum, N))

    def _noise(self, draw: "_Draw", B: int, N: int) -> Tensor:
        """Recorded noises, each repeated from a random place, RMS 1.  → [B, N]"""
        assert self.noise is not None
        which = draw.below(len(self.noise_lengths), B)
        length = self.noise_lengths[which][:, None]
        begin = (draw.uniform((0, 1), B, 1) * length).long()
        at = (begin + torch.arange(N, device=self.device)) % length
        return _unit(self.noise[self.noise_starts[which][:, None] + at].float())

    def _clatter(self, draw: "_Draw", scenes: int, N: int) -> Tensor:
        """What hands do on a table, as `recipes.simulate.clatter`.  → [K, N]"""
        wave = torch.zeros(scenes, N + EVENT, device=self.device)
        rate = draw.log_uniform(0.2, 6.0, scenes)
        rustle = draw.uniform((0, 1), scenes)
        counts = torch.poisson(rate * N / RATE, draw.generator).long()
        scene = torch.arange(scenes, device=self.device).repeat_interleave(counts)
        E = len(scene)
        if E == 0:
            return wave[:, :N]
        soft = draw.uniform((0, 1), E) < rustle[scene]
        longest = torch.where(soft, 0.4, 0.12)
        size = RATE * 0.03 * (longest / 0.03) ** draw.uniform((0, 1), E)
        sample = torch.arange(EVENT, device=self.device)
        event = torch.where(soft[:, None], self._rustles(draw, size), self._knocks(draw, E))
        event *= sample < size[:, None]
        event /= (event.square().sum(1, keepdim=True) / size[:, None]).sqrt() + 1e-9
        event *= _decibels(6 * draw.uniform((1e-6, 1), E).log())[:, None]
        at = draw.below(N, E)[:, None] + sample
        return (
            wave.flatten()
            .index_add_(0, (scene[:, None] * (N + EVENT) + at).flatten(), event.flatten())
            .view(scenes, -1)[:, :N]
        )

    def _knocks(self, draw: "_Draw", E: int) -> Tensor:
        """Three damped resonances each.  → [E, 6400]"""
        time = torch.arange(EVENT, device=self.device) / RATE
        event = torch.zeros(E, EVENT, device=self.device)
        for _ in range(3):
            turn = 2 * torch.pi * draw.log_uniform(200.0, 5000.0, E, 1)
            phase = draw.uniform((0, 6.28), E, 1)
            event += draw.uniform((0.2, 1), E, 1) * torch.sin(turn * time + phase)
        return event * torch.exp(-time * draw.uniform((20, 200), E, 1))

    def _rustles(self, draw: "_Draw", size: Tensor) -> Tensor:
        """Noise through a resonance, swelling and dying within ``size`` samples.  → [E, 6400]"""
        E = len(size)
        spectrum = torch.fft.rfft(draw.normal(E, EVENT))
        turn = 2 * torch.pi * draw.log_uniform(200.0, 5000.0, E, 1) / RATE
        radius = draw.uniform((0.6, 0.95), E, 1)
        back = torch.polar(
            torch.ones(EVENT // 2 + 1, device=self.device),
            -2 * torch.pi * torch.arange(EVENT // 2 + 1, device=self.device) / EVENT,
        )
        spectrum /= 1 - 2 * radius * turn.cos() * back + radius**2 * back**2
        swell = torch.sin(torch.pi * torch.arange(EVENT, device=self.device) / size[:, None])
        return torch.fft.irfft(spectrum, EVENT) * swell**2

    def _heard(self, wave: Tensor, draw: "_Draw") -> Tensor:
        """Microphone, telephone band and µ-law, as `recipes.channels`.  [B, N] → [B, N]"""
        how = self.acoustics
        B, N = wave.shape
        spectrum = torch.fft.rfft(wave)
        frequency = torch.fft.rfftfreq(N, 1 / RATE, device=self.device)
        coloured = draw.share(how.colour, B)[:, None]
        gain = torch.where(coloured, self._microphone(draw, frequency, B), 1)
        power = spectrum.abs().square()
        gain *= (power.sum(1) / ((power * gain**2).sum(1) + 1e-20)).sqrt()[:, None]
        narrow = draw.share(how.narrow_band, B)[:, None]
        coded = draw.share(how.codec, B)
        low, high = draw.uniform((150, 350), B, 1), draw.uniform((3000, 3800), B, 1)
        # Butterworth's band pass of the fourth order
        across = (frequency**2 - low * high) / (frequency.clamp(min=1) * (high - low))
        gain = torch.where(narrow, gain / (1 + across**8).sqrt(), gain)
        gain = torch.where(coded[:, None] & (frequency > 3800), 0, gain)
        wave = torch.fft.irfft(spectrum * gain, N)
        return torch.where(coded[:, None], _mu_law(wave), wave)

    def _microphone(self, draw: "_Draw", frequency: Tensor, B: int) -> Tensor:
        """Gains of microphones that are not flat, as `recipes.channels.microphone`.  → [B, F]"""
        octaves = frequency.clamp(min=30.0).log2()
        gains = self.acoustics.colour_db * draw.normal(B, 10)
        at = ((octaves - np.log2(60.0)) / 0.78).clamp(0, 9 - 1e-4)
        left = at.long()
        gain = gains[:, left].lerp(gains[:, left + 1], (at - left).expand(B, -1))
        bass, treble = (draw.uniform(at, B, 1).log2() for at in ((60, 300), (3000, 7500)))
        for beyond in (bass - octaves, octaves - treble):
            steep = draw.uniform((6, 24), B, 1) * draw.share(0.5, B, 1)
            gain = gain - steep * beyond.clamp(min=0)
        return _decibels(gain)


class _Draw:
    """Random tensors of one generator."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def uniform(self, bounds: tuple[float, float], *shape: int) -> Tensor:
        low, high = bounds
        return low + (high - low) * torch.rand(shape, generator=self.generator, device=self.device)

    def log_uniform(self, low: float, high: float, *shape: int) -> Tensor:
        return low * (high / low) ** self.uniform((0, 1), *shape)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def share(self, share: float, *shape: int) -> Tensor:
        return self.uniform((0, 1), *shape) < share

    def below(self, end: int, *shape: int) -> Tensor:
        return torch.randint(end, shape, generator=self.generator, device=self.device)


def _decibels(level: Tensor) -> Tensor:
    return 10 ** (level / 20)


def _unit(wave: Tensor) -> Tensor:
    return wave / (wave.square().mean(1, keepdim=True).sqrt() + 1e-7)


def _rms_of(tracks: Tensor, activity: Tensor) -> Tensor:
    """Of each speaker where it talks.  [B, S, hops, 320], [B, hops, S] → [B, S]"""
    active = activity.transpose(1, 2).float()
    power = (tracks.square().mean(-1) * active).sum(-1) / active.sum(-1).clamp(min=1)
    return power.sqrt() + 1e-7


def _convolved(tracks: Tensor, responses: Tensor) -> Tensor:
    """[K, S, N], [K, S, M] → [K, S, N]"""
    N = tracks.shape[-1]
    size = -(-(N + responses.shape[-1]) // HOP) * HOP
    spectrum = torch.fft.rfft(tracks, size) * torch.fft.rfft(responses, size)
    return torch.fft.irfft(spectrum, size)[..., :N]


def _mu_law(wave: Tensor) -> Tensor:
    """Eight bits of µ-law (ITU-T G.711) and back."""
    squashed = wave.sign() * torch.log1p(255 * wave.abs().clamp(max=1)) / np.log(256)
    rounded = torch.round(squashed * 127.5 - 0.5).add(0.5) / 127.5
    return rounded.sign() * torch.expm1(rounded.abs() * np.log(256)) / 255
