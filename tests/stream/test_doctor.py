"""What the doctor says of networks and files: real sockets, open and closed, and real files."""

import asyncio
import socket
import ssl
from contextlib import asynccontextmanager
from typing import Literal

import pytest

from sinks.sink import SinkSettings
from stream import doctor
from stream.doctor import examine
from stream.voiceprints import Voiceprints
from tests.certificates import certificates, without_openssl
from tests.stream.house import free_port
from tests.stream.test_daemon import config

__all__ = ["certificates"]

KINDS = {"mqtt", "nats", "kafka", "redis", "webhook"}
PLAIN = b'INFO {"server_id": "x"}\r\n'
ENCRYPTED = b'INFO {"server_id": "x", "tls_required": true}\r\n'


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """No engine, microphone or home of this machine; time-outs that a test can wait for."""

    async def none(settings):
        for finding in ():
            yield finding

    monkeypatch.setattr(doctor, "_engine", none)
    monkeypatch.setattr(doctor, "TRIES_S", 2.0)
    monkeypatch.setattr(doctor, "default_path", lambda: tmp_path / "home" / "voices.db")
    monkeypatch.setattr("urllib.request.getproxies", dict)


async def found(checkpoint, sinks=None, sources=None, **keys):
    """subject → finding, of what differs between configurations."""
    settings = config(checkpoint, sources or {"in": {"kind": "stdin"}}, sinks, **keys)
    return {finding.subject: finding async for finding in examine(settings)}


@asynccontextmanager
async def listening(greeting=b"", context=None, upgrade=None, login=b""):
    """A receiver that counts who comes → port, what they sent."""
    heard: list[bytes] = []

    async def serve(reader, writer):
        try:
            heard.append(b"")
            if greeting:
                writer.write(greeting)
                await writer.drain()
            if upgrade is not None:
                await writer.start_tls(upgrade)
            while data := await reader.read(4096):
                heard[-1] += data
                if login:
                    writer.write(login)
        except OSError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1], heard
    finally:
        server.close()


def sink(kind, port, **keys):
    """Settings of a sink whose receiver is at a port of this machine."""
    where = {
        "mqtt": {"host": "127.0.0.1", "port": port},
        "redis": {"host": "127.0.0.1", "port": port},
        "nats": {"servers": [f"nats://127.0.0.1:{port}"]},
        "kafka": {"brokers": [f"127.0.0.1:{port}"]},
        "webhook": {"url": f"{'https' if keys.get('tls') else 'http'}://127.0.0.1:{port}/in"},
    }[kind]
    return {"kind": kind, **where, **keys}


@pytest.mark.parametrize("kind", sorted(KINDS))
class TestReceivers:
    async def test_one_that_listens_is_reached(self, checkpoint, monkeypatch, kind):
        async with listening(PLAIN if kind == "nats" else b"") as (port, heard):
            monkeypatch.setattr(doctor, "_refusal", answers_nothing)
            finding = (await found(checkpoint, {"x": sink(kind, port)}))["sink x"]
        assert (finding.state, finding.text) == ("ok", f"{kind} at 127.0.0.1:{port} answers")
        assert heard == [b""]  # nobody was logged in: a daemon under the same name runs on

    async def test_a_closed_port_is_bad(self, checkpoint, kind):
        port = free_port()
        finding = (await found(checkpoint, {"x": sink(kind, port)}))["sink x"]
        assert finding.state == "bad"
        assert f"127.0.0.1:{port}" in finding.text
        assert "sinks.x" in finding.fix

    async def test_a_driver_that_is_absent_is_bad(self, checkpoint, monkeypatch, kind):
        monkeypatch.setitem(doctor._DRIVERS, kind, "no_such_driver")
        finding = (await found(checkpoint, {"x": sink(kind, 1)}))["sink x"]
        assert (finding.state, finding.fix) == ("bad", f"pip install 'livesat[{kind}]'")

    @without_openssl
    @pytest.mark.parametrize(
        ("certificate", "authority", "said"),
        [
            ("good", "ca", None),
            ("good", "other", "certificate verify failed"),
            ("expired", "ca", "certificate has expired"),
        ],
    )
    async def test_tls_is_spoken_where_it_is_set(
        self, checkpoint, certificates, monkeypatch, kind, certificate, authority, said
    ):
        monkeypatch.setattr(doctor, "_refusal", answers_nothing)
        context = await asyncio.to_thread(server_context, certificates, certificate)
        nats = {"greeting": ENCRYPTED, "upgrade": context}
        tls = {"ca_file": certificates / f"{authority}.pem"}
        async with listening(**(nats if kind == "nats" else {"context": context})) as (port, _):
            finding = (await found(checkpoint, {"x": sink(kind, port, tls=tls)}))["sink x"]
        if said is None:
            assert (finding.state, finding.text[-8:]) == ("ok", "with TLS")
        else:
            assert finding.state == "bad"
            assert said in finding.text

    @without_openssl
    async def test_a_server_that_wants_our_certificate_is_bad_without_one(
        self, checkpoint, certificates, kind
    ):
        context = await asyncio.to_thread(server_context, certificates, "good")
        context.load_verify_locations(certificates / "ca.pem")
        context.verify_mode = ssl.CERT_REQUIRED
        nats = {"greeting": ENCRYPTED, "upgrade": context}
        tls = {"ca_file": certificates / "ca.pem"}
        async with listening(**(nats if kind == "nats" else {"context": context})) as (port, _):
            finding = (await found(checkpoint, {"x": sink(kind, port, tls=tls)}))["sink x"]
        assert finding.state == "bad"

    async def test_files_of_tls_that_are_not_there_are_bad(self, checkpoint, tmp_path, kind):
        tls = {"ca_file": tmp_path / "none.pem"}
        finding = (await found(checkpoint, {"x": sink(kind, 1, tls=tls)}))["sink x"]
        assert finding.state == "bad"
        assert "none.pem" in finding.text


