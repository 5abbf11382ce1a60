"""What does a second of audio cost, streamed and offline, ours and published?

    python -m benchmarks.encoder            # the comparison, about two minutes
    python -m benchmarks.encoder --hour     # also every chunk of a real hour, a quarter of an hour

The cost of minute 60 is that of a stream whose counters were set forward: its cache was full after
``--left`` seconds, and nothing but the counters changes from then on. ``--hour`` streams it all.

All ways run in turn within one process, round after round, so that a noisy machine slows all of
them; ratios are of medians. Weights are random: time does not depend on them.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from benchmarks.machine import describe, gemm_flops, quantile, seconds
from model.config import UniSpeechSatConfig
from model.encoder import UniSpeechSatModel
from model.state import Window

RATE = 16_000


@dataclass
class Way:
    """One way of encoding, and its seconds of compute per second of audio, round by round."""

    name: str
    flops: float
    costs: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """Seconds of compute per second of audio."""
        return statistics.median(self.costs)


def warm(run: Callable[[], object]) -> float:
    """Seconds of the second of two calls: the first pays for what ran before it."""
    run()
    return seconds(run)


def flops(config: UniSpeechSatConfig, frames: int, keys: float, new: int) -> float:
    """Floating-point operations of ``frames`` computed against ``keys``, ``new`` of them decoded.

    Convolutions of the front end for the new frames; position embedding, projections, attention
    and feed-forward for all computed ones. Two operations a multiply-add; norms are left out.
    """
    D, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    hop = config.inputs_to_logits_ratio
    total, outputs, inputs = 0.0, new * hop, 1
    for dim, kernel, stride in zip(
        config.conv_dim, config.conv_kernel, config.conv_stride, strict=True
    ):
        outputs //= stride
        total += 2.0 * outputs * dim * inputs * kernel
        inputs = dim
    total += 2.0 * new * inputs * D
    position = D * D / config.num_conv_pos_embedding_groups * config.num_conv_pos_embeddings
    layer = 4 * D * D + 2 * D * inner + 2 * D * keys
    return total + 2.0 * frames * (position + layers * layer)


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunk", type=float, default=0.5, help="seconds")
    parser.add_argument("--lookahead", type=float, default=0.24, help="seconds")
    parser.add_argument("--left", type=float, default=10.0, help="seconds")
    parser.add_argument("--streams", type=int, default=4, help="of the batched way")
    parser.add_argument("--hour", action="store_true", help="stream a whole hour, chunk by chunk")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    config = UniSpeechSatConfig()
    ours = UniSpeechSatModel(config).eval()
    theirs = transformers.UniSpeechSatModel(transformers.UniSpeechSatConfig()).eval()
    window = Window(
        chunk=round(args.chunk * 50), left=round(args.left * 50), right=round(args.lookahead * 50)
    )
    size = window.chunk * config.inputs_to_logits_ratio
    state, many = ours.zeros(1, window), ours.zeros(args.streams, window)
    utterance, five = torch.randn(1, 20 * RATE), torch.randn(1, 5 * RATE)
    computed = window.chunk + window.right
    T, W = config.frames(20 * RATE), config.frames(5 * RATE)
    streamed, batched = (
        Way(
            f"ours, streaming, {streams} stream{'s a batch' if streams > 1 else ''}",
            flops(config, computed, computed + window.left, window.chunk) / args.chunk,
        )
        for streams in (1, args.streams)
    )
    offline = Way("ours, offline 20 s", flops(config, T, T, T) / 20)
    published = Way("transformers, offline 20 s", offline.flops)
    sliding = Way("transformers, 5 s window every 0.5 s", flops(config, W, W, W) / 0.5)

    def step() -> None:
        ours.step(torch.randn(1, size), state)

    def step_many() -> None:
        ours.step(torch.randn(args.streams, size), many)

    minutes: list[float] = []
    with torch.inference_mode():
        for _ in range(round(args.left / args.chunk) + 2):  # fill the cache
            step()
            step_many()
        for model, audio in ((ours, utterance), (theirs, utterance), (theirs, five)):
            model(audio)
        for _ in range(args.rounds):
            steps = [seconds(step) for _ in range(20)]
            streamed.costs.append(statistics.median(steps) / args.chunk)
            steps = [seconds(step_many) for _ in range(5)]
            batched.costs.append(statistics.median(steps) / args.chunk / args.streams)
            offline.costs.append(warm(lambda: ours(utterance)) / 20)
            published.costs.append(warm(lambda: theirs(utterance)) / 20)
            windows = [seconds(lambda: theirs(five)) for _ in range(3)]
            sliding.costs.append(statistics.median(windows) / 0.5)
        late = ours.zeros(1, window)
        for _ in range(round(args.left / args.chunk) + 2):
            ours.step(torch.randn(1, size), late)
        late.steps += round(59 * 60 / args.chunk)
        late.received += 59 * 60 * RATE
        pairs = [
            (seconds(step), seconds(lambda: ours.step(torch.randn(1, size), late)))
            for _ in range(40)
        ]
        peak = gemm_flops()
        if args.hour:
            state = ours.zeros(1, window)
            per_minute = round(60 / args.chunk)
            for _ in range(60):
                steps = [seconds(step) for _ in range(per_minute)]
                minutes.append(statistics.median(steps) / args.chunk)

    print(describe())
    print(f"UniSpeech-SAT Base, fp32, random weights; {peak / 1e9:.0f} GFLOP/s at 1024³ GEMM")
    print(
        f"chunk {window.chunk * 20} ms, look-ahead {window.right * 20} ms, "
        f"left context {window.left * 20} ms\n"
    )
    ways = [streamed, batched, offline, published, sliding]
    print(f"{'':38}{'s / audio s':>12}{'p99':>8}{'GFLOP/s':>9}{'× floor':>9}{'vs streaming':>14}")
    for way in ways:
        ratio = way.median / streamed.median
        rate = way.flops / way.median
        print(
            f"{way.name:38}{way.median:12.3f}{quantile(way.costs, 0.99):8.3f}{rate / 1e9:9.0f}"
            f"{peak / rate:9.2f}{ratio:13.2f}×"
        )
    print()
    for way in (streamed, batched):
        print(f"{way.name}: {sliding.median / way.median:.1f}× cheaper than the sliding window")
    print(f"offline takes {offline.median / published.median:.2f} of transformers' time")
    minute1, minute60 = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"minute 60 costs {minute60 / minute1:.3f} of minute 1 (40 steps each, in turn)")
    result = {way.name: {"median": way.median, "flops": way.flops} for way in ways}
    if minutes:
        first, last = statistics.median(minutes[:3]), statistics.median(minutes[-3:])
        spread = [f"{m:.3f}" for m in (minutes[0], minutes[29], minutes[59])]
        print(f"minute 1, 30, 60 of one stream: {', '.join(spread)} s / audio s")
        print(f"last three minutes / first three: {last / first:.3f}")
        result["minutes"] = {str(i + 1): m for i, m in enumerate(minutes)}
    if args.json:
        args.json.write_text(json.dumps(result | {"peak": peak, "machine": describe()}, indent=2))


if __name__ == "__main__":
    main()
