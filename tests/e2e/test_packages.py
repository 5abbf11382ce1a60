"""The names we install are ours alone, and the command answers at once."""

import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest


@pytest.mark.parametrize("name", ["stream", "model", "sinks"])
def test_no_other_distribution_owns_our_names(name):
    assert set(packages_distributions().get(name, ["livesat"])) == {"livesat"}


@pytest.mark.parametrize("name", ["stream.cli", "stream.daemon", "stream.config", "sinks"])
def test_importing_it_does_not_import_torch(name):
    code = f"import sys, {name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
