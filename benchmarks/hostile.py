"""Ten thousand hostile connections: does anything break, grow, or slow a good client down?

The daemon runs as a process of its own with the embedded checkpoint. One good client streams the
demo conversation at the speed it was spoken, first alone and then beside clients that send
messages that are too long, half samples, JSON that is none, values that are no audio, floods of
tiny messages, sessions and tokens that are not known, bytes that are no HTTP, frames that would
inflate to 200 MiB, and requests, bodies and messages that come a byte at a time and never end:
these are kept up until the server's own limit ends them.

    python -m benchmarks.hostile --cases 10000

It ends with a table of what was found beside what must hold, and with 1 if something does not.
`tests/stream/test_server.py` makes the same attacks on a daemon of its own.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import soundfile
import websockets
from rich.console import Console
from websockets.frames import Frame, Opcode

from benchmarks.daemon import MEETING, Daemon, family, free_ports, peak_mib
from benchmarks.verdict import Verdict

ALONE_S = 20.0
GROWTH_MIB = 32.0
SLOWER = 2.0
AT_ONCE = 8

SLOW_AT_ONCE: Final = 32
"""Slow connections beside them: each lasts as long as the server lets it."""

PATIENCE_S: Final = 60.0
"""A slow connection that still stands by then is not ended by the server at all."""

DRIP_S: Final = 0.05
"""How often a slow client sends a byte."""

INFLATED_MIB: Final = 200
"""What the compression bomb would become."""

PEAK_MIB: Final = INFLATED_MIB / 2
"""Growth for moments: the sessions of sixteen callers, but not one bomb."""

LIMIT: Final = 1 << 18
"""Bytes of a message that the server takes: the bomb is smaller."""

THROUGH: Final = ("let in", "taken", "held")
"""Outcomes of attacks that the server should have ended."""

TOKEN: Final = "a-token-of-the-hostile-run"


@dataclass(frozen=True, slots=True)
class Target:
    """The server that is attacked.

    Attributes:
        port: Of it, on this machine.
        token: What it lets in.
        limit: Bytes of a message that it takes.
    """

    port: int
    token: str
    limit: int = LIMIT

    @property
    def known(self) -> dict[str, str]:
        """Headers that it lets in."""
        return {"Authorization": f"Bearer {self.token}"}

    def url(self, path: str) -> str:
        """Of a WebSocket."""
        return f"ws://127.0.0.1:{self.port}{path}"


Attack = Callable[[Target, np.random.Generator], Awaitable[str]]


async def good_client(target: Target, stop: asyncio.Event, lags: list[tuple[float, float]]) -> None:
    """Streams in real time; notes when each event came and how late it was."""
    samples, _ = soundfile.read(MEETING, dtype="int16")
    url = target.url("/v1/audio?name=good")
    async with websockets.connect(url, ping_interval=None, additional_headers=target.known) as ws:

        async def read() -> None:
            async for message in ws:
                event = json.loads(message)
                if event.get("type") in {"turn.started", "transcript.partial"}:
                    lags.append((time.monotonic(), event["lag_ms"]))

        reading = asyncio.create_task(read())
        began, at = time.monotonic(), 0
        while not stop.is_set():
            await ws.send(np.take(samples, range(at, at + 1600), mode="wrap").tobytes())
            at += 1600
            await asyncio.sleep(max(began + at / 16_000 - time.monotonic(), 0))
        await ws.send('{"type": "close"}')
        await reading


async def _closing(target: Target, path: str, *messages: bytes | str, **keys: Any) -> str:
    """Connect, send, and wait for the server to close → its code, or why there was none."""
    keys = {"additional_headers": target.known, "max_size": None} | keys
    try:
        async with asyncio.timeout(10), websockets.connect(target.url(path), **keys) as ws:
            for message in messages:
                await ws.send(message)
            async for _ in ws:
                pass
            return str(ws.close_code)
    except websockets.ConnectionClosed as closed:
        return str(closed.rcvd.code if closed.rcvd else "cut")
    except (OSError, TimeoutError, websockets.InvalidHandshake) as error:
        return type(error).__name__


async def too_long(target: Target, rng: np.random.Generator) -> str:
    """A message over the limit."""
    return await _closing(target, "/v1/audio", bytes(target.limit + int(rng.integers(1, 99_999))))


async def half_a_sample(target: Target, rng: np.random.Generator) -> str:
    """Half a sample, and gone."""
    del rng
    try:
        async with (
            asyncio.timeout(10),
            websockets.connect(target.url("/v1/audio"), additional_headers=target.known) as ws,
        ):
            await ws.send(b"x")
            ws.transport.abort()
    except (OSError, TimeoutError, websockets.WebSocketException):
        pass
    return "gone"


async def no_json(target: Target, rng: np.random.Generator) -> str:
    """A command that is none."""
    commands = ["{", "[]", "\x00", '{"type": "?"}', "[" * 100_000]
    return await _closing(target, "/v1/audio", commands[rng.integers(len(commands))])


async def no_numbers(target: Target, rng: np.random.Generator) -> str:
    """Samples that are not a number, or much too large."""
    del rng
    values = np.full(500, np.nan, "<f4").tobytes() + np.full(500, 1e38, "<f4").tobytes()
    return await _closing(target, "/v1/audio?encoding=f32le", values, '{"type": "close"}')


async def flood(target: Target, rng: np.random.Generator) -> str:
    """Hundreds of tiny messages."""
    return await _closing(
        target, "/v1/audio", *['{"type": "keepalive"}'] * int(rng.integers(450, 600))
    )


async def unknown_session(target: Target, rng: np.random.Generator) -> str:
    """A resume token that is not known, of any length."""
    return await _closing(target, f"/v1/audio?resume={'x' * int(rng.integers(1, 3000))}")


async def odd_query(target: Target, rng: np.random.Generator) -> str:
    """Parameters that are none."""
    paths = ("/v1/listen?encoding=%00", "/v1/events?types=x", "/v1/twilio")
    return await _closing(target, paths[rng.integers(len(paths))], "{}")


async def no_http(target: Target, rng: np.random.Generator) -> str:
    """Bytes that are no request, or half of one, and gone."""
    _, writer = await asyncio.open_connection("127.0.0.1", target.port)
    writer.write(rng.bytes(300) if rng.random() < 0.5 else b"GET / HTTP/1.1\r\nHost: x\r\nA:")
    with suppress(ConnectionError):
        await writer.drain()
    writer.close()
    return "gone"


@cache
def bomb() -> bytes:
    """A binary frame, compressed by permessage-deflate (RFC 7692): zeros without end."""
    pack = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    # After a full flush the same input makes the same bytes again.
    block = pack.compress(bytes(1 << 20)) + pack.flush(zlib.Z_FULL_FLUSH)
    packed = (block * INFLATED_MIB).removesuffix(b"\x00\x00\xff\xff")
    frame = bytearray(Frame(Opcode.BINARY, packed).serialize(mask=True))
    frame[0] |= 0x40  # RSV1: compressed
    return bytes(frame)


async def compressed(target: Target, rng: np.random.Generator) -> str:
    """The bomb, whether the server agreed to compression or not."""
    assert len(bomb()) < target.limit
    path = ("/v1/audio", "/v1/events")[rng.integers(2)]
    try:
        async with (
            asyncio.timeout(10),
            websockets.connect(
                target.url(path), compression="deflate", additional_headers=target.known
            ) as ws,
        ):
            with suppress(RuntimeError):  # the server hung up first: what follows says why
                ws.transport.write(bomb())
            async for _ in ws:
                pass
    except websockets.ConnectionClosedError as closed:
        return str(closed.rcvd.code if closed.rcvd else "cut")
    except TimeoutError:
        pass
    except (OSError, websockets.InvalidHandshake) as error:
        return type(error).__name__
    return "taken"


async def unknown_token(target: Target, rng: np.random.Generator) -> str:
    """No token, or one that is not quite right, in every place where one may be shown."""
    token = target.token
    wrong = (token[:-1], token + "x", token.swapcase(), "x" * int(rng.integers(1, 3000)))
    shown = wrong[rng.integers(len(wrong))]
    ways: tuple[dict[str, Any], ...] = (
        {"additional_headers": {}},
        {"additional_headers": {"Authorization": f"Bearer {shown}"}},
        {"additional_headers": {"Authorization": f"Basic {token}"}},
        {"additional_headers": {"Cookie": f"livesat_token={shown}"}},
        {"additional_headers": {}, "subprotocols": ["token", shown]},
    )
    way = ways[rng.integers(len(ways))]
    path = ("/v1/audio", "/v1/events", "/v1/listen")[rng.integers(3)]
    try:
        async with asyncio.timeout(10), websockets.connect(target.url(path), **way) as ws:
            await ws.recv()
            return "let in"
    except websockets.ConnectionClosed as closed:
        return str(closed.rcvd.code if closed.rcvd else "cut")
    except websockets.InvalidStatus as refused:
        return str(refused.response.status_code)
    except (OSError, TimeoutError, websockets.InvalidHandshake) as error:
        return type(error).__name__


async def slow(target: Target, rng: np.random.Generator) -> str:
    """The head of a request, its body or a message, a byte at a time, for as long as it goes."""
    kind = rng.integers(3)
    if kind == 0:
        return await _drip_http(target, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: ")
    if kind == 1:
        head = b"POST /v1/login HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000\r\n\r\n"
        return await _drip_http(target, head)
    try:
        async with (
            asyncio.timeout(PATIENCE_S),
            websockets.connect(target.url("/v1/audio"), additional_headers=target.known) as ws,
        ):
            ws.transport.write(b"\x82\xfe\x40\x00mask")  # 16 KiB are to come (RFC 6455, 5.2)
            async with _dripping(ws.transport):
                async for _ in ws:
                    pass
            return str(ws.close_code)
    except websockets.ConnectionClosed as closed:
        return str(closed.rcvd.code if closed.rcvd else "cut")
    except TimeoutError:
        return "held"
    except (OSError, websockets.InvalidHandshake) as error:
        return type(error).__name__


async def _drip_http(target: Target, begin: bytes) -> str:
    """Until the server answers and hangs up, or only hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", target.port)
    try:
        writer.write(begin)
        async with asyncio.timeout(PATIENCE_S), _dripping(writer.transport):
            answer = await reader.read()
        return answer[9:12].decode("ascii", "replace") or "ended"
    except TimeoutError:
        return "held"
    except OSError:
        return "ended"
    finally:
        writer.close()


