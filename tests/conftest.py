"""For every test, and for what was not tested: CI may not be green because programs are missing.

Where ``LIVESAT_STRICT`` is set, as `.ci/run` does, a test that is skipped because a program is
missing fails the run, unless the program is one of ``LIVESAT_EXCUSED``, a name a line. Either way
it is told at the end.
"""

import os
import re
from typing import Final

import pytest
from hypothesis import settings

# A busy machine is no reason to fail.
settings.register_profile("livesat", deadline=None)
settings.load_profile("livesat")

MISSING: Final = re.compile(r"is not installed|microphone needs|could not import|makes the cert")
"""In the reason of a test that is skipped because a program or a package of it is missing."""


def unproven(config: pytest.Config) -> dict[str, tuple[str, bool]]:
    """Test → why it was skipped, and whether that is excused; of those that miss a program."""
    if not os.environ.get("LIVESAT_STRICT") or hasattr(config, "workerinput"):
        return {}
    excused = os.environ.get("LIVESAT_EXCUSED", "").split()
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    reports = terminal.stats.get("skipped", []) if terminal is not None else []
    found: dict[str, tuple[str, bool]] = {}
    for report in reports:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if MISSING.search(reason):
            words = set(re.findall(r"[\w.+-]+", reason))
            found[report.nodeid] = reason, bool(words & set(excused))
    return found


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if something was not tested that could have been."""
    if session.exitstatus == 0 and not all(ok for _, ok in unproven(session.config).values()):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Say loudly what was not tested."""
    found = unproven(config)
    if found:
        terminalreporter.section("NOT PROVEN: programs were missing", red=True, bold=True)
    for test, (reason, ok) in found.items():
        terminalreporter.line(f"{'excused' if ok else 'FAILED '}  {test}: {reason}")
