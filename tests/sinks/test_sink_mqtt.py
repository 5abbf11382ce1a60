import asyncio
import gc
import json
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiomqtt
import pytest
from aiomqtt import ProtocolVersion
from jinja2 import Template
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from pydantic import SecretStr, ValidationError

from sinks import mqtt as module
from sinks.events import parse
from sinks.mqtt import MqttSettings, StreamState, level
from sinks.mqtt_connection import Connection
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import TlsSettings
from stream.fanout import Fanout, FanoutSettings
from tests.broker import Broker
from tests.certificates import REFUSED, certificates, without_openssl
from tests.sinks.samples import Talk

__all__ = ["certificates"]

pytestmark = pytest.mark.broker


def settings(broker: Broker, **more: Any) -> MqttSettings:
    return MqttSettings(host=broker.host, port=broker.port, node="box", **more)


@asynccontextmanager
async def subscriber(
    broker: Broker, topic: str = "livesat/#", **more: Any
) -> AsyncIterator[aiomqtt.Client]:
    async with aiomqtt.Client(
        broker.host, broker.port, protocol=ProtocolVersion.V5, **more
    ) as client:
        await client.subscribe(topic, qos=1)
        yield client


async def receive(client: aiomqtt.Client, count: int) -> list[aiomqtt.Message]:
    messages: list[aiomqtt.Message] = []
    async with asyncio.timeout(20):
        while len(messages) < count:
            messages.append(await anext(client.messages))
    return messages


def write_passwords(path: Path, name: str, password: str) -> None:
    subprocess.run(["mosquitto_passwd", "-b", "-c", path, name, password], check=True)
    path.chmod(0o600)


def write_acl(path: Path, *topics: str) -> None:
    path.write_text("topic read #\n" + "".join(f"topic write {topic}\n" for topic in topics))
    path.chmod(0o600)


class Gate:
    """A back-off that lasts until the test opens it; the end of the drain comes much later."""

    def __init__(self) -> None:
        self.open = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        if seconds < FanoutSettings().drain_s:
            await self.open.wait()
        else:
            await asyncio.sleep(20)


def user(message: aiomqtt.Message) -> dict[str, str]:
    return dict(getattr(message.properties, "UserProperty", []))


async def test_every_event_arrives_under_its_topic(broker: Broker) -> None:
    sent = Talk().every_type()
    async with subscriber(broker, "livesat/v1/box/talk/+/#") as client:
        async with settings(broker).open() as sink:
            for event in sent:
                await sink.send(event)
        received = [
            m for m in await receive(client, len(sent) + 4) if "/state" not in m.topic.value
        ]
    for event, message in zip(sent, received, strict=True):
        kind = "event" if event.is_final else "partial"
        assert message.topic.value == f"livesat/v1/box/talk/{kind}/{event.type}"
        assert message.qos == (1 if event.is_final else 0)
        assert not message.retain
        assert parse(message.payload) == event
        assert user(message) == {
            "session_id": event.session_id,
            "seq": str(event.seq),
            "type": event.type,
        }
        assert message.properties.ContentType == "application/json"


async def test_state_is_retained_for_those_who_come_late(broker: Broker) -> None:
    talk = Talk()
    topic = "livesat/v1/box/talk/state"

    async def state() -> StreamState:
        async with subscriber(broker, topic) as late:
            (message,) = await receive(late, 1)
            assert message.retain
            assert message.qos == 1
            return StreamState.model_validate_json(message.payload)

    async with settings(broker, keep=("talk",)).open() as sink:
        await sink.send(talk.opened())
        assert (await state()).open
        await sink.send(talk.began("t1", "S1", 1.0))
        await sink.send(talk.identified("S1", "Ada"))
        speaking = (await state()).speaking
        assert [(s.label, s.identity) for s in speaking] == [("S1", "Ada")]
        await sink.send(talk.turn("t1", "S1", 1.0, 2.0))
        assert (await state()).speaking == []
        await sink.send(talk.closed())
        assert not (await state()).open


