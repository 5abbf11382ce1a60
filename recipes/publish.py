"""Measured numbers → tables in the documents, between markers: nobody types a number.

``<!-- scores:begin -->`` … ``<!-- scores:end -->`` in a document holds what this makes of the JSON
that `recipes.score` wrote, ``summary`` a shorter table, ``peers`` what `recipes.peers` wrote. With
``--check`` nothing is written: the exit code says whether the documents are up to date.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

Mode = Mapping[str, Any]
Row = tuple[str, Callable[[Mode], str]]

SCORES: Final = Path("docs/scores.json")
PEERS: Final = Path("docs/peers.json")
DOCUMENTS: Final = (
    Path("README.md"),
    Path("model/weights/MODEL_CARD.md"),
    Path("docs/benchmarks.md"),
)
BLOCK: Final = re.compile(r"(<!-- (\w+):begin -->\n)(.*?)(<!-- \2:end -->)", re.DOTALL)


def table(columns: Mapping[str, Mode], rows: Sequence[Row]) -> str:
    """A Markdown table: one column a mode, one row a number."""
    lines = ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    lines += [
        f"| {name} | " + " | ".join(of(mode) for mode in columns.values()) + " |"
        for name, of in rows
    ]
    return "\n".join(lines)


def diarization_rows(modes: Mapping[str, Mode]) -> list[Row]:
    """Errors on the recorded conversations and on the simulated ones, by number of speakers."""
    rows: list[Row] = [
        ("**DER**, recorded (AMI)", lambda m: _rate(m["recorded"]["der"])),
        ("… missed / false alarm / confusion", lambda m: _parts(m["recorded"])),
        ("… speakers found", lambda m: _found(m["recorded"])),
    ]
    first = next(iter(modes.values()))
    rows += [
        (
            "**DER**, simulated" + ("" if count == "all" else f", {count} speakers"),
            lambda m, c=count: _of(m, c, lambda error: _rate(error["der"])),
        )
        for count in first["simulated"]
    ]
    rows += [
        ("… missed / false alarm / confusion", lambda m: _of(m, "all", _parts)),
        ("… speakers found", lambda m: _of(m, "all", _found)),
        ("… too many or few a conversation", lambda m: _of(m, "all", _miscounted)),
    ]
    return rows


def voice_rows(modes: Mapping[str, Mode]) -> list[Row]:
    """Verification and identification."""
    lengths = next(iter(modes.values()))["eer"]
    rows: list[Row] = [
        (f"**EER**, {length}", lambda m, n=length: _fine(m["eer"][n])) for length in lengths
    ]
    rows += [
        (
            "**identification**: false accept / false reject / wrong name",
            lambda m: " / ".join(
                _rate(m["identification"][key]) for key in ("false_accept", "false_reject", "wrong")
            ),
        ),
        ("… where both errors are equal", lambda m: _rate(m["identification"]["equal"])),
    ]
    return rows


def word_rows(modes: Mapping[str, Mode]) -> list[Row]:
    """Recognition, by way of decoding."""
    rows: list[Row] = []
    for way in next(iter(modes.values()))["words"]:
        rows += [
            (f"**CER**, {way}", lambda m, w=way: _rate(m["words"][w]["cer"])),
            (f"**WER**, {way}", lambda m, w=way: _rate(m["words"][w]["wer"])),
        ]
    return rows


def scores_block(report: Mapping[str, Any]) -> str:
    """All numbers of a checkpoint, whole and streamed, and how they were got."""
    modes: Mapping[str, Mode] = report["modes"]
    rows = diarization_rows(modes) + voice_rows(modes) + word_rows(modes)
    minutes = sum(report["simulated_s"].values()) / 60
    return "\n".join(
        [
            table(modes, rows),
            "",
            f"In per cent; streams by algorithmic latency (chunk + look-ahead). {_cost(report)} "
            f"DER: collar 0, overlap scored; {report['recorded_s']:.0f} s of AMI and "
            f"{minutes:.0f} min of simulated conversations of the development speakers. EER: all "
            f"pairs of {report['utterances']} utterances of {report['speakers']} speakers. "
            "Identification: half of them enrolled from three utterances each, at the shipped "
            "thresholds.",
            "",
            "```sh",
            report["command"],
            "```",
        ]
    )


def summary_block(report: Mapping[str, Any]) -> str:
    """The main numbers only."""
    modes: Mapping[str, Mode] = report["modes"]
    kept = [row for row in diarization_rows(modes) if row[0].startswith("**DER**")]
    voices = [row for row in voice_rows(modes) if row[0].startswith("**EER**")]
    return "\n".join([table(modes, kept + voices + word_rows(modes)), "", _cost(report)])


def peers_block(report: Mapping[str, Any]) -> str:
    """What public parts reach on the same data."""
    lines: list[str] = []
    columns: dict[str, Mode] = {}
    if "senko" in report:
        columns["senko, offline"] = report["senko"]
    for latency, mode in report.get("diart", {}).get("latencies", {}).items():
        columns[f"diart, {latency}"] = mode
    if columns:
        lines += [table(columns, diarization_rows(columns)), ""]
    if "CAM++" in report:
        of = report["CAM++"]
        rates = ", ".join(f"{_fine(rate)} ({length})" for length, rate in of["eer"].items())
        lines.append(
            f"- CAM++: EER {rates}; identification, where both errors are equal: "
            f"{_rate(of['identification']['equal'])}"
        )
    if "Whisper tiny.en" in report:
        of = report["Whisper tiny.en"]
        lines.append(f"- Whisper tiny.en, offline: CER {_rate(of['cer'])}, WER {_rate(of['wer'])}")
    if "diart" in report:
        lines.append(
            f"- a live stream of diart takes {report['diart']['core_percent']} % of a core"
        )
    return "\n".join([*lines, "", "```sh", report["command"], "```"])


def filled(text: str, blocks: Mapping[str, str], where: str) -> str:
    """A document with every block between its markers.

    Raises:
        ValueError: a marker names no block, or begins and does not end.
    """

    def block(match: re.Match[str]) -> str:
        name = match[2]
        if name not in blocks:
            raise ValueError(
                f"{where}: expected a marker of {', '.join(sorted(blocks))}, got {name!r}"
            )
        return f"{match[1]}\n{blocks[name]}\n\n{match[4]}"

    result, found = BLOCK.subn(block, text)
    if found != text.count(":begin -->"):
        raise ValueError(f"{where}: a marker NAME:begin has no NAME:end after it")
    return result


def blocks(scores: Path = SCORES, peers: Path = PEERS) -> dict[str, str]:
    """Block name → Markdown."""
    ours, theirs = json.loads(scores.read_text()), json.loads(peers.read_text())
    return {
        "scores": scores_block(ours),
        "summary": summary_block(ours),
        "peers": peers_block(theirs),
    }


def _of(mode: Mode, group: str, cell: Callable[[Mapping[str, float]], str]) -> str:
    """A cell about a group of simulated conversations, or a dash where it was not measured."""
    return cell(mode["simulated"][group]) if group in mode["simulated"] else "–"


def _rate(value: float) -> str:
    return f"{value:.1f}"


def _fine(value: float) -> str:
    return f"{value:.2f}"


def _parts(error: Mapping[str, float]) -> str:
    return " / ".join(_rate(error[key]) for key in ("missed", "false_alarm", "confusion"))


def _found(error: Mapping[str, float]) -> str:
    return f"{error['speakers_found']} of {error['speakers']}"


def _miscounted(error: Mapping[str, float]) -> str:
    return _fine(error["speaker_count_error"] / error["conversations"])


def _cost(report: Mapping[str, Any]) -> str:
    shipped = report["shipped_ms"]
    return (
        f"A live stream takes {_rate(report['core_percent'])} % of one core (chunk "
        f"{shipped['chunk']} ms, look-ahead {shipped['lookahead']} ms, one thread)."
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m recipes.publish", description="write the measured tables"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if stale")
    check = parser.parse_args().check
    made = blocks()
    stale: list[str] = []
    for path in DOCUMENTS:
        text = path.read_text()
        new = filled(text, made, str(path))
        if new != text:
            stale.append(str(path))
            if not check:
                path.write_text(new)
    if check and stale:
        raise SystemExit(f"stale: {', '.join(stale)}; run python -m recipes.publish")
    print(f"{'stale' if check else 'written'}: {', '.join(stale) or 'nothing'}")


if __name__ == "__main__":
    main()
