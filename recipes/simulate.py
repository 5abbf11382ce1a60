"""Scenes with exact labels: one utterance, a conversation, or nobody, in rooms and noise.

A scene is drawn from its own generator, so scene ``n`` of a run is the same whenever it is made.
All pieces of speech are laid on the 50 Hz grid, which keeps activity and teacher rows exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy.signal import butter, lfilter, oaconvolve, sosfilt

from recipes.channels import drawn, microphone
from recipes.corpus import HOP, RATE, Corpus
from recipes.rooms import Bank
from recipes.settings import Settings

LOCAL_SPEAKERS = 3
"""Speakers a scene may have: the outputs of the diarization head."""

WHOLE_HOPS = 150
"""Scenes of one utterance as long as this hold a whole one; shorter ones are for the voice."""

ENOUGH = 0.1
"""Share of a corpus's utterances that must fill a scene for whole ones to be drawn from it: of
fifty short sentences among hundreds of long ones, these few would be learnt by heart."""

FADE = 80
"""Samples (5 ms) over which a cut piece of speech fades in and out."""


class Acoustics(Settings):
    """What happens to the sound between the mouth and the file.

    Attributes:
        level_db: loudness of speech in the mixture, dBFS, uniform.
        speaker_level_db: standard deviation of a speaker's level around it.
        noise: share of scenes with a recorded noise.
        noise_snr_db: its signal-to-noise ratio, uniform.
        room_tone_snr_db: ratio of the coloured noise every scene has, uniform.
        reverb: share of scenes in a room.
        reverb_s: reverberation time (T60), uniform, of the rooms that are a tail alone.
        rooms: share of those scenes in a room of the bank, where there is one: every speaker at a
            place of their own (`recipes.rooms`).
        narrow_band: share of scenes heard through a telephone band.
        codec: share of scenes that went through a codec (`recipes.channels`).
        clean: share of scenes of one utterance that are left as recorded but for the level.
        clatter: share of scenes with taps, clicks and rustling.
        clatter_snr_db: ratio of the speech to the loudest of them, uniform.
        colour: share of scenes whose microphone is not flat (`recipes.channels.microphone`).
        colour_db: deviation of its gains.
    """

    level_db: tuple[float, float] = (-52.0, -16.0)
    speaker_level_db: float = 3.0
    noise: float = 0.6
    noise_snr_db: tuple[float, float] = (3.0, 30.0)
    room_tone_snr_db: tuple[float, float] = (15.0, 55.0)
    reverb: float = 0.4
    reverb_s: tuple[float, float] = (0.12, 0.6)
    rooms: float = 0.0
    narrow_band: float = 0.05
    codec: float = 0.0
    clean: float = 0.0
    clatter: float = 0.0
    clatter_snr_db: tuple[float, float] = (-6.0, 20.0)
    colour: float = 0.0
    colour_db: float = 5.0


class Conversation(Settings):
    """How people take turns.

    Attributes:
        speakers: probabilities of 1, 2, 3 … speakers; training has no use for more than
            `LOCAL_SPEAKERS`.
        turn_s: median length of a turn.
        turn_spread: standard deviation of the logarithm of a turn's length.
        overlap: share of turns that begin before the last one ends.
        overlap_s: mean of that head start.
        pause_s: mean pause before the other turns.
        transfer_s: mean and deviation of the time from one speaker's end to the next one's begin,
            negative in overlap; instead of ``overlap``, ``overlap_s`` and ``pause_s``. In recorded
            conversations about 40 % of these intervals are overlaps and their mode is near 0.2 s
            (Heldner & Edlund, Journal of Phonetics 38, 2010; Stivers et al., PNAS 106, 2009), as in
            a normal distribution of 0.15 ± 0.6 s.
        whole: a turn is one whole utterance, so that its words are known; else of a drawn length.
        lull: share of pauses that are long ones.
        lull_s: longest of the long pauses.
        backchannel: share of turns with a short remark of another speaker inside.
        sources: probability of each corpus to lend a speaker.
    """

    speakers: tuple[float, ...] = (0.12, 0.53, 0.35)
    turn_s: float = 2.3
    turn_spread: float = 0.65
    overlap: float = 0.5
    overlap_s: float = 0.7
    pause_s: float = 0.35
    transfer_s: tuple[float, float] | None = None
    whole: bool = False
    lull: float = 0.2
    lull_s: float = 6.0
    backchannel: float = 0.15
    sources: dict[str, float] = Field(default_factory=dict[str, float])


@dataclass(slots=True)
class Scene:
    """One training example of ``hops`` hops.

    Attributes:
        wave: float32 [hops · 320]; of a scene that is only drawn, [0].
        sound: int32 [3, hops], the hop of the corpus that each local speaker is heard with, or −1.
        clean: left as recorded but for the level.
        activity: bool [hops, 3], the local speakers in order of appearance; as many as there are
            in a conversation of more.
        rows: int64 [hops, 3], the teacher's row of each active local speaker, or −1.
        utterances: the utterance whose embedding stands for each local speaker, or −1.
        text: verbatim transcript of a scene of one whole utterance, or "".
        said: (local speaker, utterance, first hop, end hop) of each whole utterance in it.
    """

    wave: NDArray[np.float32]
    sound: NDArray[np.int32]
    activity: NDArray[np.bool_]
    rows: NDArray[np.int64]
    clean: bool = False
    utterances: list[int] = field(default_factory=lambda: [-1] * LOCAL_SPEAKERS)
    text: str = ""
    said: list[tuple[int, int, int, int]] = field(default_factory=list[tuple[int, int, int, int]])


class Simulator:
    """Draws scenes from the training split of a corpus.

    Attributes:
        silent: scenes are only drawn; `recipes.mixing.Mixer` makes their sound, many at a time.
    """

    def __init__(
        self,
        corpus: Corpus,
        acoustics: Acoustics,
        conversation: Conversation,
        *,
        split: str = "train",
        rooms: Bank | None = None,
        silent: bool = False,
    ) -> None:
        self.corpus = corpus
        self.silent = silent
        self.rooms = rooms
        self.acoustics = acoustics
        self.conversation = conversation
        self.bounds: dict[int, tuple[int, int]] = {}
        self.by_speaker: dict[str, dict[str, list[int]]] = {}
        for index, item in enumerate(corpus.utterances):
            active = np.flatnonzero(corpus.activity[item.start : item.start + item.hops])
            if item.split != split or len(active) < 25:
                continue
            self.bounds[index] = (int(active[0]), int(active[-1]) + 1)
            # where speakers are unknown every clip is one of its own
            name = item.speaker or item.id
            self.by_speaker.setdefault(item.corpus, {}).setdefault(name, []).append(index)
        self.names = {corpus: sorted(found) for corpus, found in self.by_speaker.items()}
        self.by_corpus = {
            corpus: np.array(sorted(i for some in found.values() for i in some))
            for corpus, found in self.by_speaker.items()
        }
        self.spoken = {
            corpus: np.array([self.bounds[i][1] - self.bounds[i][0] for i in indices])
            for corpus, indices in self.by_corpus.items()
        }
        self.median = {corpus: float(np.median(hops)) for corpus, hops in self.spoken.items()}

    def single(self, rng: np.random.Generator, hops: int, sources: dict[str, float]) -> Scene:
        """One utterance with silence around it, or in a short scene a piece of one."""
        suited: dict[str, tuple[NDArray[np.int64], bool]] = {}
        if hops >= WHOLE_HOPS:
            suited = {name: found for name in sources if (found := self._suited(name, hops))}
        corpus = _choose(rng, {name: sources[name] for name in suited} or sources)
        indices, whole = suited.get(corpus, (self.by_corpus[corpus], False))
        if hops >= WHOLE_HOPS and not suited:  # all are short: a whole one, and silence
            indices, whole = indices[self.spoken[corpus] <= hops - 4], True
        index = int(rng.choice(indices))
        item = self.corpus.utterances[index]
        first, last = self.bounds[index]
        # keep a little of the recording's own silence, so that no onset is lost
        first, last = max(first - 3, 0), min(last + 3, item.hops)
        if last - first > hops:
            first += int(rng.integers(last - first - hops + 1))
            last = first + hops
        at = int(rng.integers(hops - (last - first) + 1))
        stage = _Stage(self, rng, hops)
        stage.say(0, index, first, last, at)
        clean = self.acoustics.clean
        scene = stage.finish(clean=clean > 0 and rng.random() < clean)
        scene.text = item.text if whole else ""
        return scene

    def _filling(self, corpus: str, hops: int) -> NDArray[np.int64]:
        """The utterances that fit in a scene of ``hops`` and fill most of it."""
        spoken = self.spoken[corpus]
        return self.by_corpus[corpus][(spoken <= hops - 4) & (spoken > 0.55 * hops)]

    def _suited(self, corpus: str, hops: int) -> tuple[NDArray[np.int64], bool] | None:
        """What a corpus has for a scene of whole utterances, and whether they are whole.

        Those that fill it, if they are so many that none is heard all the time; or pieces of all,
        where most are longer.
        """
        filling = self._filling(corpus, hops)
        if len(filling) >= ENOUGH * len(self.by_corpus[corpus]):
            return filling, True
        return (self.by_corpus[corpus], False) if self.median[corpus] > hops else None

    def nobody(self, rng: np.random.Generator, hops: int) -> Scene:
        """Noise and room tone only."""
        return _Stage(self, rng, hops).finish()

    def talk(self, rng: np.random.Generator, hops: int) -> Scene:
        """A conversation; one of its speakers surely opens it."""
        style = self.conversation
        people = self._people(rng, 1 + int(rng.choice(len(style.speakers), p=style.speakers)))
        stage = _Stage(self, rng, hops, max(LOCAL_SPEAKERS, len(people)))
        now, last, speaker = int(rng.exponential(15)), 0, 0
        while now < hops - 15:
            length = int(50 * style.turn_s * np.exp(style.turn_spread * rng.standard_normal()))
            end = stage.turn(people, speaker, now, max(length, 15))
            if len(people) > 1 and end - now > 50 and rng.random() < style.backchannel:
                other = (speaker + 1 + int(rng.integers(len(people) - 1))) % len(people)
                start = int(rng.integers(now + 10, end - 30))
                stage.turn(people, other, start, int(rng.integers(15, 40)))
            last = max(last, end)
            if len(people) > 1 and rng.random() < 0.85:
                speaker = (speaker + 1 + int(rng.integers(len(people) - 1))) % len(people)
                overlapping = rng.random() < style.overlap and last > 50
            else:
                overlapping = False
            if style.transfer_s is not None:
                now = max(self._transfer(rng, last), now + 15)
            elif overlapping:
                back = int(rng.exponential(50 * style.overlap_s)) + 5
                now = max(last - back, now + 15)
            else:
                now = last + self._pause(rng)
        return stage.finish()

    def _transfer(self, rng: np.random.Generator, last: int) -> int:
        """Where the next turn begins, by ``transfer_s`` or after a lull."""
        style = self.conversation
        assert style.transfer_s is not None
        if rng.random() < style.lull:
            return last + int(50 * rng.uniform(1.0, style.lull_s))
        return last + int(50 * rng.normal(*style.transfer_s))

    def _pause(self, rng: np.random.Generator) -> int:
        style = self.conversation
        if rng.random() < style.lull:
            return int(50 * rng.uniform(1.0, style.lull_s))
        return int(rng.exponential(50 * style.pause_s)) + 2

    def _people(self, rng: np.random.Generator, count: int) -> list[list[int]]:
        """The utterances of ``count`` different speakers."""
        people: list[list[int]] = []
        names: set[str] = set()
        while len(people) < count:
            corpus = _choose(rng, self.conversation.sources)
            name = self.names[corpus][int(rng.integers(len(self.names[corpus])))]
            unknown = not self.corpus.utterances[self.by_speaker[corpus][name][0]].speaker
            key = corpus if unknown else name  # two clips of unknown speakers may be one person
            if key in names:
                continue
            names.add(key)
            people.append(self.by_speaker[corpus][name])
        return people


class _Stage:
    """A scene while it is being made: a clean track for each local speaker."""

    def __init__(
        self,
        simulator: Simulator,
        rng: np.random.Generator,
        hops: int,
        speakers: int = LOCAL_SPEAKERS,
    ) -> None:
        self.simulator, self.rng, self.hops = simulator, rng, hops
        self.tracks: dict[int, NDArray[np.float32]] = {}
        self.activity = np.zeros((hops, speakers), np.bool_)
        self.rows = np.full((hops, speakers), -1, np.int64)
        self.sound = np.full((speakers, hops), -1, np.int32)
        self.utterances = [-1] * speakers
        self.heard: dict[int, int] = {}  # speaker → local index, in order of appearance
        self.said: list[tuple[int, int, int, int]] = []
        self.left: dict[int, tuple[int, int]] = {}  # speaker → utterance and hop to go on from

    def turn(self, people: Sequence[Sequence[int]], speaker: int, at: int, length: int) -> int:
        """Lets a speaker talk at hop ``at`` for about ``length`` hops; gives the end."""
        local = self.heard.setdefault(speaker, len(self.heard))
        if self.simulator.conversation.whole:
            index = int(self.rng.choice(people[speaker]))
            first, last = self.simulator.bounds[index]
            if at + last - first <= self.hops:
                self.say(local, index, first, last, at)
            return at + last - first
        end = min(at + length, self.hops)
        now = at
        while now < end - 5:
            index, first = self.left.get(speaker) or self._draw(people[speaker])
            last = self.simulator.bounds[index][1]
            take = min(last - first, end - now)
            self.say(local, index, first, first + take, now)
            now += take
            if first + take < last - 15:
                self.left[speaker] = (index, first + take)
            else:
                self.left.pop(speaker, None)
        return now

    def _draw(self, utterances: Sequence[int]) -> tuple[int, int]:
        index = int(self.rng.choice(utterances))
        first, last = self.simulator.bounds[index]
        if last - first > 300:  # a long reading: start anywhere in it
            first = int(self.rng.integers(first, last - 150))
        return index, first

    def say(self, local: int, index: int, first: int, last: int, at: int) -> None:
        """Lays hops ``first``…``last`` of an utterance at hop ``at`` of a local speaker."""
        corpus = self.simulator.corpus
        item = corpus.utterances[index]
        begin = item.start + first
        self.sound[local, at : at + last - first] = np.arange(begin, begin + last - first)
        if not self.simulator.silent:
            self._lay(local, begin, last - first, at)
        active = corpus.activity[begin : begin + last - first].astype(np.bool_)
        self.activity[at : at + last - first, local] = active
        self.rows[at : at + last - first, local] = np.where(
            active, np.arange(begin, begin + last - first), -1
        )
        self.utterances[local] = index
        if (first, last) == self.simulator.bounds[index]:
            self.said.append((local, index, at, at + last - first))

    def _lay(self, local: int, begin: int, hops: int, at: int) -> None:
        """The sound of ``hops`` hops of the corpus from ``begin`` on, in a speaker's track."""
        audio = self.simulator.corpus.audio
        piece = audio[begin : begin + hops].reshape(-1).astype(np.float32) / 32768
        ramp = np.linspace(0, 1, FADE, dtype=np.float32)
        piece[:FADE] *= ramp
        piece[-FADE:] *= ramp[::-1]
        track = self.tracks.setdefault(local, np.zeros(self.hops * HOP, np.float32))
        track[at * HOP : (at + hops) * HOP] = piece

    def finish(self, *, clean: bool = False) -> Scene:
        """Levels, room, noise and band → the scene; a ``clean`` one has its level alone."""
        wave = np.zeros(0, np.float32) if self.simulator.silent else self._mixed(clean)
        return Scene(
            wave, self.sound, self.activity, self.rows, clean, self.utterances, said=self.said
        )

    def _mixed(self, clean: bool) -> NDArray[np.float32]:
        rng, how = self.rng, self.simulator.acoustics
        wave = np.zeros(self.hops * HOP, np.float32)
        level = rng.uniform(*how.level_db)
        reverb = rng.uniform(*how.reverb_s) if rng.random() < how.reverb and not clean else 0.0
        banked = reverb > 0 and how.rooms > 0 and rng.random() < how.rooms
        bank = self.simulator.rooms if banked else None
        places = None if bank is None else bank.draw(rng, len(self.tracks))
        for number, (local, track) in enumerate(self.tracks.items()):
            gain = 10 ** ((level + how.speaker_level_db * rng.standard_normal()) / 20)
            track *= gain / _rms(track, np.repeat(self.activity[:, local], HOP))
            if reverb:
                place = room(rng, reverb) if places is None else places[number]
                track = oaconvolve(track, place)[: len(wave)].astype(np.float32)
            wave += track
        if not clean:
            wave = self._dirty(wave, 10 ** (level / 20))
        peak = np.abs(wave).max()
        if peak > 0.99:
            wave *= 0.99 / peak
        return wave

    def _dirty(self, wave: NDArray[np.float32], loudness: float) -> NDArray[np.float32]:
        """Adds what the microphone hears beside the speakers, and what the line takes away."""
        rng, how = self.rng, self.simulator.acoustics
        tone = colored(rng, len(wave))
        wave += tone * (loudness / _rms(tone) * 10 ** (-rng.uniform(*how.room_tone_snr_db) / 20))
        if self.simulator.corpus.noises and (rng.random() < how.noise or not self.tracks):
            noise = self._noise(len(wave))
            wave += noise * (loudness / _rms(noise) * 10 ** (-rng.uniform(*how.noise_snr_db) / 20))
        if how.clatter and rng.random() < how.clatter:
            noise = clatter(rng, len(wave))
            wave += noise * (loudness * 10 ** (-rng.uniform(*how.clatter_snr_db) / 20))
        if how.colour and rng.random() < how.colour:
            before = _rms(wave)
            wave = oaconvolve(wave, microphone(rng, how.colour_db), "same").astype(np.float32)
            wave *= before / _rms(wave)
        if rng.random() < how.narrow_band:
            edges = (rng.uniform(150, 350), rng.uniform(3000, 3800))
            band = butter(4, edges, "band", fs=RATE, output="sos")
            wave = np.asarray(sosfilt(band, wave), np.float32)
        if how.codec and rng.random() < how.codec:
            wave = drawn(rng)(wave)
        return wave

    def _noise(self, length: int) -> NDArray[np.float32]:
        """A recorded noise, repeated from a random place."""
        noises = self.simulator.corpus.noises
        noise = noises[int(self.rng.integers(len(noises)))].astype(np.float32) / 32768
        begin = int(self.rng.integers(len(noise)))
        return np.resize(np.roll(noise, -begin), length).astype(np.float32)


