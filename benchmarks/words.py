"""What does decoding words cost a stream, and what does the language model give?

Synthetic posteriors of the demo's sentences, as a good and as a weak acoustic model would give
them, then the demo itself as the embedded checkpoint hears it, then silence, through the tracks in
chunks of half a second. The two decoders take turns.

    python -m benchmarks.words
"""

import argparse
import statistics
import time
from importlib.resources import files
from pathlib import Path

import numpy as np
import soundfile
from numpy.typing import NDArray

from benchmarks.machine import describe
from recipes.diarization import stamp
from recipes.export import load_student
from recipes.hearing import SHIPPED, listen
from recipes.student import VOCABULARY
from sinks.events import Event
from stream.clock import FRAME_RATE, HOP
from stream.evaluate import flicker, transcript
from stream.score import Edits, character_errors, plain, word_errors
from stream.tracks.frames import Frames, Vocabulary
from stream.tracks.language import NAMES, LanguageModel
from stream.tracks.pipeline import Tracks
from stream.tracks.settings import TracksSettings

CHUNK = 25
SYMBOLS = Vocabulary(VOCABULARY, blank=0)
WEIGHTS = Path(str(files("model"))) / "weights/ctc"


def posteriors(text: str, rng: np.random.Generator, margin: float) -> NDArray[np.float32]:
    """Log-probabilities [T, V]: every character leads all others by ``margin`` on average.

    A character takes 1 or 2 frames and 1 to 3 of silence follow it, 14 characters a second.
    """
    size = len(VOCABULARY)
    quiet = np.zeros(size)
    quiet[0] = 12
    rows = [quiet] * 10
    for character in text.upper().replace(" ", "|"):
        if character not in VOCABULARY:
            continue
        row = rng.normal(0, 1.6, size)
        row[:4] = (1, -9, -9, -9)
        row[VOCABULARY.index(character)] += margin
        rows += [row] * int(rng.integers(1, 3)) + [quiet * 0.7] * int(rng.integers(1, 4))
    table = np.array([*rows, *[quiet] * 60])
    return (table - np.log(np.exp(table).sum(1, keepdims=True))).astype(np.float32)


def hear(scores: NDArray[np.float32], language: LanguageModel | None) -> tuple[list[Event], float]:
    """A stream's events, and the seconds that the tracks took for them."""
    tracks = Tracks(TracksSettings(), vocabulary=SYMBOLS, language=language, stamp=stamp())
    events: list[Event] = []
    began = time.process_time()
    for first in range(0, len(scores), CHUNK):
        events += tracks.step(Frames(first * HOP, ctc=scores[first : first + CHUNK]))
    events += tracks.flush(len(scores) * HOP)
    return events, time.process_time() - began


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, usage="python -m benchmarks.words")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    demo = (files("stream") / "demo/meeting.txt").read_text(encoding="utf-8")
    texts = [plain(line.partition(":")[2]) for line in demo.splitlines() if line.strip()]
    silence = np.full((60 * FRAME_RATE, len(VOCABULARY)), -12, np.float32)
    silence[:, 0] = -1e-3
    meeting, _ = soundfile.read(str(files("stream") / "demo/meeting.flac"), dtype="float32")
    heard = listen(load_student(WEIGHTS.parent).eval(), meeting, SHIPPED)
    scenes = {
        "good ear": [(text, posteriors(text, rng, 6.5)) for text in texts],
        "weak ear": [(text, posteriors(text, rng, 4.5)) for text in texts],
        "the demo": [(" ".join(texts), heard.characters)],
        "silence": [("", silence)],
    }
    language = LanguageModel.load(WEIGHTS / NAMES[0])
    print(describe())
    print(f"{'':10}{'decoder':>8}{'WER':>8}{'CER':>8}{'changed':>9}{'% of a core':>13}{'×':>7}")
    for name, scene in scenes.items():
        costs: dict[str, list[float]] = {"greedy": [], "beam": []}
        for number in range(args.rounds):
            for decoder, model in (("greedy", None), ("beam", language)):
                words, characters, told, changed, spent = Edits(), Edits(), 0, 0, 0.0
                for text, scores in scene:
                    events, seconds = hear(scores, model)
                    spent += seconds
                    counts = flicker(events)
                    told, changed = told + counts[0], changed + counts[1]
                    if name != "silence":
                        words += word_errors(text, transcript(events))
                        characters += character_errors(text, transcript(events))
                costs[decoder].append(spent * FRAME_RATE / sum(len(scores) for _, scores in scene))
                if number + 1 < args.rounds:
                    continue
                cost = statistics.median(costs[decoder])
                ratio = cost / statistics.median(costs["greedy"])
                errors = f"{100 * words.rate:7.1f}%{100 * characters.rate:7.1f}%"
                errors += f"{100 * changed / max(told, 1):8.1f}%"
                errors = " " * len(errors) if name == "silence" else errors
                print(f"{name:10}{decoder:>8}{errors}{100 * cost:13.2f}{ratio:6.1f}×")


if __name__ == "__main__":
    main()
