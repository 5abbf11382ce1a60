"""CI is not green because a program was missing."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT

TESTS = """
import pytest

def test_of_a_program():
    pytest.skip("nonesuch is not installed")

def test_of_another_system():
    pytest.skip("no signals")

def test_of_ours():
    pass
"""


@pytest.fixture
def suite(tmp_path):
    """Run a suite of three tests under our conftest → exit code, output."""
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_it.py").write_text(TESTS)

    def run(*given, **env):
        ours = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "LIVESAT_"))}
        command = [sys.executable, "-m", "pytest", "-c", os.devnull, "--rootdir", tmp_path, *given]
        result = subprocess.run(
            [*command, tmp_path], cwd=tmp_path, env={**ours, **env}, capture_output=True, text=True
        )
        return result.returncode, result.stdout + result.stderr

    return run


@pytest.mark.parametrize("given", [(), ("-n", "1")])
def test_a_skip_for_a_missing_program_fails_a_strict_run(suite, given):
    code, said = suite(*given, LIVESAT_STRICT="1")
    assert code == 1
    assert "NOT PROVEN" in said
    assert "FAILED   test_it.py::test_of_a_program: Skipped: nonesuch is not installed" in said
    assert "test_of_another_system:" not in said


def test_what_could_not_be_installed_is_excused_and_told(suite):
    code, said = suite(LIVESAT_STRICT="1", LIVESAT_EXCUSED="chromium\nnonesuch")
    assert code == 0
    assert "excused  test_it.py::test_of_a_program: Skipped: nonesuch is not installed" in said


def test_a_run_of_ones_own_is_not_strict(suite):
    code, said = suite()
    assert code == 0
    assert "NOT PROVEN" not in said


@pytest.mark.parametrize("script", ["run", "system", "python"])
def test_the_scripts_are_good_shell(script):
    subprocess.run(["sh", "-n", ROOT / ".ci" / script], check=True)


def test_what_is_absent_is_named_by_package_and_command():
    given = ["some-package:nonesuch:a feature", "shell:sh:everything", "none:libnone.so.9:more"]
    command = ["sh", ROOT / ".ci" / "system", "--absent", *given]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(said.split()) == {"some-package", "nonesuch", "none", "libnone.so.9"}
