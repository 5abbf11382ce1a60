"""What a benchmark prints above its table: the machine, and how fast it multiplies matrices."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch


def describe() -> str:
    """One line: processor, cores, threads, versions."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    return (
        f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}"
    )


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def quantile(values: list[float], q: float) -> float:
    """The q-quantile, nearest rank."""
    return sorted(values)[min(int(q * len(values)), len(values) - 1)]


def gemm_flops(dtype: torch.dtype = torch.float32, size: int = 1024, repeats: int = 30) -> float:
    """Multiply-adds of square matrices a second, times two: the peak a network is held against."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    times = [seconds(lambda: a @ b) for _ in range(repeats)]
    return 2 * size**3 / statistics.median(times)