@asynccontextmanager
async def _dripping(transport: asyncio.WriteTransport) -> AsyncIterator[None]:
    async def drip() -> None:
        while not transport.is_closing():
            transport.write(b"x")
            await asyncio.sleep(DRIP_S)

    task = asyncio.create_task(drip())
    try:
        yield
    finally:
        task.cancel()


ATTACKS: Final[dict[str, Attack]] = {
    "too long": too_long,
    "half a sample": half_a_sample,
    "no JSON": no_json,
    "no numbers": no_numbers,
    "flood": flood,
    "unknown session": unknown_session,
    "odd query": odd_query,
    "no HTTP": no_http,
    "bomb": compressed,
    "unknown token": unknown_token,
    "slow": slow,
}


async def attacks(target: Target, cases: int, *, seed: int = 1) -> Counter[tuple[str, str]]:
    """Every kind in turn, several at once → (kind, what became of it) and how often."""
    outcomes: Counter[tuple[str, str]] = Counter()
    left, places = iter(range(cases)), asyncio.Semaphore(SLOW_AT_ONCE)
    kinds = list(ATTACKS)

    async def one(case: int) -> None:
        kind = kinds[case % len(kinds)]
        outcomes[kind, await ATTACKS[kind](target, np.random.default_rng([seed, case]))] += 1

    async def late(case: int) -> None:
        async with places:
            await one(case)

    async with asyncio.TaskGroup() as group:

        async def attacker() -> None:
            for case in left:
                if kinds[case % len(kinds)] == "slow":
                    group.create_task(late(case))
                else:
                    await one(case)

        for _ in range(AT_ONCE):
            group.create_task(attacker())
    return outcomes


