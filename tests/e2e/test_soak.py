"""The soak and other long runs at a size that fits here, judged but for lateness."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.verdict import Verdict
from tests.e2e.conftest import ROOT

pytestmark = pytest.mark.broker


def benchmark(name, *given):
    command = [sys.executable, "-m", f"benchmarks.{name}", *given]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.slow
@pytest.mark.mic
def test_every_kind_of_source_and_sink_keeps_its_accounts():
    said = benchmark("soak", "--minutes", "0.35", "--untimed")
    assert "8 streams" in said


@pytest.mark.slow
def test_a_broker_that_dies_and_hangs_costs_no_final():
    said = benchmark("brokers", "kills", "--times", "1")
    assert "finals not stored" in said


@pytest.mark.slow
def test_a_broker_that_is_away_costs_no_final_and_little_memory():
    said = benchmark("brokers", "outage", "--minutes", "0.1", "--untimed")
    assert "growth of memory" in said


def test_what_is_not_within_its_bar_fails_and_is_named():
    verdict = Verdict("a run")
    verdict.most("growth", 3.5, 4, "MiB")
    verdict.least("rate", 5, 5)
    verdict.exactly("holes", 0, 0)
    verdict.tell("events", 12_345)
    with Path(os.devnull).open("w") as nowhere:
        assert verdict.show(Console(file=nowhere))
        verdict.most("lag", float("nan"), 20, "ms")
        verdict.exactly("lost", 1, 0)
        assert not verdict.show(Console(file=nowhere))
    assert verdict.failed == ["lag nan ms, expected ≤ 20", "lost 1, expected = 0"]