async def test_nothing_stays_of_a_caller_whose_session_has_closed(broker: Broker) -> None:
    at_home = settings(broker, home_assistant=True, keep=("talk",))
    async with at_home.open() as sink:
        for talk in (Talk("s1", "caller-1"), Talk("s2", "talk")):
            for event in (talk.opened(), talk.began("t1", "S1", 1.0)):
                await sink.send(event)
    async with at_home.open() as sink:  # another connection, which has seen nothing of them
        for session, stream in (("s1", "caller-1"), ("s2", "talk")):
            talk = Talk(session, stream)
            talk.seq = 2
            await sink.send(talk.closed())
        assert sink._announced == {"talk"}
    retained: list[str] = []
    async with subscriber(broker, "#") as late:
        while len(retained) < 3:
            (message,) = await receive(late, 1)
            assert message.retain
            retained.append(message.topic.value)
        async with settings(broker).open():  # what comes now is new: that was all
            (message,) = await receive(late, 1)
            assert not message.retain
    assert sorted(retained) == [
        "homeassistant/sensor/livesat_v1_box/livesat__talk/config",
        "livesat/v1/box/status",
        "livesat/v1/box/talk/state",
    ]


async def test_what_is_retained_of_a_caller_expires_unless_it_is_said_again(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "monotonic", lambda: now)
    caller, own = Talk("s1", "caller"), Talk("s2", "talk")
    at_home = settings(broker, home_assistant=True, keep=("talk",), partials=False)
    async with subscriber(broker, "#") as client, at_home.open() as sink:
        for event in (caller.opened(), own.opened(), caller.warning()):
            await sink.send(event)
        now += module.EXPIRES_S / 2
        for event in (caller.warning(), own.warning(), own.closed()):
            await sink.send(event)
        heard = await receive(client, 1 + 3 + 3 + 1 + 3 + 1 + 2)
    expiries: dict[str, list[int | None]] = {}
    for message in heard[1:]:
        topic = message.topic.value
        expiry = getattr(message.properties, "MessageExpiryInterval", None)
        if not ("/event/" in topic and expiry is None):
            expiries.setdefault(topic, []).append(expiry)
    assert expiries == {
        "homeassistant/sensor/livesat_v1_box/livesat__caller/config": [600, 600],
        "livesat/v1/box/caller/state": [600, 600],
        "homeassistant/sensor/livesat_v1_box/livesat__talk/config": [None],
        "livesat/v1/box/talk/state": [None, None],
    }


async def test_a_sensor_that_is_denied_costs_no_event(
    make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    write_acl(acl, "livesat/#")
    broker = make_broker(f"acl_file {acl}\n")
    async with settings(broker, home_assistant=True).open() as sink:
        await sink.send(Talk().opened())
        assert len(sink._denied) == 1


async def test_an_event_larger_than_the_broker_takes_costs_only_itself(
    make_broker: Callable[..., Broker],
) -> None:
    broker = make_broker("max_packet_size 1000\n")
    talk = Talk()
    async with settings(broker).open() as sink:
        with pytest.raises(Rejected, match="takes packets of 1000 bytes at most"):
            await sink.send(talk.warning("a" * 1000))
        await sink.send(talk.warning("a" * 400))


async def test_status_is_online_then_offline(broker: Broker) -> None:
    topic = "livesat/v1/box/status"
    async with subscriber(broker, topic) as client:
        async with settings(broker).open():
            async with subscriber(broker, topic) as late:
                (retained,) = await receive(late, 1)
            assert retained.retain
            assert retained.payload == b"online"
        statuses = [m.payload for m in await receive(client, 2)]
    assert statuses == [b"online", b"offline"]
    # A clean disconnect: the broker has not published the will on top.
    async with subscriber(broker, topic) as late:
        (retained,) = await receive(late, 1)
        assert retained.payload == b"offline"


async def test_last_will_when_killed(broker: Broker) -> None:
    script = (
        "import asyncio, sys\n"
        "from sinks.mqtt import MqttSettings\n"
        "async def main():\n"
        f"    settings = MqttSettings(host={broker.host!r}, port={broker.port}, node='box')\n"
        "    async with settings.open():\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.Event().wait()\n"
        "asyncio.run(main())\n"
    )
    async with subscriber(broker, "livesat/v1/box/status") as client:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, stdout=subprocess.PIPE, cwd=Path.cwd()
        )
        assert process.stdout is not None
        assert await process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)
        await process.wait()
        statuses = await receive(client, 2)
    assert [m.payload for m in statuses] == [b"online", b"offline"]


