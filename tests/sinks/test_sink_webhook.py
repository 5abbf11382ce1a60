import asyncio
import hashlib
import hmac
import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import SecretStr, ValidationError

from sinks import WebhookSettings
from sinks.events import parse
from sinks.sink import Disconnected, Rejected, SinkError
from stream.fanout import Fanout, FanoutSettings
from tests.certificates import REFUSED, certificates, without_openssl
from tests.sinks.samples import Talk

__all__ = ["certificates"]


class Receiver(ThreadingHTTPServer):
    """Takes what is posted; answers by script, then 204."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[int] = []
        self.refused: set[str] = set()
        self.requests: list[tuple[dict[str, str], bytes]] = []
        self.taken: list[Any] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.requests.append((dict(self.headers), body))
        events = json.loads(body)
        status = self.server.script.pop(0) if self.server.script else 204
        if any(event.get("id", event.get("seq")) in self.server.refused for event in events):
            status = 422
        if status < 300:
            self.server.taken += events
        self.send_response(status)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def settings(receiver: Receiver, **more: Any) -> WebhookSettings:
    return WebhookSettings.model_validate({"url": receiver.url, **more})


FAST = FanoutSettings(retry_first_s=0.01, retry_longest_s=0.02)


async def test_events_come_in_signed_batches_and_in_order(receiver: Receiver) -> None:
    sent = [event for event in Talk().every_type() if event.is_final]
    secret = "a shared secret"
    sinks = {"hook": settings(receiver, secret=secret, bearer="b", batch=4)}
    async with Fanout(sinks, FAST, fail_fast=True) as out:
        for event in sent:
            await out.publish(event)
    assert [parse(json.dumps(event)) for event in receiver.taken] == sent
    assert len(receiver.requests) < len(sent)
    for headers, body in receiver.requests:
        at, _, digest = headers["X-Livesat-Signature"].partition(",v1=")
        wanted = hmac.new(secret.encode(), at[2:].encode() + b"." + body, hashlib.sha256)
        assert digest == wanted.hexdigest()
        assert headers["Authorization"] == "Bearer b"
        first = json.loads(body)[0]
        assert headers["Idempotency-Key"].startswith(f"{first['session_id']}:{first['seq']}/")


async def test_not_now_is_tried_again_and_a_refusal_costs_one_event(receiver: Receiver) -> None:
    talk = Talk()
    sent = [talk.warning() for _ in range(6)]
    receiver.script = [503, 429, 408]
    receiver.refused = {sent[2].seq}
    async with Fanout({"hook": settings(receiver)}, FAST) as out:
        for event in sent:
            await out.publish(event)
        while out.statistics()["hook"].sent + out.statistics()["hook"].rejected < 6:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        statistics = out.statistics()["hook"]
    taken = [event["seq"] for event in receiver.taken]
    assert statistics.rejected == 1
    assert taken == [event.seq for event in sent if event is not sent[2]]


async def test_the_cloudevents_envelope(receiver: Receiver) -> None:
    event = Talk().warning()
    async with settings(receiver, envelope="cloudevents").open() as sink:
        await sink.send(event)
    ((headers, _),) = receiver.requests
    assert headers["Content-Type"] == "application/cloudevents-batch+json"
    (cloud,) = receiver.taken
    assert cloud["specversion"] == "1.0"
    assert (cloud["id"], cloud["type"]) == (event.id, "livesat.warning")
    assert cloud["subject"] == event.session_id
    assert parse(json.dumps(cloud["data"])) == event


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (500, SinkError),
        (429, SinkError),
        (401, SinkError),  # a token that has expired is no fault of the events
        (400, Rejected),
        (301, Rejected),
    ],
)
async def test_what_an_answer_means(
    receiver: Receiver, status: int, error: type[SinkError]
) -> None:
    receiver.script = [status]
    async with settings(receiver).open() as sink:
        with pytest.raises(error, match=f"127.0.0.1 answers {status}") as raised:
            await sink.send(Talk().warning())
    assert type(raised.value) is error


async def test_nobody_there_is_a_lost_connection() -> None:
    hook = WebhookSettings.model_validate({"url": "http://127.0.0.1:9/x"})
    async with hook.open() as sink:
        with pytest.raises(Disconnected, match=r"127\.0\.0\.1: "):
            await sink.send(Talk().warning())


async def test_an_answer_that_drips_is_not_waited_for() -> None:
    hung_up = asyncio.Event()

    async def drip(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with suppress(ConnectionError):
            while True:
                writer.write(b".")
                await writer.drain()
                await asyncio.sleep(0.01)
        writer.close()
        hung_up.set()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    hook = {"url": f"http://127.0.0.1:{port}/", "timeout_s": 0.1}
    async with server, WebhookSettings.model_validate(hook).open() as sink:
        with pytest.raises(Disconnected, match=r"127\.0\.0\.1: TimeoutError"):
            await sink.send(Talk().warning())
        await hung_up.wait()


@without_openssl
@pytest.mark.parametrize(("shown", "trusted", "wrong"), [("good", "ca", None), *REFUSED])
async def test_tls_wants_a_certificate_it_can_trust(
    receiver: Receiver, certificates: Path, shown: str, trusted: str, wrong: str | None
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{shown}.pem", certificates / f"{shown}.key")
    receiver.socket = context.wrap_socket(receiver.socket, server_side=True)
    url = receiver.url.replace("http:", "https:")
    hook = settings(receiver, url=url, tls={"ca_file": certificates / f"{trusted}.pem"})
    async with hook.open() as sink:
        if wrong is None:
            await sink.send(Talk().warning())
            assert len(receiver.taken) == 1
        else:
            with pytest.raises(Disconnected, match=wrong):
                await sink.send(Talk().warning())
            assert receiver.requests == []


async def test_certificates_are_loaded_in_a_thread(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    client = httpx.AsyncClient

    def make(**options: Any) -> httpx.AsyncClient:
        threads.append(threading.current_thread())
        return client(**options)

    monkeypatch.setattr(httpx, "AsyncClient", make)
    async with settings(receiver).open() as sink:
        await sink.send(Talk().warning())
    assert len(receiver.taken) == len(threads) == 1
    assert threads[0] is not threading.current_thread()


def test_secrets_do_not_show() -> None:
    made = WebhookSettings.model_validate({"url": "http://h/x", "secret": "hush"})
    assert made.secret == SecretStr("hush")
    assert "hush" not in repr(made) + made.model_dump_json()
    with pytest.raises(ValidationError, match="without a password"):
        WebhookSettings.model_validate({"url": "http://user:hush@h/x"})