async def answers_nothing(settings):
    return ""


def server_context(certificates, name):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{name}.pem", certificates / f"{name}.key")
    return context


class TestReceiversOfAKind:
    @pytest.mark.parametrize(("tls", "port"), [(None, 1883), ({}, 8883)])
    async def test_mqtt_without_a_port_is_looked_for_at_the_usual_one(
        self, checkpoint, monkeypatch, tls, port
    ):
        asked = []

        async def failure(door, context):
            asked.append((str(door), context is not None))
            return ""

        monkeypatch.setattr(doctor, "_failure", failure)
        await found(checkpoint, {"x": {"kind": "mqtt", "host": "broker.test", "tls": tls}})
        assert asked == [(f"broker.test:{port}", tls is not None)]

    async def test_a_password_that_is_not_set_is_bad(self, checkpoint, monkeypatch):
        monkeypatch.delenv("NO_SUCH_PASSWORD", raising=False)
        keys = {"username": "u", "password_env": "NO_SUCH_PASSWORD"}
        finding = (await found(checkpoint, {"x": sink("mqtt", 1, **keys)}))["sink x"]
        assert finding.state == "bad"
        assert "NO_SUCH_PASSWORD" in finding.text

    async def test_of_several_brokers_one_that_answers_is_enough_to_run(self, checkpoint):
        closed = free_port()
        async with listening() as (port, _):
            brokers = [f"127.0.0.1:{port}", f"127.0.0.1:{closed}"]
            settings = {"x": {"kind": "kafka", "brokers": brokers}}
            finding = (await found(checkpoint, settings))["sink x"]
        assert finding.state == "note"
        assert f"127.0.0.1:{port} answers" in finding.text
        assert f"127.0.0.1:{closed}: " in finding.text

    async def test_an_address_that_is_none_is_bad(self, checkpoint):
        settings = {"x": {"kind": "kafka", "brokers": ["host:many"]}}
        finding = (await found(checkpoint, settings))["sink x"]
        assert finding.state == "bad"
        assert "brokers: got 'host:many', expected host:port" in finding.text

    @pytest.mark.parametrize(
        ("greeting", "keys", "said"),
        [
            (b"220 mail\r\n", {}, "no NATS server"),
            (ENCRYPTED, {}, "expects TLS, and none is set"),
            (PLAIN, {"tls": {}}, "offers no TLS, and it is set"),
        ],
    )
    async def test_a_nats_server_is_known_by_its_first_line(self, checkpoint, greeting, keys, said):
        async with listening(greeting) as (port, _):
            finding = (await found(checkpoint, {"x": sink("nats", port, **keys)}))["sink x"]
        assert finding.state == "bad"
        assert said in finding.text

    async def test_a_server_that_is_silent_is_bad(self, checkpoint, monkeypatch):
        monkeypatch.setattr(doctor, "TRIES_S", 0.2)
        async with listening() as (port, _):
            finding = (await found(checkpoint, {"x": sink("nats", port)}))["sink x"]
        assert finding.state == "bad"
        assert "no answer" in finding.text

    async def test_redis_that_refuses_us_is_bad(self, checkpoint, blockbuster):
        blockbuster.deactivate()  # the driver is imported where it is used
        async with listening(login=b"-NOAUTH Authentication required.\r\n") as (port, heard):
            finding = (await found(checkpoint, {"x": sink("redis", port)}))["sink x"]
        assert finding.state == "bad"
        assert any(heard)

    async def test_behind_a_proxy_the_proxy_is_looked_for(self, checkpoint, monkeypatch):
        async with listening() as (port, _):
            proxies = {"http": f"http://127.0.0.1:{port}"}
            monkeypatch.setattr("urllib.request.getproxies", lambda: proxies)
            settings = {"x": {"kind": "webhook", "url": "http://far.test/in"}}
            finding = (await found(checkpoint, settings))["sink x"]
        assert finding.state == "note"
        assert f"the proxy 127.0.0.1:{port} answers" in finding.text

    async def test_of_another_package_nothing_is_claimed(self, checkpoint, monkeypatch):
        class Lamp(SinkSettings, frozen=True):
            kind: Literal["lamp"] = "lamp"
            where: str

        monkeypatch.setattr("sinks.load_entry_points", lambda: {"lamp": Lamp})
        finding = (await found(checkpoint, {"x": {"kind": "lamp", "where": "there"}}))["sink x"]
        assert finding.state == "note"
        assert "lamp: nothing is known of where it goes; it was not contacted" in finding.text


