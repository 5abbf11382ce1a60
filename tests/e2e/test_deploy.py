"""The files an operator deploys with say what the code says."""

import json
import re
import shutil
import subprocess

import pytest
import yaml

from stream.config import load
from tests.e2e.conftest import ROOT

DEPLOY = ROOT / "deploy"


def test_the_composed_configuration_is_good(monkeypatch):
    monkeypatch.setenv("LIVESAT_TOKEN", "a-token-that-is-long-enough")
    config = load(DEPLOY / "config.yaml")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert config.server is not None
    assert config.sinks["broker"].host in compose["services"]
    assert f"127.0.0.1:{config.server.port}:{config.server.port}" in str(compose)
    for service in compose["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            assert source in compose["volumes"] or (DEPLOY / source).is_file()


def test_the_dashboard_asks_for_metrics_there_are():
    """Names as `stream.web.health` gives them."""
    from prometheus_client import CollectorRegistry
    from prometheus_client.exposition import generate_latest

    from stream.fanout import Statistics
    from stream.feed import Feed
    from stream.metrics import Histogram
    from stream.server import Status
    from stream.web.health import Figures

    status = Status(
        **dict.fromkeys(
            (
                "streams",
                "slots",
                "engine_waiting",
                "readers",
                "evicted",
                "tasks",
                "faults",
                "history_bytes",
            ),
            1,
        ),
        **dict.fromkeys(
            (
                "lag_p50_ms",
                "lag_p99_ms",
                "realtime_factor",
                "busy_s",
                "audio_s",
                "compute_s",
                "lost_s",
                "loop_p99_ms",
            ),
            1.0,
        ),
        batches={1: 1},
        events={"gap": 1},
        sinks={"a": Statistics()},
        stopping=False,
    )

    class Desk:
        lag = Histogram()
        feed = Feed()

        def status(self):
            return status

    registry = CollectorRegistry()
    registry.register(Figures(Desk(), []))
    there = set(re.findall(r"^(livesat_\w+)", generate_latest(registry).decode(), re.M))
    panels = json.loads((DEPLOY / "grafana" / "livesat.json").read_text())["panels"]
    asked = {
        name
        for panel in panels
        for target in panel["targets"]
        for name in re.findall(r"livesat_\w+", target["expr"])
    }
    assert asked
    assert asked <= there


def test_the_unit_is_one_systemd_takes(tmp_path):
    unit = (DEPLOY / "livesat.service").read_text()
    assert "Type=notify" in unit
    assert "WatchdogSec=" in unit
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    there = tmp_path / "livesat.service"
    there.write_text(unit.replace("/opt/livesat/bin/livesat", "/bin/true"))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", there], capture_output=True, text=True
    )
    complaints = [line for line in result.stderr.splitlines() if "livesat.service" in line]
    assert complaints == []


def test_the_image_copies_what_the_wheel_needs():
    text = (DEPLOY / "Dockerfile").read_text()
    for part in ("pyproject.toml", "README.md", "LICENSE", "model", "sinks", "stream"):
        assert re.search(rf"^COPY .*\b{re.escape(part)}", text, re.M), part