def room(rng: np.random.Generator, reverb_s: float) -> NDArray[np.float32]:
    """A room's impulse response: the direct sound and an exponentially dying diffuse tail.

    Polack's statistical model; the direct-to-reverberant ratio is uniform in −2…12 dB.
    """
    length = int(reverb_s * RATE)
    time = np.arange(length) / RATE
    tail = rng.standard_normal(length) * np.exp(-6.9 * time / reverb_s)
    begin = int(rng.uniform(0.001, 0.02) * RATE)
    tail[:begin] = 0
    ratio = rng.uniform(-2, 12)
    tail *= 10 ** (-ratio / 20) / np.sqrt((tail**2).sum() + 1e-12)
    tail[0] = 1.0
    return tail.astype(np.float32)


def colored(rng: np.random.Generator, length: int) -> NDArray[np.floating]:
    """Noise whose power falls by 0…6 dB an octave, four seconds of it repeated."""
    size = 1 << 16
    spectrum = np.fft.rfft(rng.standard_normal(size).astype(np.float32))
    slope = rng.uniform(0, 1)
    spectrum *= (np.maximum(np.arange(len(spectrum)), 8) ** -slope).astype(np.float32)
    noise = np.fft.irfft(spectrum)
    return np.resize(noise, length).astype(np.float32)