async def test_no_broker_is_one_clear_line(broker: Broker) -> None:
    broker.kill()
    with pytest.raises(SinkError, match=rf"expected an MQTT v5 broker at 127.0.0.1:{broker.port}"):
        async with settings(broker).open():
            pass


async def test_failed_connections_leak_nothing(broker: Broker) -> None:
    broker.freeze()  # takes connections, never answers
    before = open_files()
    for _ in range(5):
        with pytest.raises(SinkError, match="timed out"):
            async with settings(broker, timeout_s=0.05).open():
                pass
    assert open_files() <= before
    assert len(asyncio.all_tasks()) == 1


async def test_wrong_password_is_refused_and_not_shown(
    make_broker: Callable[..., Broker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passwords = tmp_path / "passwords"
    write_passwords(passwords, "ada", "right")
    broker = make_broker(f"allow_anonymous false\npassword_file {passwords}\n")
    wrong = settings(broker, username="ada", password=SecretStr("wrong"))
    assert "wrong" not in repr(wrong)
    with pytest.raises(SinkError, match=r"refused us.*Not authorized") as failed:
        async with wrong.open():
            pass
    assert "wrong" not in str(failed.value)
    monkeypatch.setenv("BROKER_PASSWORD", "right")
    async with settings(broker, username="ada", password_env="BROKER_PASSWORD").open() as sink:
        await sink.send(Talk().opened())
    monkeypatch.delenv("BROKER_PASSWORD")
    with pytest.raises(SinkError, match="BROKER_PASSWORD, which is not set"):
        async with settings(broker, username="ada", password_env="BROKER_PASSWORD").open():
            pass


async def test_denied_publish_is_an_error(
    make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    write_acl(acl, "livesat/v1/box/status", "livesat/v1/box/talk/event/warning")
    broker = make_broker(f"acl_file {acl}\n")
    talk = Talk()
    async with settings(broker).open() as sink:
        with pytest.raises(Rejected, match=r"refused livesat/v1/box/talk/event/session.opened"):
            await sink.send(talk.opened())
        # Others pass on the same connection.
        await sink.send(talk.warning())


@pytest.mark.parametrize(
    ("code", "meaning"), [("Quota exceeded", SinkError), ("Not authorized", Rejected)]
)
async def test_what_a_reason_code_means(
    broker: Broker, code: str, meaning: type[SinkError]
) -> None:
    async with settings(broker).open() as sink:
        connection = sink._connection
        answer = connection._on_publish
        reason = ReasonCode(PacketTypes.PUBACK, code)
        client: Any = connection._client
        client.on_publish = lambda paho, data, mid, _, more: answer(paho, data, mid, reason, more)
        with pytest.raises(SinkError, match=f"refused .*: {code}") as raised:
            await sink.send(Talk().warning())
        client.on_publish = answer
        await sink.send(Talk().warning())
    assert type(raised.value) is meaning


async def test_denied_event_is_set_aside_and_the_rest_delivered(
    make_broker: Callable[..., Broker], tmp_path: Path
) -> None:
    acl = tmp_path / "acl"
    write_acl(acl, "livesat/v1/box/status", "livesat/v1/box/talk/event/warning")
    broker = make_broker(f"acl_file {acl}\n")
    talk = Talk()
    gate = Gate()
    gate.open.set()
    async with subscriber(broker, "livesat/v1/box/talk/#") as client:
        fanout = Fanout({"mqtt": settings(broker)}, fail_fast=True, sleep=gate.sleep)
        await fanout.__aenter__()
        await fanout.publish(talk.opened())
        await fanout.publish(talk.warning())
        (message,) = await receive(client, 1)
        with pytest.raises(SinkError, match=r"1 events did not reach the sink mqtt: .*Not author"):
            await fanout.__aexit__(None, None, None)
    assert user(message)["seq"] == "1"
    assert fanout.statistics()["mqtt"].rejected == 1


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_a_frozen_broker_is_given_up_on(broker: Broker) -> None:
    talk = Talk()
    async with settings(broker, timeout_s=0.1).open() as sink:
        broker.freeze()
        with pytest.raises(Disconnected, match="timed out"):
            await sink.send(talk.opened())
        broker.thaw()


async def test_a_dead_broker_is_noticed_without_an_event(broker: Broker) -> None:
    async with settings(broker).open() as sink:
        waiting = asyncio.ensure_future(sink.lost())
        broker.kill()
        async with asyncio.timeout(20):
            await waiting
        with pytest.raises(Disconnected, match="lost the MQTT broker"):
            await sink.send(Talk().opened())


async def test_publish_does_not_wait_out_its_timeout_when_the_broker_dies(broker: Broker) -> None:
    # The timeout is longer than the test's: only the race against the disconnect can end it.
    async with settings(broker, timeout_s=1000).open() as sink:
        broker.freeze()
        sending = asyncio.ensure_future(sink.send(Talk().opened()))
        await asyncio.sleep(0.05)
        assert not sending.done()
        broker.kill()
        with pytest.raises(Disconnected):
            await sending


async def test_finals_arrive_in_order_after_the_broker_came_back(broker: Broker) -> None:
    talk = Talk()
    gate = Gate()
    seen: list[aiomqtt.Message] = []
    topic = "livesat/v1/box/talk/event/#"
    async with Fanout({"mqtt": settings(broker)}, fail_fast=True, sleep=gate.sleep) as fanout:
        async with subscriber(broker, topic) as client:
            for i in range(20):
                await fanout.publish(talk.warning(f"before {i}"))
            seen += await receive(client, 20)
        # What was not acknowledged before the broker died would rightly come twice.
        while fanout.statistics()["mqtt"].sent < 20:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        broker.kill()
        for i in range(20):
            await fanout.publish(talk.warning(f"during {i}"))
            await fanout.publish(talk.heard("partial"))
        broker.start()
        async with subscriber(broker, topic) as client:
            gate.open.set()
            seen += await receive(client, 20)
            for i in range(5):
                await fanout.publish(talk.warning(f"after {i}"))
            seen += await receive(client, 5)
        assert fanout.statistics()["mqtt"].retries >= 1
    finals = [parse(message.payload) for message in seen]
    ids = [event.id for event in finals]
    assert [event.message for event in finals] == [  # type: ignore[union-attr]
        f"{when} {i}"
        for when, n in (("before", 20), ("during", 20), ("after", 5))
        for i in range(n)
    ]
    # None was under way when the broker died, so none is sent twice.
    assert len(set(ids)) == len(ids)


async def test_an_event_under_way_is_sent_again(broker: Broker) -> None:
    talk = Talk()
    gate = Gate()
    async with Fanout({"mqtt": settings(broker)}, fail_fast=True, sleep=gate.sleep) as fanout:
        broker.freeze()
        await fanout.publish(talk.warning("under way"))
        await asyncio.sleep(0.05)
        broker.kill()
        broker.start()
        async with subscriber(broker, "livesat/v1/box/talk/event/#") as client:
            gate.open.set()
            await fanout.publish(talk.warning("next"))
            messages = [json.loads(m.payload)["message"] for m in await receive(client, 2)]
    assert messages == ["under way", "next"]


# paho leaves the socket of a handshake that failed to the garbage collector.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@without_openssl
@pytest.mark.parametrize(("shown", "trusted", "wrong"), [("good", "ca", None), *REFUSED])
async def test_tls_wants_a_certificate_it_can_trust(
    make_broker: Callable[..., Broker],
    certificates: Path,
    shown: str,
    trusted: str,
    wrong: str | None,
) -> None:
    own = f"certfile {certificates / shown}.pem\nkeyfile {certificates / shown}.key\n"
    broker = make_broker(own)
    tls = TlsSettings(ca_file=certificates / f"{trusted}.pem")
    secret = {"username": "ada", "password": SecretStr("hush")}
    if wrong is None:
        async with settings(broker, tls=tls, **secret).open() as sink:
            await sink.send(Talk().opened())
    else:
        with pytest.raises(SinkError, match=wrong) as refused:
            async with settings(broker, tls=tls, **secret).open():
                pass
        assert "hush" not in str(refused.value)
        del refused
    gc.collect()


async def test_tls_files_that_are_not_there_are_said(tmp_path: Path) -> None:
    missing = MqttSettings(tls=TlsSettings(ca_file=tmp_path / "missing.pem"))
    with pytest.raises(SinkError, match=r"cannot use the TLS files .*missing.pem"):
        async with missing.open():
            pass


def test_settings_say_what_they_expect() -> None:
    with pytest.raises(ValidationError, match="topic levels without"):
        MqttSettings(root="a/#")
    with pytest.raises(ValidationError, match="password or password_env, got both"):
        MqttSettings(username="a", password=SecretStr("b"), password_env="C")
    with pytest.raises(ValidationError, match="username with the password, got none"):
        MqttSettings(password=SecretStr("b"))
    assert MqttSettings(tls=TlsSettings()).address == ("localhost", 8883)
    assert MqttSettings().address == ("localhost", 1883)


def test_client_id_is_stable_and_tells_sinks_apart() -> None:
    one = MqttSettings(node="box", username="a", password=SecretStr("b"))
    assert one.identifier() == MqttSettings(**one.model_dump()).identifier()
    assert one.identifier() != MqttSettings(node="box", partials=False).identifier()
    assert len(one.identifier()) == 23
    assert one.identifier().isalnum()


def test_a_stream_cannot_choose_its_topic() -> None:
    assert level("kitchen") == "kitchen"
    assert level("Küche 2") == "Küche 2"
    assert level("a/b+c#d%") == "a%2Fb%2Bc%23d%25"
    assert level("") == "%00"


async def test_home_assistant_finds_a_sensor_of_every_stream(broker: Broker) -> None:
    talk = Talk()
    async with subscriber(broker, "homeassistant/#") as client:
        async with settings(broker, home_assistant=True).open() as sink:
            for event in (talk.opened(), talk.began("T1", "S1", 1.0, "Anna")):
                await sink.send(event)
        (message,) = await receive(client, 1)
    sensor = json.loads(bytes(message.payload))
    assert str(message.topic).startswith("homeassistant/sensor/")
    assert sensor["state_topic"] == "livesat/v1/box/talk/state"
    assert sensor["availability_topic"] == "livesat/v1/box/status"
    names = Template(sensor["value_template"]).render(
        value_json={"speaking": [{"identity": "Anna", "label": "S1"}, {"label": "S2"}]}
    )
    assert names == "Anna, S2"


async def test_streams_whose_letters_home_assistant_does_not_know_have_sensors_apart(
    broker: Broker,
) -> None:
    async with subscriber(broker, "homeassistant/#") as client:
        async with settings(broker, home_assistant=True).open() as sink:
            for number, name in enumerate(("会议室", "客厅门", "a b", "a_b")):
                await sink.send(Talk(str(number), name).opened())
        messages = await receive(client, 4)
    topics = [message.topic.value for message in messages]
    assert len(set(topics)) == 4
    assert len({json.loads(bytes(message.payload))["unique_id"] for message in messages}) == 4
    assert topics[-1] == "homeassistant/sensor/livesat_v1_box/livesat__a_b/config"


async def test_a_socket_that_closed_meanwhile_is_not_watched():
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    connection = Connection(
        "127.0.0.1",
        1883,
        will=("status", b"offline"),
        client_id="box",
        username=None,
        password=None,
        tls=None,
        keepalive_s=60,
        timeout_s=1.0,
    )
    one, other = socket.socketpair()
    with other:
        connection._on_socket_register_write(connection._client, None, one)
        one.close()
        for _ in range(3):
            await asyncio.sleep(0)
    assert complaints == []
