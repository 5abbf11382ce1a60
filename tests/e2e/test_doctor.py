"""`livesat doctor`, as an operator types it."""

import socket

import pytest
import yaml

from stream import doctor


@pytest.fixture(autouse=True)
def no_engine(monkeypatch):
    """The checkpoint is looked at elsewhere; here it costs seconds."""

    async def none(settings):
        for finding in ():
            yield finding

    monkeypatch.setattr(doctor, "_engine", none)


@pytest.fixture
def file(tmp_path):
    """A configuration of sinks → its file."""

    def write(sinks, **keys):
        path = tmp_path / "a.yaml"
        path.write_text(
            yaml.safe_dump({"sources": {"a": {"kind": "stdin"}}, "sinks": sinks} | keys)
        )
        return path

    return write


def test_a_machine_that_can_do_it_is_success(livesat, file, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as broker:
        port = broker.getsockname()[1]
        sinks = {"m": {"kind": "mqtt", "host": "127.0.0.1", "port": port}}
        told = livesat("doctor", "--config", file(sinks, voiceprints=str(tmp_path / "v.db")))
    assert told.code == 0, told.out
    assert told.err == ""
    assert f"✓ sink m          mqtt at 127.0.0.1:{port} answers\n" in told.out
    assert "✗" not in told.out


def test_what_is_wrong_is_a_line_with_its_fix_and_an_exit_code(livesat, file, tmp_path):
    sinks = {
        "k": {"kind": "kafka", "brokers": ["127.0.0.1:9"]},
        "n": {"kind": "nats", "servers": ["nats://user:hush@127.0.0.1:9"]},
        "w": {"kind": "webhook", "url": "http://127.0.0.1:9/in"},
    }
    outbox = tmp_path / "text"
    outbox.write_text("not a database at all")
    told = livesat("doctor", "--config", file(sinks, fanout={"outbox": str(outbox)}))
    assert told.code == 1
    assert told.err == ""
    bad = [line for line in told.out.splitlines() if line.startswith("✗")]
    assert [line[2:18].strip() for line in bad] == ["sink k", "sink n", "sink w", "fanout.outbox"]
    assert all("  → " in line for line in bad)
    assert "hush" not in told.out


def test_a_configuration_that_is_wrong_is_said_before(livesat, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("sinks: {m: {kind: mqt}}\nserver: {}\n")
    livesat("doctor", "--config", path).complains("sinks.m", "mqtt", code=2)
