"""NATS JetStream and Redis Streams against real servers; Kafka against librdkafka's mock cluster.

The latter speaks the wire protocol. What it cannot be made to do, a stand-in for the driver does.
"""

import asyncio
import json
import shutil
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import aiokafka
import nats
import nats.js.errors
import pytest
import structlog
from aiokafka.errors import (
    InvalidProducerEpoch,
    InvalidProducerIdMapping,
    KafkaConnectionError,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    RequestTimedOutError,
    TopicAuthorizationFailedError,
    UnknownProducerId,
)
from redis._parsers.base import BaseParser
from redis.asyncio import Redis
from redis.exceptions import ResponseError

from sinks import KafkaSettings, NatsSettings, RedisSettings
from sinks import kafka as kafka_sink
from sinks.events import parse
from sinks.jetstream import NatsSink
from sinks.redis_streams import RedisSink
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import TlsSettings
from stream.fanout import Fanout, FanoutSettings
from tests.broker import Server, nats_server, stored
from tests.certificates import REFUSED, certificates, without_openssl
from tests.kafka import Cluster
from tests.sinks.samples import Talk
from tests.stream.house import until

__all__ = ["certificates"]

FAST = FanoutSettings(retry_first_s=0.02, retry_longest_s=0.05)


@pytest.fixture
def jetstream(tmp_path: Path) -> Iterator[Server]:
    server = Server(*nats_server(tmp_path)).start()
    yield server
    server.kill()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Server]:
    if shutil.which("redis-server") is None:
        pytest.skip("redis-server is not installed")
    server = Server(
        *("redis-server", "--port", "PORT", "--bind", "127.0.0.1", "--dir", str(tmp_path)),
        *("--appendonly", "yes", "--appendfsync", "always"),
    ).start()
    yield server
    server.kill()


def on(server: Server, **more: Any) -> NatsSettings:
    return NatsSettings(servers=(f"nats://127.0.0.1:{server.port}",), node="box", **more)


@pytest.mark.broker
class TestNats:
    @pytest.mark.parametrize("in_flight", [1, 8])
    async def test_finals_are_stored_in_order_and_once(
        self, jetstream: Server, in_flight: int
    ) -> None:
        sent = list(Talk(stream_id="a.b").every_type())
        settings = on(jetstream, in_flight=in_flight)
        async with Fanout({"nats": settings}, FAST, fail_fast=True) as out:
            for event in sent:
                await out.publish(event)
        async with on(jetstream).open() as sink:  # again: dropped by their ids
            for event in sent:
                await sink.send(event)
        messages = await stored(jetstream)
        finals = [event for event in sent if event.is_final]
        assert [parse(message.data) for message in messages] == finals
        subjects = [message.subject for message in messages]
        wanted = [f"livesat.v1.box.a_b.event.{event.type.replace('.', '_')}" for event in finals]
        assert subjects == wanted

    @pytest.mark.parametrize("in_flight", [1, 8])
    async def test_a_killed_server_costs_nothing(self, jetstream: Server, in_flight: int) -> None:
        talk = Talk()
        sent = [talk.warning() for _ in range(60)]
        settings = on(jetstream, timeout_s=1, in_flight=in_flight)
        async with Fanout({"nats": settings}, FAST) as out:
            for number, event in enumerate(sent):
                await out.publish(event)
                if number in {15, 35}:
                    await asyncio.to_thread(jetstream.kill)
                    await asyncio.sleep(0.05)
                    await asyncio.to_thread(jetstream.start)
                await asyncio.sleep(0.002)
            await until(lambda: out.statistics()["nats"].sent == len(sent))
        assert [parse(message.data) for message in await stored(jetstream)] == sent

    async def test_a_stream_that_is_not_there_is_said(self, jetstream: Server) -> None:
        with pytest.raises(SinkError, match="stream LIVESAT: "):
            async with on(jetstream, create=False).open():
                pass

    async def test_what_may_not_be_published_is_said(self, tmp_path: Path) -> None:
        config = tmp_path / "nats.conf"
        rights = '{publish: ["$JS.>"], subscribe: ">"}'
        config.write_text(
            f"authorization {{users: [{{user: u, password: p, permissions: {rights}}}]}}\n"
        )
        server = Server(*nats_server(tmp_path), "-c", str(config)).start()
        try:
            settings = on(server, user="u", password="p", timeout_s=0.5)
            with structlog.testing.capture_logs() as logs:
                async with settings.open() as sink:
                    await sink.send(Talk().heard("hel"))  # nobody answers to a partial
                    with pytest.raises(Rejected, match=r"permissions violation.*event\.warning"):
                        await sink.send(Talk().warning())
            assert [log["event"] for log in logs] == ["nats refuses a subject"]
        finally:
            server.kill()

    @without_openssl
    @pytest.mark.parametrize("url", ["nats", "tls"])
    @pytest.mark.parametrize(("shown", "trusted", "wrong"), [("good", "ca", None), *REFUSED])
    async def test_tls_wants_a_certificate_it_can_trust(
        self,
        tmp_path: Path,
        certificates: Path,
        shown: str,
        trusted: str,
        wrong: str | None,
        url: str,
    ) -> None:
        own = (
            "--tlscert",
            f"{certificates / shown}.pem",
            "--tlskey",
            f"{certificates / shown}.key",
        )
        server = Server(*nats_server(tmp_path), "--tls", *own).start()
        settings = NatsSettings(
            servers=(f"{url}://u:hush@127.0.0.1:{server.port}",),
            tls=TlsSettings(ca_file=certificates / f"{trusted}.pem"),
        )
        try:
            if wrong is None:
                async with settings.open() as sink:
                    await sink.send(Talk().warning())
            else:
                with pytest.raises(Disconnected, match=wrong) as refused:
                    async with settings.open():
                        pass
                assert "hush" not in str(refused.value)
        finally:
            server.kill()

    @pytest.mark.parametrize("given", [{"tls": {}}, {"url": "tls"}])
    async def test_a_server_without_tls_learns_no_password(self, given: dict[str, Any]) -> None:
        heard: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b'INFO {"server_id":"x","version":"2.10.0","max_payload":1000}\r\n')
            heard.append(await reader.read())
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        url = f"{given.pop('url', 'nats')}://u:hush@127.0.0.1:{port}"
        async with server:
            with pytest.raises(Disconnected, match="expected TLS, the server has none"):
                async with NatsSettings(servers=(url,), **given).open():
                    pass
            await until(lambda: bool(heard))
        assert heard == [b""]

    async def test_a_server_that_is_not_there_is_said(self) -> None:
        with pytest.raises(Disconnected, match=r"nats nats://127\.0\.0\.1:9: "):
            async with NatsSettings(servers=("nats://u:hush@127.0.0.1:9",)).open():
                pass