def through(outcomes: Counter[tuple[str, str]]) -> dict[tuple[str, str], int]:
    """Those that the server should have ended and did not."""
    return {each: count for each, count in outcomes.items() if each[1] in THROUGH}


def forget_peak(pid: int) -> None:
    """The peak of a process's memory counts from now on, where Linux lets us say so."""
    with suppress(OSError):
        Path(f"/proc/{pid}/clear_refs").write_text("5")


async def measure(cases: int, console: Console) -> bool:
    """Run it → whether all held."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tree = {
            "server": {
                "port": port,
                "token": TOKEN,
                "max_streams": 16,
                "max_message_bytes": LIMIT,
                "connects_per_minute": 1_000_000,
                "idle_s": 10,
            },
            "log": {"level": "error"},
        }
        daemon, stop, lags = Daemon(folder, port), asyncio.Event(), list[tuple[float, float]]()
        target = Target(port, TOKEN)
        async with daemon.running(tree), daemon.http() as http:
            good = asyncio.create_task(good_client(target, stop, lags))
            await asyncio.sleep(ALONE_S)
            processes = family(daemon.pid)
            for process in processes:
                forget_peak(process)
            before, began = daemon.mib, time.monotonic()
            outcomes = await attacks(target, cases)
            took = time.monotonic() - began
            after, peak = daemon.mib, sum(map(peak_mib, processes))
            stop.set()
            await good
            status = (await http.get("/v1/status", headers=target.known)).json()
        faults = status["faults"] + daemon.tracebacks
    alone = float(np.quantile([lag for at, lag in lags if at < began], 0.99))
    beside = float(np.quantile([lag for at, lag in lags if at >= began] or [np.inf], 0.99))
    console.print(f"{cases} cases in {took:.0f} s:")
    for kind in ATTACKS:
        found = ", ".join(f"{n} {what}" for (k, what), n in outcomes.most_common() if k == kind)
        console.print(f"  {kind}: {found or 'none'}")
    verdict = Verdict(f"{cases} hostile connections beside a good client")
    verdict.exactly("cases", outcomes.total(), cases)
    verdict.exactly("attacks that got through", sum(through(outcomes).values()), 0)
    verdict.exactly("exceptions nobody took", faults, 0)
    verdict.tell("memory before", before, "MiB")
    verdict.most("growth of memory", after - before, GROWTH_MIB, "MiB")
    verdict.most("growth of its peak", peak - before, PEAK_MIB, "MiB")
    verdict.tell("the good client's p99 alone", alone, "ms")
    verdict.most("its p99 beside them", beside / alone, SLOWER, "×")
    verdict.exactly("exit code after SIGTERM", -1 if daemon.code is None else daemon.code, 0)
    return verdict.show(console)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=10_000)
    given = parser.parse_args()
    sys.exit(0 if asyncio.run(measure(given.cases, Console())) else 1)


if __name__ == "__main__":
    main()
