"""Counters of the running process: small, plain, and of bounded size for any length of run."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

_GROWTH: Final = 1.02
"""Width of a histogram's bucket: quantiles are true to 1 %."""

_LEAST: Final = 0.01
"""Smaller values share the first bucket."""


@dataclass(slots=True)
class Histogram:
    """Values ≥ 0 in logarithmic buckets; quantiles are true to 1 %."""

    count: int = 0
    total: float = 0.0
    _buckets: Counter[int] = field(default_factory=Counter[int])

    def observe(self, value: float) -> None:
        """Count one value."""
        self.count += 1
        self.total += value
        self._buckets[0 if value <= _LEAST else math.ceil(_place(value))] += 1

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of all lies; 0 when there are none."""
        rank = q * self.count
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                # The middle of the bucket.
                return 0.0 if bucket == 0 else _LEAST * _GROWTH ** (bucket - 0.5)
        return 0.0

    def cumulative(self, bounds: Sequence[float]) -> list[int]:
        """How many values lie at or below each of these bounds, which ascend.

        A value up to 2 % below a bound, a bucket's width, may count as one above it.
        """
        counts, seen = list[int](), 0
        buckets = sorted(self._buckets, reverse=True)
        for bound in bounds:
            last = math.floor(_place(bound)) if bound > _LEAST else 0
            while buckets and buckets[-1] <= last:
                seen += self._buckets[buckets.pop()]
            counts.append(seen)
        return counts


def _place(value: float) -> float:
    """Where between the buckets' bounds a value above the least lies."""
    return math.log(value / _LEAST) / math.log(_GROWTH)
