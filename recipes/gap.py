"""The streaming gap: what chunk, look-ahead and left context cost, and what training for it buys.

One axis at a time moves away from what ships; beside every stream stands the whole recording in
view. Weights that never saw a stream in training ("zero-shot") and weights that did ("adapted")
are measured alike. Writes JSON, a picture and the page that explains both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import torch

from model.state import Window
from recipes.conversations import Clip, Meetings, read_clips, simulated_clips
from recipes.corpus import Corpus
from recipes.export import load_student
from recipes.hearing import SHIPPED
from recipes.score import diarization_scores, utterance_scores
from recipes.settings import Settings, from_arguments
from recipes.student import Student
from recipes.verification import dev_utterances
from stream.clock import FRAME_RATE
from stream.tracks.settings import TracksSettings

METRICS: Final = {
    "recorded": "DER, recorded",
    "simulated": "DER, simulated",
    "eer": "EER",
    "cer": "CER",
}
"""Key in the report → title, per cent all of them."""

AXES: Final = {"chunk": "chunk", "right": "look-ahead", "left": "left context"}
"""Field of `Window` → title."""

COLORS: Final = ("#3b82f6", "#d97706", "#10b981")
"""A line each; clear on white and on black, and to the colour-blind."""

INK: Final = "#7d8590"
"""Text and axes, legible on white and on black."""

LEAST_SPAN: Final = 0.25
"""A panel shows at least this part of its highest value, so that noise does not look like more."""

WHOLE: Final = "whole"
"""Name of the column without a stream."""


class Gap(Settings):
    """Which weights are measured through which windows.

    Attributes:
        weights: name → a run's checkpoint or an exported folder, in the order they are shown.
        data: folder of stage 1.
        conversations: folder of audio and RTTM pairs.
        meetings: the simulated conversations.
        tracks: thresholds, the same for all; the built-in ones where the file does not exist.
        chunk: frames, the other two as shipped.
        right: frames of look-ahead, likewise.
        left: frames of left context, likewise.
        each: utterances of each development speaker; null is all.
        report: JSON file of the numbers.
        page: Markdown file; the picture goes beside it, as SVG.
        threads: compute threads.
    """

    weights: dict[str, Path]
    data: Path
    conversations: Path
    meetings: Meetings = Meetings(each=2)
    tracks: Path
    chunk: tuple[int, ...] = (5, 10, 25, 50, 100)
    right: tuple[int, ...] = (0, 4, 12, 24, 50)
    left: tuple[int, ...] = (25, 50, 100, 250, 500)
    each: int | None = None
    report: Path
    page: Path
    threads: int = 1


def windows(settings: Gap) -> list[Window]:
    """Every window once: along each axis, through the shipped one."""
    found = [SHIPPED]
    for axis in AXES:
        found += [replace(SHIPPED, **{axis: frames}) for frames in getattr(settings, axis)]
    return list(dict.fromkeys(found))


def measure(
    student: Student,
    window: Window | None,
    corpus: Corpus,
    utterances: Sequence[int],
    recorded: Sequence[Clip],
    simulated: Sequence[Clip],
    tracks: TracksSettings,
) -> dict[str, float]:
    """One window → a number a metric."""
    spoken = utterance_scores(student, corpus, window, utterances=utterances, lengths=("whole",))
    return {
        "recorded": diarization_scores(student, recorded, window, tracks)[0].to_dict()["der"],
        "simulated": diarization_scores(student, simulated, window, tracks)[0].to_dict()["der"],
        "eer": spoken["eer"]["whole"],
        "cer": spoken["words"]["greedy"]["cer"],
    }


def measure_all(settings: Gap) -> dict[str, Any]:
    """Every window of every set of weights."""
    corpus = Corpus(settings.data)
    utterances = dev_utterances(corpus, each=settings.each)
    recorded = read_clips(settings.conversations)
    groups = simulated_clips(corpus, settings.meetings)
    simulated = [clip for clips in groups.values() for clip in clips]
    tracks = TracksSettings.load(settings.tracks) if settings.tracks.exists() else TracksSettings()
    scores: dict[str, Any] = {}
    for name, path in settings.weights.items():
        student = load_student(path)
        scores[name] = []
        for window in (None, *windows(settings)):
            found = measure(student, window, corpus, utterances, recorded, simulated, tracks)
            scores[name].append({"window": _frames(window), **found})
            print(name, _title(_frames(window)), json.dumps(found), flush=True)
    weights = json.dumps({name: str(path) for name, path in settings.weights.items()})
    return {
        "command": f"python -m recipes.gap --set 'weights={weights}'",
        "shipped": _frames(SHIPPED),
        "recorded_s": round(sum(clip.seconds for clip in recorded), 1),
        "simulated_s": round(sum(clip.seconds for clip in simulated), 1),
        "utterances": len(utterances),
        "axes": {axis: getattr(settings, axis) for axis in AXES},
        "scores": scores,
    }


def series(report: Mapping[str, Any], name: str, axis: str) -> list[tuple[int, Any]]:
    """(frames, scores) along an axis in order, the other axes as shipped."""
    shipped = report["shipped"]
    found = [
        (point["window"][axis], point)
        for point in report["scores"][name]
        if point["window"] is not None
        and all(point["window"][other] == shipped[other] for other in AXES if other != axis)
    ]
    return sorted(found, key=lambda pair: pair[0])


def whole(report: Mapping[str, Any], name: str) -> Any:
    """The scores with the whole recording in view."""
    return next(point for point in report["scores"][name] if point["window"] is None)


def draw(report: Mapping[str, Any], path: Path) -> None:
    """The picture: a row a metric, a column an axis, a line a set of weights.

    Raises:
        SystemExit: matplotlib is not installed.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise SystemExit(
            "the picture needs matplotlib; it comes with: pip install 'livesat[recipes]'"
        ) from error
    from matplotlib.figure import Figure

    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "livesat",
        "font.family": "sans-serif",
        "font.size": 9,
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(8.4, 8.8), layout="constrained")
        first = next(iter(report["scores"]))
        panels = figure.subplots(len(METRICS), len(AXES), sharex="col", sharey="row")
        for row, (metric, title) in zip(panels, METRICS.items(), strict=True):
            for panel, (axis, label) in zip(row, AXES.items(), strict=True):
                for color, name in zip(COLORS, report["scores"], strict=False):
                    points = series(report, name, axis)
                    panel.plot(
                        [frames / FRAME_RATE for frames, _ in points],
                        [point[metric] for _, point in points],
                        "o-",
                        color=color,
                        ms=3.5,
                        label=name,
                    )
                    full = whole(report, name)[metric]
                    panel.axhline(full, color=color, ls=":", lw=1.2, label=f"{name}, whole")
                panel.axvline(report["shipped"][axis] / FRAME_RATE, color=INK, lw=0.6, alpha=0.6)
                panel.grid(visible=True, color=INK, alpha=0.2, lw=0.5)
                if axis == "left":  # from half a second to ten
                    seconds = [frames / FRAME_RATE for frames, _ in series(report, first, axis)]
                    panel.set_xscale("log")
                    panel.set_xticks(seconds, [f"{s:g}" for s in seconds], minor=False)
                    panel.minorticks_off()
                if metric == next(reversed(METRICS)):
                    panel.set_xlabel(f"{label}, s")
            row[0].set_ylabel(f"{title}, %")
            values = [p[metric] for points in report["scores"].values() for p in points]
            middle = (max(values) + min(values)) / 2
            reach = max(max(values) - min(values), LEAST_SPAN * max(values)) * 0.55
            row[0].set_ylim(middle - reach, middle + reach)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4, frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
    # matplotlib leaves spaces at the ends of lines
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def page(report: Mapping[str, Any], picture: str) -> str:
    """The numbers as a page of Markdown."""
    names = list(report["scores"])
    shipped = report["shipped"]
    head = [f"{title}, {name}" for title in METRICS.values() for name in names]
    lines = [
        "# The streaming gap",
        "",
        "UniSpeech-SAT attends to a whole recording; a live stream shows it a window. This is what "
        "the window costs the embedded checkpoint: each axis moves alone, the others stay at what "
        f"ships ({_title(shipped)}; thin upright lines). Dotted: the whole recording in view.",
        "",
        f"![DER, EER and CER against chunk, look-ahead and left context]({picture})",
        "",
        "| | " + " | ".join(head) + " |",
        "|---|" + "---:|" * len(head),
    ]
    first = report["scores"][names[0]]
    for place, point in enumerate(first):
        cells = [
            f"{report['scores'][name][place][metric]:.1f}" for metric in METRICS for name in names
        ]
        lines.append(f"| {_title(point['window'])} | " + " | ".join(cells) + " |")
    meaning = {
        "zero-shot": "zero-shot: trained with the whole recording in view only",
        "adapted": "adapted: chunk, left context and look-ahead drawn anew for each batch",
    }
    lines += [
        "",
        "In per cent. "
        + "".join(f"{meaning[name].capitalize()}. " for name in names if name in meaning)
        + f"DER: collar 0, overlap scored, {report['recorded_s']:.0f} s of AMI and "
        f"{report['simulated_s']:.0f} s of simulated conversations, one set of thresholds for all. "
        f"EER and greedy CER: {report['utterances']} utterances of the development speakers, whose "
        "few seconds a left context longer than they are cannot tell apart.",
        "",
        "```sh",
        report["command"],
        "```",
        "",
    ]
    return "\n".join(lines)


def _frames(window: Window | None) -> dict[str, int] | None:
    return None if window is None else {axis: getattr(window, axis) for axis in AXES}


def _title(window: Mapping[str, int] | None) -> str:
    if window is None:
        return WHOLE
    return ", ".join(f"{label} {window[a] / FRAME_RATE:g} s" for a, label in AXES.items())


def main() -> None:
    """Command line."""
    settings = from_arguments(Gap, "gap", "measure what streaming costs")
    torch.set_num_threads(settings.threads)
    report = measure_all(settings)
    for path in (settings.report, settings.page):
        path.parent.mkdir(parents=True, exist_ok=True)
    settings.report.write_text(json.dumps(report, indent=1) + "\n")
    picture = settings.page.with_suffix(".svg")
    draw(report, picture)
    settings.page.write_text(page(report, picture.name))
    print(f"written: {settings.report}, {settings.page}, {picture}")


if __name__ == "__main__":
    main()
