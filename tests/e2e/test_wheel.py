"""The wheel holds all it needs: installed in a new environment it runs from any folder."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, ROOT],
        check=True,
        capture_output=True,
    )
    (built,) = folder.glob("livesat-*.whl")
    return built


def test_it_holds_the_checkpoint_the_demo_and_the_licence(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "model/weights/encoder.safetensors",
        "model/weights/diarization/config.json",
        "model/weights/speaker/config.json",
        "model/weights/ctc/vocab.json",
        "model/weights/ctc/language_model.arpa.gz",
        "model/weights/MODEL_CARD.md",
        "stream/demo/meeting.flac",
        "stream/web/static/index.html",
        "stream/web/static/app.js",
        "stream/demo/meeting.rttm",
    } <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    tops = {name.split("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"stream", "model", "sinks"}
    assert wheel.stat().st_size < 16_000_000


def test_it_runs_in_a_new_environment_from_another_folder(wheel, opening, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = (venv / "lib").glob("python3*/site-packages")
    # The dependencies are those of this environment; its editable livesat comes last.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin/python", "--quiet"]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", wheel], check=True)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = {"cwd": elsewhere, "env": environment, "capture_output": True, "text": True}
    where = subprocess.run(
        [venv / "bin/python", "-c", "import stream; print(stream.__file__)"], check=True, **run
    )
    assert Path(where.stdout.strip()).is_relative_to(venv)
    done = subprocess.run(
        [venv / "bin/livesat", "annotate", opening, "--rttm", "opening.rttm"], timeout=200, **run
    )
    assert done.returncode == 0, done.stderr
    assert (elsewhere / "opening.rttm").read_text().startswith("SPEAKER opening 1 ")
