"""Whether this machine can do the job: one line a question, and what to do about a no."""

import asyncio
import json
import os
import platform
import socket
import ssl
import tempfile
import urllib.request
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Final, Literal
from urllib.parse import urlsplit

from sinks import KafkaSettings, NatsSettings, RedisSettings, StdoutSettings, WebhookSettings
from sinks.mqtt import MqttSettings
from sinks.sink import SinkError, SinkSettings
from sinks.tls import TlsSettings
from stream.config import Config
from stream.engine import Engine
from stream.inference import EngineError
from stream.log import without_credentials
from stream.server import ServerSettings
from stream.sources.microphone import MicrophoneSource
from stream.sources.rtp import RtpSource
from stream.sources.source import SourceError
from stream.voiceprints import default_path

TRIES_S: Final = 5.0
"""How long a sink's receiver may take to answer."""

ALERT_S: Final = 0.2
"""How long a refusal of our certificate may take: with TLS 1.3 it comes after the handshake."""


@dataclass(frozen=True, slots=True)
class Finding:
    """An answer.

    Attributes:
        subject: What was looked at.
        state: ok; note: a part is off that may not be needed; bad: the configuration cannot run.
        text: What was found.
        fix: What to do about it; "" where nothing is to do.
    """

    subject: str
    state: Literal["ok", "note", "bad"]
    text: str
    fix: str = ""


async def examine(config: Config) -> AsyncGenerator[Finding]:
    """All findings, as they are made."""
    yield await asyncio.to_thread(_versions)
    yield await asyncio.to_thread(_gpu, config)
    async for finding in _engine(config):
        yield finding
    yield await asyncio.to_thread(_microphones, config)
    for name, package, extra, use in _OPTIONAL:
        yield await asyncio.to_thread(_extra, name, package, extra, use)
    if config.server is not None:
        yield await asyncio.to_thread(_port, "server", config.server.host, config.server.port)
        if config.server.tls_cert is not None:
            yield await asyncio.to_thread(_certificate, config.server)
    for name, source in config.sources.items():
        host, port = getattr(source, "host", None), getattr(source, "port", None)
        if isinstance(host, str) and isinstance(port, int):
            udp = isinstance(source, RtpSource)
            yield await asyncio.to_thread(_port, f"source {name}", host, port, udp=udp)
    for name, sink in config.sinks.items():
        yield await _sink(name, sink)
    for key, path in (
        ("fanout.outbox", config.fanout.outbox),
        ("session.state", config.session.state),
        ("voiceprints", config.voiceprints or await asyncio.to_thread(_own_voices)),
    ):
        if path is not None:
            yield await asyncio.to_thread(_database, key, path)


def _versions() -> Finding:
    text = (
        f"livesat {metadata.version('livesat')}, Python {platform.python_version()}, "
        f"torch {metadata.version('torch')}, {platform.system()} {platform.machine()}"
    )
    return Finding("versions", "ok", text)


def _gpu(config: Config) -> Finding:
    import torch

    if torch.cuda.is_available():
        return Finding("gpu", "ok", torch.cuda.get_device_name(0))
    if config.engine.device.startswith("cuda"):
        fix = "install a CUDA build of torch and its driver, or set engine.device: cpu"
        return Finding("gpu", "bad", f"{config.engine.device} is asked for, none is here", fix)
    return Finding("gpu", "ok", f"none; {torch.get_num_threads()} CPU threads compute")


async def _engine(config: Config) -> AsyncGenerator[Finding]:
    began = perf_counter()
    try:
        async with Engine(config.engine) as engine:
            heads = ", ".join(engine.loaded.names)
            text = f"{heads}: loaded and warm in {perf_counter() - began:.1f} s"
            yield Finding("checkpoint", "ok", text)
            cost = await _cost(engine)
            room = int(0.8 / cost) if cost else 0
            text = f"{100 * cost:.1f} % of real time for one stream; room for about {room}"
            if cost < 0.8:
                yield Finding("speed", "ok", text)
            else:
                fix = "raise engine.chunk_ms, lower engine.left_ms, or use a GPU"
                yield Finding("speed", "bad", text, fix)
    except EngineError as error:
        yield Finding("checkpoint", "bad", str(error), "see engine.checkpoint in the configuration")