@pytest.mark.broker
class TestRedis:
    async def test_entries_are_in_order_under_the_streams_key(self, redis: Server) -> None:
        sent = list(Talk().every_type())
        settings = RedisSettings(host="127.0.0.1", port=redis.port, partials=True)
        async with Fanout({"redis": settings}, FAST, fail_fast=True) as out:
            for event in sent:
                await out.publish(event)
        async with Redis(host="127.0.0.1", port=redis.port) as client:
            entries = await client.xrange("livesat:v1:talk")
        assert [parse(fields[b"event"]) for _, fields in entries] == sent
        assert [fields[b"id"].decode() for _, fields in entries] == [event.id for event in sent]

    async def test_a_killed_server_costs_nothing(self, redis: Server) -> None:
        talk = Talk()
        sent = [talk.warning() for _ in range(40)]
        settings = RedisSettings(host="127.0.0.1", port=redis.port, timeout_s=1)
        async with Fanout({"redis": settings}, FAST) as out:
            for number, event in enumerate(sent):
                await out.publish(event)
                if number == 20:
                    await asyncio.to_thread(redis.kill)
                    await asyncio.to_thread(redis.start)
                await asyncio.sleep(0.002)
            await until(lambda: out.statistics()["redis"].sent == len(sent))
        async with Redis(host="127.0.0.1", port=redis.port) as client:
            entries = await client.xrange("livesat:v1:talk")
        seqs = [int(fields[b"seq"]) for _, fields in entries]
        assert list(dict.fromkeys(seqs)) == [event.seq for event in sent]

    async def test_a_connection_that_breaks_is_for_the_fanout_to_make_again(self) -> None:
        came: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(65_536):
                came.append(data)
                if b"XADD" in data:
                    break
                writer.write(b"+OK\r\n" * data.count(b"*"))
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        async with server, RedisSettings(host="127.0.0.1", port=port).open() as sink:
            with pytest.raises(Disconnected, match="redis: "):
                await sink.send(Talk().warning())
        assert sum(b"XADD" in data for data in came) == 1

    @without_openssl
    @pytest.mark.parametrize(("shown", "trusted", "wrong"), [("good", "ca", None), *REFUSED])
    async def test_tls_wants_a_certificate_it_can_trust(
        self, tmp_path: Path, certificates: Path, shown: str, trusted: str, wrong: str | None
    ) -> None:
        if shutil.which("redis-server") is None:
            pytest.skip("redis-server is not installed")
        server = Server(
            *("redis-server", "--port", "0", "--tls-port", "PORT", "--bind", "127.0.0.1"),
            *("--tls-cert-file", f"{certificates / shown}.pem", "--dir", str(tmp_path)),
            *("--tls-key-file", f"{certificates / shown}.key", "--tls-auth-clients", "no"),
            *("--tls-ca-cert-file", str(certificates / "ca.pem")),
        ).start()
        tls = TlsSettings(ca_file=certificates / f"{trusted}.pem")
        settings = RedisSettings(host="127.0.0.1", port=server.port, tls=tls)
        try:
            if wrong is None:
                async with settings.open() as sink:
                    await sink.send(Talk().warning())
            else:
                with pytest.raises(Disconnected, match=wrong):
                    async with settings.open():
                        pass
        finally:
            server.kill()

    async def test_a_server_that_is_full_takes_it_later(self, redis: Server) -> None:
        settings = RedisSettings(host="127.0.0.1", port=redis.port)
        async with Redis(host="127.0.0.1", port=redis.port) as client:
            await client.config_set("maxmemory", "1")
        async with settings.open() as sink:
            with pytest.raises(SinkError, match=r"redis: .*maxmemory") as raised:
                await sink.send(Talk().warning())
        assert type(raised.value) is SinkError