def clatter(rng: np.random.Generator, length: int) -> NDArray[np.float32]:
    """What hands do on a table: knocks, keys, paper. The loudest has an RMS of one.

    Knocks are three damped resonances of 200…5,000 Hz; rustling is noise through a resonance of the
    same range under a smooth envelope of 30…400 ms. They come singly, 0.2…6 a second.
    """
    wave = np.zeros(length, np.float32)
    rate = float(np.exp(rng.uniform(np.log(0.2), np.log(6.0))))
    rustle = rng.random()
    for _ in range(int(rng.poisson(rate * length / RATE))):
        soft = rng.random() < rustle
        size = int(RATE * np.exp(rng.uniform(np.log(0.03), np.log(0.4 if soft else 0.12))))
        time = np.arange(size, dtype=np.float32) / RATE
        if soft:
            turn = 2 * np.pi * np.exp(rng.uniform(np.log(200), np.log(5000))) / RATE
            radius = rng.uniform(0.6, 0.95)
            coefficients = [1, -2 * radius * np.cos(turn), radius**2]
            event = lfilter([1.0], coefficients, rng.standard_normal(size)) * np.hanning(size)
        else:
            tones = np.exp(rng.uniform(np.log(200), np.log(5000), (3, 1)))
            waves = np.sin(2 * np.pi * tones * time + rng.uniform(0, 6.28, (3, 1)))
            event = (rng.uniform(0.2, 1, (3, 1)) * waves).sum(0)
            event = event * np.exp(-time * rng.uniform(20, 200))
        event *= 10 ** (-rng.exponential(6) / 20) / (np.sqrt((event**2).mean()) + 1e-9)
        at = int(rng.integers(length))
        size = min(size, length - at)
        wave[at : at + size] += event[:size]
    return wave


def _rms(wave: NDArray[np.float32], where: NDArray[np.bool_] | None = None) -> float:
    part = wave if where is None or not where.any() else wave[where]
    return float(np.sqrt((part.astype(np.float64) ** 2).mean())) + 1e-7


def _choose(rng: np.random.Generator, shares: dict[str, float]) -> str:
    weights = np.array(list(shares.values()))
    return list(shares)[int(rng.choice(len(weights), p=weights / weights.sum()))]