async def _cost(engine: Engine) -> float:
    """Compute seconds for a second of one stream's audio."""
    import numpy as np

    from stream.batcher import Ready

    slot = engine.acquire()
    rng = np.random.default_rng(0)
    before = 0.0, 0.0
    for step in range(12):
        samples = (rng.standard_normal(engine.loaded.chunk_samples) * 0.05).astype(np.float32)
        start = step * engine.loaded.chunk_samples
        await engine.run([Ready(slot, start, samples, len(samples), step == 0)])
        if step == 3:  # warm
            before = engine.stats.compute_s, engine.stats.audio_s
    engine.release(slot)
    return (engine.stats.compute_s - before[0]) / (engine.stats.audio_s - before[1])


def _microphones(config: Config) -> Finding:
    wanted = any(isinstance(each, MicrophoneSource) for each in config.sources.values())
    worst: Literal["note", "bad"] = "bad" if wanted else "note"
    try:
        from stream.sources.microphone import list_devices

        found = list_devices()
    except Exception as error:  # noqa: BLE001 - whatever it is, the microphone is off
        fix = "pip install 'livesat[mic]' and the system's libportaudio2"
        return Finding("microphone", worst, str(error) or type(error).__name__, fix)
    if not found:
        return Finding("microphone", worst, "no device can record", "plug one in; livesat devices")
    return Finding("microphone", "ok", ", ".join(device.name for device in found[:3]))


_OPTIONAL = (
    ("server", "uvicorn", "server", "the dashboard and network audio"),
    ("mqtt", "aiomqtt", "mqtt", "the MQTT sink"),
    ("ffmpeg", "av", "av", "RTSP, HTTP and container audio"),
    ("language model", "ufal-kenlm", "lm", "beam search with an n-gram"),
)


def _extra(name: str, package: str, extra: str, use: str) -> Finding:
    try:
        return Finding(name, "ok", f"{package} {metadata.version(package)}")
    except metadata.PackageNotFoundError:
        fix = f"pip install 'livesat[{extra}]'"
        return Finding(name, "note", f"{package} is not installed; off: {use}", fix)


def _port(subject: str, host: str, port: int, *, udp: bool = False) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    where = f"{host}:{port}" + (" (UDP)" if udp else "")
    try:
        with socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as probe:
            if not udp:  # two that say so may share a UDP port: it would look free
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            if not udp:
                probe.listen()
    except OSError as error:
        fix = "end what listens there (a daemon that runs already?), or choose another port"
        return Finding(subject, "bad", f"{where}: {error.strerror or error}", fix)
    return Finding(subject, "ok", f"{where} is free")


def _certificate(server: ServerSettings) -> Finding:
    try:
        server.ssl_context()
    except SourceError as error:
        fix = "correct server.tls_cert and server.tls_key: PEM files that livesat may read"
        return Finding("server TLS", "bad", str(error), fix)
    return Finding("server TLS", "ok", f"{server.tls_cert} and its key can be used")


_DRIVERS: Final = {
    "mqtt": "aiomqtt",
    "webhook": "httpx",
    "nats": "nats",
    "kafka": "aiokafka",
    "redis": "redis",
}
"""What a kind of sink imports when it is opened; the extra that brings it is named as the kind."""


async def _sink(name: str, sink: SinkSettings) -> Finding:
    subject = f"sink {name}"
    path = getattr(sink, "path", None)
    if isinstance(path, Path):
        return await asyncio.to_thread(_writable, subject, path)
    if isinstance(sink, StdoutSettings):
        return Finding(subject, "ok", sink.kind)
    driver = _DRIVERS.get(sink.kind)
    if driver is None:
        text = f"{sink.kind}: nothing is known of where it goes; it was not contacted"
        return Finding(subject, "note", text, "see its receiver yourself")
    if await asyncio.to_thread(find_spec, driver) is None:
        fix = f"pip install 'livesat[{sink.kind}]'"
        return Finding(subject, "bad", f"{sink.kind} needs {driver}, which is not installed", fix)
    return await _network(name, sink)


