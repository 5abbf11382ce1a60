import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from recipes.loop import device_of, ramp, resume, sparkline, train

ROOT = Path(__file__).parents[2]


class Countdown:
    """A run whose loss depends on every step it ever made."""

    def __init__(self, steps, at=None):
        self.step, self.steps, self.total, self.at = 0, steps, torch.zeros(1), at or {}

    def advance(self):
        if self.step in self.at:
            self.at[self.step]()
        self.step += 1
        self.total += 1 / self.step
        return {"loss": float(self.total)}

    def state(self):
        return {"total": self.total}

    def load(self, state):
        self.total = state["total"]


def losses(folder):
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines]


def test_a_run_goes_to_its_end_and_stays_there(tmp_path):
    train(Countdown(10), tmp_path, name="x", log_steps=4, keep=[5])
    assert [step for step, _ in losses(tmp_path)] == [4, 8, 10]
    assert (tmp_path / "step-5.pt").exists()
    again = Countdown(10)
    train(again, tmp_path, name="x")
    assert again.step == 10
    assert len(losses(tmp_path)) == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_told_to_stop_it_saves_and_goes_on_as_if_nothing_had_been(tmp_path, number):
    whole = Countdown(12)
    train(whole, tmp_path / "whole", name="x", log_steps=1)
    before = signal.getsignal(number)
    cut = Countdown(12, {6: lambda: os.kill(os.getpid(), number)})
    train(cut, tmp_path / "cut", name="x", log_steps=1)
    assert cut.step == 7
    assert signal.getsignal(number) is before
    rest = Countdown(12)
    train(rest, tmp_path / "cut", name="x", log_steps=1)
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    assert torch.equal(rest.total, whole.total)


def test_nothing_to_resume(tmp_path):
    assert not resume(Countdown(3), tmp_path)


def test_the_rate_rises_stays_and_falls():
    assert ramp(0, 100, 10, 20) == pytest.approx(0.1)
    assert ramp(50, 100, 10, 20) == 1
    assert ramp(90, 100, 10, 20) == pytest.approx(0.5)
    assert ramp(100, 100, 10, 20) == 0


def test_curves():
    assert sparkline([3, 2, 1, float("nan")]) == "█▅▁"
    assert sparkline([1, 1]) == "▁▁"
    assert sparkline([]) == ""


def test_a_device_that_is_not_there():
    if torch.cuda.is_available():
        pytest.skip("there is one here")
    with pytest.raises(SystemExit, match="there is no CUDA device"):
        device_of("cuda")


SCRIPT = """
import sys, torch
from pathlib import Path
from recipes.loop import average_gradients, device_of, train, world

class Line:
    def __init__(self, who):
        self.step, self.steps, self.who = 0, 5, who
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.unused = torch.nn.Parameter(torch.ones(1))
    def advance(self):
        self.step += 1
        self.weight.grad = None
        ((self.weight - 2.0 * self.who.rank) ** 2).sum().backward()
        average_gradients([self.weight, self.unused])
        with torch.no_grad():
            self.weight -= 0.5 * self.weight.grad
        return {"loss": float(self.weight.detach())}
    def state(self):
        return {"weight": self.weight.detach()}
    def load(self, state):
        self.weight.data.copy_(state["weight"])

with world(device_of("cpu")) as who:
    line = Line(who)
    train(line, Path(sys.argv[1]), name="x", log_steps=1, who=who)
    assert abs(float(line.weight) - 1.0) < 1e-6, float(line.weight)  # the mean of both wishes
"""


def test_two_processes_average_their_gradients_and_one_writes(tmp_path):
    script = tmp_path / "line.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-port", "0", "--standalone", str(script), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5]