class Answer:
    """Stands in for a driver's connection: every send gets this answer."""

    def __init__(self, error: Exception) -> None:
        self._error = error

    async def publish(self, *_: Any, **__: Any) -> None:
        raise self._error

    async def xadd(self, *_: Any, **__: Any) -> None:
        raise self._error


class TestWhatAnAnswerMeans:
    @pytest.mark.parametrize(
        ("error", "meaning"),
        [
            ({"code": 503, "err_code": 10023, "description": "insufficient resources"}, SinkError),
            ({"code": 500, "err_code": 10047, "description": "no storage"}, SinkError),
            ({"code": 504, "err_code": 1, "description": "late"}, SinkError),
            ({"code": 400, "err_code": 10060, "description": "expected stream"}, Rejected),
            ({"code": 404, "err_code": 10059, "description": "stream not found"}, Rejected),
        ],
    )
    async def test_of_nats(self, error: dict[str, Any], meaning: type[SinkError]) -> None:
        with pytest.raises(nats.js.errors.APIError) as made:
            nats.js.errors.APIError.from_error(error)
        answer: Any = Answer(made.value)
        sink = NatsSink(NatsSettings(), answer, answer, asyncio.Event())
        with pytest.raises(SinkError, match=f"nats: {error['description']}") as raised:
            await sink.send(Talk().warning())
        assert type(raised.value) is meaning

    async def test_of_nats_without_a_code(self) -> None:
        answer: Any = Answer(nats.js.errors.ServiceUnavailableError())
        sink = NatsSink(NatsSettings(), answer, answer, asyncio.Event())
        with pytest.raises(SinkError) as raised:
            await sink.send(Talk().warning())
        assert type(raised.value) is SinkError

    @pytest.mark.parametrize(
        ("line", "meaning"),
        [
            ("OOM command not allowed when used memory > 'maxmemory'.", SinkError),
            ("MISCONF Redis is configured to save RDB snapshots", SinkError),
            ("BUSY Redis is busy running a script.", SinkError),
            ("CLUSTERDOWN The cluster is down", SinkError),
            ("LOADING Redis is loading the dataset in memory", Disconnected),
            ("READONLY You can't write against a read only replica.", Disconnected),
            ("NOPERM this user has no permissions", Rejected),
            ("WRONGTYPE Operation against a key holding the wrong kind of value", Rejected),
            ("ERR wrong number of arguments for 'xadd' command", Rejected),
        ],
    )
    async def test_of_redis(self, line: str, meaning: type[SinkError]) -> None:
        error = BaseParser.parse_error(line)
        vars(error).pop("status_code", None)  # which drivers before 7.4 do not have
        answer: Any = Answer(error)
        with pytest.raises(SinkError, match="redis: ") as raised:
            await RedisSink(RedisSettings(), answer).send(Talk().warning())
        assert type(raised.value) is meaning

    @pytest.mark.parametrize(
        ("line", "meaning"),
        [
            ("CLUSTERDOWN The cluster is down", SinkError),
            ("TRYAGAIN Multiple keys request during rehashing of slot", SinkError),
            ("MASTERDOWN Link with MASTER is down", Disconnected),
        ],
    )
    async def test_of_redis_by_a_driver_that_has_no_class_for_it(
        self, line: str, meaning: type[SinkError]
    ) -> None:
        error = ResponseError(line)
        vars(error).pop("status_code", None)
        answer: Any = Answer(error)
        with pytest.raises(SinkError, match="redis: ") as raised:
            await RedisSink(RedisSettings(), answer).send(Talk().warning())
        assert type(raised.value) is meaning