@dataclass(frozen=True, slots=True)
class _Door:
    """Where a sink's receiver listens.

    Attributes:
        host: Its name or address.
        port: TCP.
        encrypted: Whether TLS is spoken.
        nats: Whether a NATS server talks first, and encrypts what follows.
        proxy: Whether it only leads to the receiver.
    """

    host: str
    port: int
    encrypted: bool
    nats: bool = False
    proxy: bool = False

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


async def _network(name: str, sink: SinkSettings) -> Finding:
    """Connect to every receiver that the settings name; one that answers is enough to run."""
    subject, key = f"sink {name}", f"sinks.{name}"
    try:
        doors = _doors(sink)
        if isinstance(sink, MqttSettings):
            sink.secret()
        if isinstance(sink, NatsSettings) and sink.credentials is not None:
            await asyncio.to_thread(sink.credentials.read_bytes)
        context = await asyncio.to_thread(_context, sink) if doors[0].encrypted else None
    except (SinkError, ValueError, OSError) as error:
        return Finding(subject, "bad", without_credentials(str(error)), f"correct {key}")
    failed = {door: why for door in doors if (why := await _failure(door, context))}
    fix = f"start the receiver, or correct {key}"
    reached = ", ".join(str(door) for door in doors if door not in failed)
    text = "; ".join(f"{door}: {why}" for door, why in failed.items())
    if not reached:
        return Finding(subject, "bad", text, fix)
    if failed:
        return Finding(subject, "note", f"{sink.kind} at {reached} answers; {text}", fix)
    if isinstance(sink, RedisSettings) and (why := await _refusal(sink)):
        return Finding(subject, "bad", f"{reached}: {why}", f"correct {key}")
    if doors[0].proxy:
        text = f"{sink.kind}: the proxy {reached} answers; whom it leads to was not seen"
        return Finding(subject, "note", text)
    how = " with TLS" if context is not None else ""
    return Finding(subject, "ok", f"{sink.kind} at {reached} answers{how}")


def _doors(sink: SinkSettings) -> list[_Door]:
    """The receivers that a sink's settings name, at least one.

    Raises:
        ValueError: an address is none.
    """
    match sink:
        case MqttSettings():
            return [_Door(*sink.address, encrypted=sink.tls is not None)]
        case RedisSettings():
            return [_Door(sink.host, sink.port, bool(sink.tls))]
        case KafkaSettings():
            brokers = [_address("brokers", broker, 9092) for broker in sink.brokers]
            return [_Door(*broker, encrypted=bool(sink.tls)) for broker in brokers]
        case NatsSettings():
            return _nats(sink)
        case WebhookSettings():
            return [_receiver(sink)]
        case _:
            raise ValueError(f"kind: nothing is known of the address of {sink.kind}")


def _nats(sink: NatsSettings) -> list[_Door]:
    doors: list[_Door] = []
    for url in sink.servers:
        scheme = url.partition("://")[0]
        web = scheme in {"ws", "wss"}
        host, port = _address("servers", url, {"ws": 80, "wss": 443}.get(scheme, 4222))
        doors.append(_Door(host, port, scheme == "wss" if web else sink.encrypted, nats=not web))
    return doors


