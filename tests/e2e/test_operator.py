"""The commands an operator types."""

import asyncio
import json
import os
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest

from sinks.events import parse
from stream import cli
from tests.e2e.conftest import ROOT


def livesat(*arguments, cwd=ROOT, **keys):
    return subprocess.run(
        [sys.executable, "-m", "stream", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        **keys,
    )


def test_the_tour_is_good_and_shown_with_its_defaults():
    assert livesat("config", "check").stdout.startswith("config.yaml: good: 1 source(s)")
    shown = livesat("config", "show").stdout
    assert "lookahead_ms: 240" in shown
    schema = json.loads(livesat("config", "schema").stdout)
    assert {"engine", "sources", "sinks", "server"} <= set(schema["properties"])


def test_the_tour_runs_as_it_is(tmp_path):
    for file in ("config.yaml", "stream/demo/meeting.flac"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).symlink_to(ROOT / file)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = livesat("run", "--config", "config.yaml", cwd=tmp_path, env=env)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr
    events = [parse(line) for line in (tmp_path / "events.jsonl").read_bytes().splitlines()]
    assert (events[0].type, events[-1].type) == ("session.opened", "session.closed")
    assert events[-1].reason == "ended"
    said = [
        " ".join(word.word for word in words)  # a line for each speaker of a final
        for event in events
        if event.type == "transcript.final"
        for _, words in groupby(event.words, lambda word: word.speaker)
    ]
    assert said
    assert all(text in done.stdout for text in said)


def test_a_wrong_configuration_is_a_line_and_an_exit_code(tmp_path):
    (tmp_path / "a.yaml").write_text("server: {host: 0.0.0.0}\n")
    result = livesat("config", "check", "a.yaml", cwd=tmp_path)
    assert result.returncode == 2
    assert "expected a token where others can connect" in result.stderr
    assert "Traceback" not in result.stderr


def test_secrets_are_not_shown(tmp_path):
    hush = "hush-hush-hush-hush"
    (tmp_path / "a.yaml").write_text(
        f"server: {{token: {hush}}}\n"
        f"sinks: {{b: {{kind: mqtt, username: u, password: {hush}}},"
        f" w: {{kind: webhook, url: 'http://h/', secret: {hush}}}}}\n"
    )
    shown = livesat("config", "show", "a.yaml", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    assert hush not in shown.stdout


@pytest.mark.parametrize("url", ["http://127.0.0.1:9", "http://127.0.0.1:80a0"])
def test_a_daemon_that_is_not_there_is_said(url):
    result = livesat("name", "S1", "Anna", "--url", url)
    assert result.returncode == 1
    assert f"{url}: no daemon answers" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_second_signal_is_an_exit_code(monkeypatch, capsys):
    def cancelled(**_):
        raise asyncio.CancelledError

    monkeypatch.setattr(cli, "app", cancelled)
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == cli.INTERRUPTED
    assert capsys.readouterr().err == ""


def test_voices_go_to_a_file_and_come_back(tmp_path):
    import numpy as np

    from stream.voiceprints import Voiceprints

    store, file = tmp_path / "a.db", tmp_path / "voices.json"
    with Voiceprints.open(store) as voices:
        for name in ("Anna", "Ben"):
            voices.add(
                name,
                np.arange(4, dtype=np.float32) + len(name),
                checkpoint="c",
                evidence_s=2.0,
                consent="said yes",
            )
        wanted = voices.voices(), voices.gallery("c")
    assert livesat("export-voices", str(file), "--voices", str(store)).returncode == 0
    assert file.stat().st_mode & 0o077 == 0
    other = tmp_path / "b.db"
    result = livesat("import-voices", str(file), "--voices", str(other))
    assert result.stdout == "2 voice(s): Anna, Ben\n"
    with Voiceprints.open(other) as voices:
        assert voices.voices() == wanted[0]
        assert (voices.gallery("c").vectors == wanted[1].vectors).all()
    again = livesat("import-voices", str(file), "--voices", str(other))
    assert again.returncode == 1
    assert "Anna is enrolled here already" in again.stderr
    file.write_text('{"livesat_voices": 1, "voices": [{"name": "x"}]}')
    broken = livesat("import-voices", str(file), "--voices", str(other))
    assert "expected a file of livesat export-voices" in broken.stderr


THIRD_PARTY = {
    "lamp.py": """
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Literal

from sinks.sink import SinkSettings


class LampSettings(SinkSettings, frozen=True):
    kind: Literal["lamp"] = "lamp"
    path: Path

    @asynccontextmanager
    async def open(self):
        yield Lamp(self.path)


class Lamp:
    def __init__(self, path):
        self.path = path

    async def send(self, event):
        with self.path.open("a") as file:
            file.write(event.type + "\\n")
""",
    "pyproject.toml": """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "livesat-lamp"
version = "1.0"
[project.entry-points."livesat.sinks"]
lamp = "lamp:LampSettings"
[tool.hatch.build.targets.wheel]
only-include = ["lamp.py"]
""",
}


@pytest.mark.slow
def test_a_package_of_someone_else_adds_a_sink(tmp_path):
    project, site = tmp_path / "lamp", tmp_path / "site"
    project.mkdir()
    for name, text in THIRD_PARTY.items():
        (project / name).write_text(text)
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run([*install, "--target", str(site), str(project)], check=True)
    out = tmp_path / "lamp.txt"
    audio = ROOT / "stream" / "demo" / "meeting.flac"
    (tmp_path / "config.yaml").write_text(
        f"sources: {{a: {{kind: file, path: {audio}}}}}\n"
        f"sinks: {{l: {{kind: lamp, path: {out}}}}}\nlog: {{level: error}}\n"
    )
    path = os.pathsep.join([str(site), str(ROOT)])
    result = livesat("run", cwd=tmp_path, env={**os.environ, "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    lines = Path(out).read_text().splitlines()
    assert lines[0] == "session.opened"
    assert lines[-1] == "session.closed"