@pytest.mark.broker
class TestKafka:
    @pytest.fixture
    def cluster(self) -> Iterator[Cluster]:
        pytest.importorskip("confluent_kafka")
        cluster = Cluster()
        yield cluster
        cluster.close()

    async def test_finals_are_stored_in_order_keyed_by_their_session(
        self, cluster: Cluster
    ) -> None:
        sent = [event for event in Talk().every_type() if event.is_final]
        async with Fanout(
            {"kafka": KafkaSettings(brokers=cluster.brokers)}, FAST, fail_fast=True
        ) as out:
            for event in sent:
                await out.publish(event)
        records = await asyncio.to_thread(cluster.records, "livesat.events.v1", len(sent))
        assert [parse(record.value()) for record in records] == sent
        assert {record.key() for record in records} == {b"s1"}
        assert len({record.partition() for record in records}) == 1
        assert dict(records[0].headers()) == {
            "id": b"s1:0",
            "type": b"session.opened",
            "content-type": b"application/json",
        }

    async def test_replicas_that_are_late_cost_nothing(self, cluster: Cluster) -> None:
        sent = [Talk().warning()]
        async with KafkaSettings(brokers=cluster.brokers, compression="gzip").open() as sink:
            cluster.answer("NOT_ENOUGH_REPLICAS")
            await sink.send(sent[0])
        records = await asyncio.to_thread(cluster.records, "livesat.events.v1", 1)
        assert [parse(record.value()) for record in records] == sent

    @pytest.mark.parametrize(
        ("answer", "meaning"),
        [("TOPIC_AUTHORIZATION_FAILED", SinkError), ("MESSAGE_TOO_LARGE", Rejected)],
    )
    async def test_a_record_that_is_denied_is_no_success(
        self, cluster: Cluster, answer: str, meaning: type[SinkError]
    ) -> None:
        async with KafkaSettings(brokers=cluster.brokers).open() as sink:
            await sink.send(Talk().warning())  # the topic is there
            cluster.answer(answer)
            with pytest.raises(SinkError, match="kafka: ") as raised:
                await sink.send(Talk().warning())
            await sink.send(Talk().warning())
        assert type(raised.value) is meaning

    async def test_a_number_out_of_order_costs_nothing_but_the_producer(
        self, cluster: Cluster
    ) -> None:
        talk = Talk()
        sent = [talk.warning() for _ in range(3)]
        async with Fanout({"kafka": KafkaSettings(brokers=cluster.brokers)}, FAST) as out:
            await out.publish(sent[0])
            await until(lambda: out.statistics()["kafka"].sent == 1)
            cluster.answer("OUT_OF_ORDER_SEQUENCE_NUMBER")
            for event in sent[1:]:
                await out.publish(event)
            await until(lambda: out.statistics()["kafka"].sent == 3)
            assert out.statistics()["kafka"].rejected == 0
        records = await asyncio.to_thread(cluster.records, "livesat.events.v1", 3)
        assert [parse(record.value()) for record in records] == sent

    async def test_a_cluster_that_is_gone_is_noticed_and_costs_nothing(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka_sink, "FAREWELL_S", 0.05)
        talk = Talk()
        sent = [talk.warning() for _ in range(6)]
        settings = KafkaSettings(brokers=cluster.brokers, timeout_s=1.0)
        async with Fanout({"kafka": settings}, FAST) as out:
            for event in sent[:3]:
                await out.publish(event)
            await until(lambda: out.statistics()["kafka"].sent == 3)
            cluster.down()
            for event in sent[3:]:
                await out.publish(event)
            await until(lambda: not out.statistics()["kafka"].connected)
            cluster.up()
            await until(lambda: out.statistics()["kafka"].sent == 6)
        records = await asyncio.to_thread(cluster.records, "livesat.events.v1", 6)
        assert [parse(record.value()) for record in records] == sent


