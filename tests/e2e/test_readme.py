"""What the README shows works as it stands."""

import re
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT

README = (ROOT / "README.md").read_text()


def test_the_example_runs(tmp_path):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    assert len(example.splitlines()) <= 5
    done = subprocess.run(
        [sys.executable, "-c", example], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "TurnEnded" in done.stdout or "turn.ended" in done.stdout
    assert "session.closed" in done.stdout


@pytest.mark.parametrize("target", sorted(set(re.findall(r"make (\w+)", README))))
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_command_exists(livesat):
    listed = livesat("--help").out
    shown = "".join(re.findall(r"```\n(.*?)```", README, re.DOTALL))
    commands = set(re.findall(r"\blivesat (\w+)", shown))
    assert len(commands) > 4
    for command in commands:
        assert re.search(rf"^  {command}\s", listed, re.MULTILINE), command


def test_every_link_leads_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), target