def _receiver(sink: WebhookSettings) -> _Door:
    """The URL's host, or the environment's proxy to it, which the driver uses too."""
    scheme, host, port = sink.url.scheme, sink.url.host or "", sink.url.port or 0
    proxies = urllib.request.getproxies()
    proxy = proxies.get(scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        return _Door(*_address("the proxy", proxy, 80), encrypted=False, proxy=True)
    return _Door(host.strip("[]"), port, scheme == "https")


def _address(key: str, text: str, usual: int) -> tuple[str, int]:
    """``host:port``, or a URL of it → host, port.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(text if "://" in text else f"//{text}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host:
        raise ValueError(f"{key}: got {text!r}, expected host:port")
    return host, usual if port is None else port


def _context(sink: SinkSettings) -> ssl.SSLContext:
    """Load the certificates of a sink's settings; blocking.

    Raises:
        SinkError: a file is missing or not what it should be.
    """
    tls: TlsSettings | None = getattr(sink, "tls", None)
    if tls is not None:
        return tls.context()
    if isinstance(sink, WebhookSettings):  # its driver brings the CAs it trusts
        import httpx

        return httpx.create_ssl_context()
    return ssl.create_default_context()


async def _failure(door: _Door, context: ssl.SSLContext | None) -> str:
    """Connect, say nothing and go → what was wrong; "" if nothing was."""
    try:
        async with asyncio.timeout(TRIES_S):
            first = None if door.nats else context
            reader, writer = await asyncio.open_connection(door.host, door.port, ssl=first)
            try:
                if door.nats:
                    why = _unlike(await reader.readline(), context is not None)
                    if why or context is None:
                        return why
                    await writer.start_tls(context, server_hostname=door.host)
                return await _alert(reader) if context is not None else ""
            finally:
                writer.transport.abort()
    except TimeoutError:
        return f"no answer in {TRIES_S:.0f} s"
    except (OSError, ValueError) as error:
        return str(error) or type(error).__name__


async def _alert(reader: asyncio.StreamReader) -> str:
    """What the other side has against us once the handshake is done; "" for nothing."""
    try:
        async with asyncio.timeout(ALERT_S):
            said = await reader.read(1)
    except TimeoutError:
        return ""
    return "" if said else "hangs up after the TLS handshake; it may expect a certificate of ours"


def _unlike(said: bytes, encrypted: bool) -> str:
    """A server's first line → why we cannot be its NATS client; "" if we can."""
    word, _, text = said.partition(b" ")
    if word != b"INFO":
        return "no NATS server: expected INFO as its first word"
    info = json.loads(text)
    required = bool(info.get("tls_required"))
    if required and not encrypted:
        return "expects TLS, and none is set"
    if encrypted and not (required or info.get("tls_available")):
        return "offers no TLS, and it is set"
    return ""


async def _refusal(sink: SinkSettings) -> str:
    """Log in and leave, which changes nothing there → what was wrong; "" if nothing was."""
    try:
        async with asyncio.timeout(TRIES_S), AsyncExitStack() as stack:
            await stack.enter_async_context(sink.open())
    except (SinkError, OSError, TimeoutError) as error:
        return str(error) or f"no answer in {TRIES_S:.0f} s"
    return ""


def _own_voices() -> Path | None:
    """The user's own voices, if there are any."""
    return default_path() if default_path().exists() else None


def _writable(subject: str, path: Path) -> Finding:
    """A file that a sink writes; its folder has to be there."""
    folder = path.absolute().parent
    if why := _no_file(path) or _closed(folder):
        fix = f"make the folder {folder}, or its owner the user that runs livesat"
        return Finding(subject, "bad", f"{path}: {why}", fix)
    return Finding(subject, "ok", f"{path} can be written")


_SQLITE: Final = b"SQLite format 3\0"


def _database(subject: str, path: Path) -> Finding:
    """A database of ours; its folder is made when it is not there."""
    folder = path.absolute().parent
    there = next(each for each in (folder, *folder.parents) if each.exists())
    if why := _no_file(path) or _closed(there):
        fix = f"choose another {subject}, or let the user that runs livesat write {there}"
        return Finding(subject, "bad", f"{path}: {why}", fix)
    try:
        with path.open("rb") as file:
            head = file.read(len(_SQLITE))
    except FileNotFoundError:
        return Finding(subject, "ok", f"{path} can be made")
    except OSError as error:
        fix = f"let the user that runs livesat read {path}"
        return Finding(subject, "bad", f"{path}: {error.strerror or error}", fix)
    if head not in {b"", _SQLITE}:
        fix = f"choose another {subject}, or move that file away"
        return Finding(subject, "bad", f"{path}: expected a SQLite database of livesat", fix)
    return Finding(subject, "ok", f"{path} can be read and written")


def _no_file(path: Path) -> str:
    """Why what is under the name cannot be a file that we write; "" if it can, or is not there."""
    try:
        if not path.exists():
            return ""
    except OSError as error:
        return error.strerror or str(error)
    if not path.is_file():
        return "expected a file"
    return "" if os.access(path, os.W_OK) else "may not be written"


def _closed(folder: Path) -> str:
    """Why no file can be made in a folder; "" if one can."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""