class Producer:
    """Stands in for aiokafka's: remembers, and raises by script."""

    made: ClassVar["list[Producer]"] = []

    def __init__(self, **options: Any) -> None:
        self.options = options
        self.records: list[tuple[str, bytes, dict[str, Any]]] = []
        self.errors: list[Exception] = []
        self.stopped = False
        self.stuck = False
        self.client = self
        self.closed = False
        Producer.made.append(self)

    async def start(self) -> None:
        if "nobody:1" in self.options["bootstrap_servers"]:
            raise KafkaConnectionError("Unable to bootstrap")

    async def stop(self) -> None:
        self.stopped = True
        if self.stuck:
            await asyncio.Event().wait()

    async def close(self) -> None:
        self.closed = True

    async def send_and_wait(self, topic: str, value: bytes, **more: Any) -> None:
        if self.errors:
            raise self.errors.pop(0)
        self.records.append((topic, value, more))


class TestKafkasDriver:
    @pytest.fixture(autouse=True)
    def stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        Producer.made = []
        monkeypatch.setattr(aiokafka, "AIOKafkaProducer", Producer)

    async def test_a_record_is_an_event_keyed_by_its_session(self) -> None:
        sent = [event for event in Talk().every_type() if event.is_final]
        async with Fanout({"kafka": KafkaSettings()}, FAST, fail_fast=True) as out:
            for event in sent:
                await out.publish(event)
        (producer,) = Producer.made
        assert producer.stopped
        assert producer.options["enable_idempotence"]
        assert producer.options["acks"] == "all"
        assert [parse(value) for _, value, _ in producer.records] == sent
        topic, _, more = producer.records[0]
        assert topic == "livesat.events.v1"
        assert more["key"] == b"s1"
        assert dict(more["headers"])["id"] == sent[0].id.encode()

    def test_credentials_choose_the_protocol(self) -> None:
        secure = KafkaSettings.model_validate({"tls": True, "username": "u", "password": "hush"})
        options = secure.options()
        assert options["security_protocol"] == "SASL_SSL"
        assert options["sasl_plain_password"] == "hush"
        assert "hush" not in secure.model_dump_json()
        assert KafkaSettings().options()["security_protocol"] == "PLAINTEXT"

    @pytest.mark.parametrize(
        ("error", "meaning"),
        [
            (TopicAuthorizationFailedError(), SinkError),
            (RequestTimedOutError(), Disconnected),
            (KafkaConnectionError("gone"), Disconnected),
            (MessageSizeTooLargeError("big"), Rejected),
            (OutOfOrderSequenceNumber(), Disconnected),
            (UnknownProducerId(), Disconnected),
            (InvalidProducerEpoch(), Disconnected),
            (InvalidProducerIdMapping(), Disconnected),
            (ProducerFenced(), Disconnected),
            (ProducerClosed(), Disconnected),
            (KafkaError("Unexpected error during batch delivery"), Disconnected),
            (OSError("gone"), Disconnected),
        ],
    )
    async def test_what_an_error_means(self, error: Exception, meaning: type[SinkError]) -> None:
        async with KafkaSettings(envelope="cloudevents").open() as sink:
            (producer,) = Producer.made
            producer.errors = [error]
            with pytest.raises(meaning, match="kafka: ") as raised:
                await sink.send(Talk().warning())
            await sink.send(Talk().warning())
        assert type(raised.value) is meaning
        assert json.loads(producer.records[0][1])["specversion"] == "1.0"

    async def test_a_producer_that_does_not_stop_is_left(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kafka_sink, "FAREWELL_S", 0.01)
        async with KafkaSettings().open():
            (producer,) = Producer.made
            producer.stuck = True
        assert producer.stopped
        assert producer.closed

    async def test_certificates_are_loaded_in_a_thread(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        threads: list[threading.Thread] = []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)

        def load(**_: Any) -> ssl.SSLContext:
            threads.append(threading.current_thread())
            return context

        monkeypatch.setattr(ssl, "create_default_context", load)
        async with KafkaSettings(tls=True).open():
            pass
        assert Producer.made[0].options["ssl_context"] is context
        assert len(threads) == 1
        assert threads[0] is not threading.current_thread()

    @without_openssl
    def test_an_authority_of_ones_own_is_trusted(self, certificates: Path) -> None:
        tls = {"ca_file": certificates / "ca.pem"}
        context = KafkaSettings.model_validate({"tls": tls}).options()["ssl_context"]
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert [ca["subject"] for ca in context.get_ca_certs()] == [((("commonName", "ca"),),)]

    async def test_no_broker_is_said(self) -> None:
        with pytest.raises(Disconnected, match=r"kafka nobody:1: .*Unable to bootstrap"):
            async with KafkaSettings(brokers=("nobody:1",)).open():
                pass