class TestPorts:
    @pytest.mark.parametrize("taken", [True, False])
    async def test_rtp_takes_a_udp_port(self, checkpoint, taken):
        kinds = (socket.SOCK_DGRAM, socket.SOCK_STREAM)
        with socket.socket(type=kinds[0]) as first, socket.socket(type=kinds[1]) as second:
            first.bind(("127.0.0.1", 0))
            port = first.getsockname()[1]
            if not taken:  # for another protocol it is
                first.close()
                second.bind(("127.0.0.1", port))
                second.listen()
            sources = {"mixer": {"kind": "rtp", "port": port}}
            finding = (await found(checkpoint, sources=sources))["source mixer"]
        assert finding.state == ("bad" if taken else "ok")
        assert f"127.0.0.1:{port} (UDP)" in finding.text

    @without_openssl
    @pytest.mark.parametrize(("key", "state"), [("good", "ok"), ("expired", "bad")])
    async def test_the_servers_certificate_is_loaded(self, checkpoint, certificates, key, state):
        server = {
            "port": free_port(),
            "tls_cert": certificates / "good.pem",
            "tls_key": certificates / f"{key}.key",
        }
        finding = (await found(checkpoint, server=server))["server TLS"]
        assert finding.state == state
        assert "good.pem" in finding.text
        assert bool(finding.fix) == (state == "bad")


def database(folder):
    path = folder / "a.db"
    with Voiceprints.open(path):
        return path


KEPT = [
    ("fanout.outbox", lambda path: {"fanout": {"outbox": path}}),
    ("session.state", lambda path: {"session": {"state": path}}),
    ("voiceprints", lambda path: {"voiceprints": path}),
]


@pytest.mark.parametrize(("key", "keys"), KEPT)
class TestDatabases:
    async def test_one_that_is_not_there_can_be_made(self, checkpoint, tmp_path, key, keys):
        path = tmp_path / "new" / "a.db"
        finding = (await found(checkpoint, **keys(path)))[key]
        assert (finding.state, finding.text) == ("ok", f"{path} can be made")
        assert list(tmp_path.iterdir()) == []  # looking changes nothing

    async def test_one_that_is_there_is_used(self, checkpoint, tmp_path, key, keys):
        path = await asyncio.to_thread(database, tmp_path)
        finding = (await found(checkpoint, **keys(path)))[key]
        assert (finding.state, finding.text) == ("ok", f"{path} can be read and written")

    @pytest.mark.parametrize(
        ("below", "said"),
        [
            ("a.txt", "expected a SQLite database"),
            ("a.txt/a.db", "Not a directory"),
            ("folder", "expected a file"),
        ],
    )
    async def test_what_is_none_is_bad(self, checkpoint, tmp_path, key, keys, below, said):
        (tmp_path / "a.txt").write_text("a text, not a database")
        (tmp_path / "folder").mkdir()
        finding = (await found(checkpoint, **keys(tmp_path / below)))[key]
        assert finding.state == "bad"
        assert said in finding.text
        assert finding.fix

    async def test_rights_that_are_missing_are_bad(
        self, checkpoint, tmp_path, monkeypatch, key, keys
    ):
        path = await asyncio.to_thread(database, tmp_path)
        monkeypatch.setattr("os.access", lambda *_: False)  # root may write everything
        finding = (await found(checkpoint, **keys(path)))[key]
        assert finding.state == "bad"
        assert "may not be written" in finding.text


async def test_the_users_own_voices_are_looked_at_if_there_are_any(checkpoint, tmp_path):
    assert "voiceprints" not in await found(checkpoint)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "voices.db").write_text("a text, not a database")
    assert (await found(checkpoint))["voiceprints"].state == "bad"
