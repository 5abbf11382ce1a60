"""Whether this machine can do the job: one line a question, and what to do about a no."""

import asyncio
import platform
import socket
import tempfile
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from time import perf_counter
from typing import Literal

from sinks.sink import SinkError
from stream.config import Config
from stream.engine import Engine
from stream.inference import EngineError
from stream.sources.microphone import MicrophoneSource

TRIES_S = 5.0
"""How long a sink may take to open."""


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
    for name, source in config.sources.items():
        host, port = getattr(source, "host", None), getattr(source, "port", None)
        if isinstance(host, str) and isinstance(port, int):
            yield await asyncio.to_thread(_port, f"source {name}", host, port)
    for name, sink in config.sinks.items():
        yield await _sink(name, sink)
    for key, path in (("session.state", config.session.state), ("voiceprints", config.voiceprints)):
        if path is not None:
            yield await asyncio.to_thread(_writable, key, path)


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


def _port(subject: str, host: str, port: int) -> Finding:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        fix = "end what listens there (a daemon that runs already?), or choose another port"
        return Finding(subject, "bad", f"{host}:{port}: {error.strerror or error}", fix)
    return Finding(subject, "ok", f"{host}:{port} is free")


async def _sink(name: str, sink: object) -> Finding:
    from sinks.sink import SinkSettings

    assert isinstance(sink, SinkSettings)
    subject = f"sink {name}"
    host, port = getattr(sink, "host", None), getattr(sink, "port", None)
    if not isinstance(host, str) or not isinstance(port, int):
        path = getattr(sink, "path", None)
        if isinstance(path, Path):
            return await asyncio.to_thread(_writable, subject, path)
        return Finding(subject, "ok", f"{sink.kind}")
    try:
        async with asyncio.timeout(TRIES_S), AsyncExitStack() as stack:
            await stack.enter_async_context(sink.open())
    except (SinkError, OSError, TimeoutError) as error:
        why = str(error) or f"no answer in {TRIES_S:.0f} s"
        fix = f"start the broker, or correct sinks.{name}"
        return Finding(subject, "bad", f"{host}:{port}: {why}", fix)
    return Finding(subject, "ok", f"{sink.kind} at {host}:{port} takes us")


def _writable(subject: str, path: Path) -> Finding:
    folder = path.expanduser().absolute().parent
    probe: Callable[[], object] = lambda: tempfile.TemporaryFile(dir=folder).close()  # noqa: E731
    try:
        probe()
    except OSError as error:
        fix = f"make the folder {folder}, or its owner the user that runs livesat"
        return Finding(subject, "bad", f"{path}: {error.strerror or error}", fix)
    return Finding(subject, "ok", f"{path} can be written")
