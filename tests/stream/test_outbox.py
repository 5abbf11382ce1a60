import asyncio
import contextlib
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import structlog

from sinks import SinkError
from sinks.events import parse
from sinks.sink import Disconnected
from stream import outbox as outbox_module
from stream.fanout import DurableSpool, Fanout, FanoutSettings
from stream.outbox import Outbox
from tests.sinks.samples import Talk
from tests.stream.house import until
from tests.stream.test_fanout import recorder

FAST = {"retry_first_s": 0.01, "retry_longest_s": 0.02, "drain_s": 0.2}


def durable(path, **more):
    return FanoutSettings(outbox=path, **FAST, **more)


class TestFile:
    async def test_rows_come_back_in_order_until_they_are_settled(self, tmp_path):
        path = tmp_path / "new" / "outbox.db"
        async with Outbox.open(path, ["a", "b"]) as outbox:
            rows = [outbox.append("a", f"s:{i}", b"%d" % i) for i in range(5)]
            outbox.append("b", "s:0", b"other")
            outbox.settle(rows[0])
            assert [row.data for row in await outbox.read("a", rows[1], 2)] == [b"2", b"3"]
        async with Outbox.open(path, ["a", "b"]) as outbox:
            assert {sink: len(rows) for sink, rows in outbox.found.items()} == {"a": 4, "b": 1}
            assert [row.data for row in await outbox.read("a", 0, 9)] == [b"1", b"2", b"3", b"4"]
            assert outbox.append("a", "s:9", b"9") > rows[-1]

    async def test_what_waits_for_a_sink_that_is_gone_is_dropped(self, tmp_path):
        path = tmp_path / "outbox.db"
        async with Outbox.open(path, ["a", "b"]) as outbox:
            outbox.append("a", "s:0", b"0")
            outbox.append("b", "s:0", b"0")
        async with Outbox.open(path, ["b"]) as outbox:
            assert list(outbox.found) == ["b"]

    async def test_nobody_else_may_read_it(self, tmp_path):
        path = tmp_path / "outbox.db"
        before = os.umask(0o022)
        try:
            async with Outbox.open(path, ["a"]) as outbox:
                outbox.append("a", "s:0", b"0")
                await outbox.read("a", 0, 1)
                files = await asyncio.to_thread(lambda: list(Path(tmp_path).iterdir()))
                modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in files}
        finally:
            os.umask(before)
        assert modes.keys() >= {"outbox.db", "outbox.db-wal"}
        assert set(modes.values()) == {0o600}

    async def test_a_second_owner_is_refused(self, tmp_path):
        path = tmp_path / "outbox.db"
        async with Outbox.open(path, ["a"]) as outbox:
            outbox.append("a", "s:0", b"0")
            with pytest.raises(SinkError, match=r"outbox\.db: is used by another process"):
                async with Outbox.open(path, []):
                    pass
            assert len(await outbox.read("a", 0, 9)) == 1

    @pytest.mark.parametrize(
        ("statement", "got"),
        [
            (None, "file is not a database"),
            ("PRAGMA user_version = 7", "version 7: of a newer livesat"),
            ("CREATE TABLE bills (n)", "one with other tables"),
        ],
    )
    async def test_another_file_is_refused_and_left_alone(self, tmp_path, statement, got):
        path = tmp_path / "outbox.db"
        if statement is None:
            path.write_bytes(b"no database" * 100)
        else:
            with contextlib.closing(sqlite3.connect(path)) as database:
                database.execute(statement)
        before = path.read_bytes()
        with pytest.raises(
            SinkError, match=rf"fanout\.outbox: .*expected an outbox of version 1, got {got}"
        ):
            async with Fanout({}, durable(path)):
                pass
        assert path.read_bytes() == before


class TestDelivery:
    async def test_an_outage_across_restarts_loses_nothing(self, tmp_path):
        talk, path = Talk(), tmp_path / "outbox.db"
        sent = [talk.warning() for _ in range(50)]
        for part in (sent[:20], sent[20:40]):  # two runs in which nobody is there
            down = recorder()
            down._open_errors.extend([Disconnected("down")] * 1000)
            async with Fanout({"a": down}, durable(path, queue=4)) as out:
                for event in part:
                    await out.publish(event)
        up = recorder()
        async with Fanout({"a": up}, durable(path, queue=4)) as out:
            for event in sent[40:]:
                await out.publish(event)
            await until(lambda: len(up._got) == len(sent))
            assert out.statistics()["a"].queued == 0
        assert up._got == sent
        again = recorder()
        async with Fanout({"a": again}, durable(path)) as out:
            await out.publish(talk.warning("more"))
            await until(lambda: again._got != [])
        assert [event.seq for event in again._got] == [50]

    async def test_memory_holds_a_window_however_long_the_outage(self, tmp_path):
        talk, down = Talk(), recorder()
        down._open_errors.extend([Disconnected("down")] * 10_000)
        async with Fanout({"a": down}, durable(tmp_path / "o.db", queue=8)) as out:
            sent = [talk.warning() for _ in range(500)]
            for event in sent:
                await out.publish(event)
                await out.publish(talk.heard("…"))
            lane = out._lanes["a"]
            assert len(lane._spool._waiting) <= 8
            statistics = out.statistics()["a"]
            assert statistics.queued >= len(sent)
            assert statistics.dropped_partials >= 490
            down._open_errors.clear()
            await until(lambda: sum(event.is_final for event in down._got) == len(sent))
        finals = [event for event in down._got if event.is_final]
        assert finals == sent

    async def test_who_has_caught_up_waits_for_the_disk_no_more(self, tmp_path, monkeypatch):
        """While events keep coming, too: then a handful always waits."""
        talk, sink, reads = Talk(), recorder(slow=True), list[int]()
        read = Outbox.read

        async def counted(outbox, name, after, limit):
            reads.append(after)
            return await read(outbox, name, after, limit)

        monkeypatch.setattr(Outbox, "read", counted)
        async with Fanout({"a": sink}, durable(tmp_path / "o.db", queue=8)) as out:
            for _ in range(40):
                await out.publish(talk.warning())
            sink._gate.set()
            for count in range(200):
                enough = min(2 * count, 35 + count)  # twice as fast, then as fast, and 5 behind
                await until(lambda: len(sink.seqs) >= enough)  # noqa: B023 - awaited here
                await out.publish(talk.warning())
            await until(lambda: len(sink.seqs) == 240)
        assert sink.seqs == list(range(240))
        assert len(reads) <= 20, reads  # those of the backlog

    async def test_beyond_the_cap_the_oldest_goes_and_is_counted(self, tmp_path):
        talk, down = Talk(), recorder()
        down._open_errors.extend([Disconnected("down")] * 10_000)
        async with Fanout({"a": down}, durable(tmp_path / "o.db", queue=4, spool=10)) as out:
            for _ in range(15):
                await out.publish(talk.warning())
            assert out.statistics()["a"].lost_finals == 5
            down._open_errors.clear()
            await until(lambda: len(down._got) == 10)
        # The first four were in memory, from where the oldest is dropped.
        assert [event.seq for event in down._got] == sorted(event.seq for event in down._got)

    async def test_a_sink_of_one_run_is_not_kept(self, tmp_path):
        from sinks import RttmSettings

        path, talk = tmp_path / "o.db", Talk()
        sinks = {"r": RttmSettings(path=tmp_path / "a.rttm")}
        async with Fanout(sinks, durable(path), fail_fast=True) as out:
            await out.publish(talk.turn("T1", "S1", 0.0, 1.0))
        async with Outbox.open(path, ["r"]) as outbox:
            assert outbox.found == {}

    async def test_trouble_is_told_once_and_so_is_its_end(self, tmp_path):
        told, talk, sink = [], Talk(), recorder()
        sink._send_errors.extend([SinkError("full")] * 3)
        async with Fanout(
            {"a": sink},
            durable(tmp_path / "o.db"),
            trouble=lambda name, error: told.append((name, error)),
        ) as out:
            await out.publish(talk.warning())
            await until(lambda: len(told) == 2)
        assert told == [("a", "full"), ("a", None)]


class TestDropsWhileReading:
    """A final over the cap costs the oldest, also while the oldest are being read."""

    async def sent(self, spool):
        seqs = []
        while spool.finals:
            if spool.hungry:
                await spool.refill()
            seqs += [event.seq for event in spool.take(5)]
            spool.settle()
        return seqs

    @pytest.mark.parametrize("queue", [1, 8, 64])
    @pytest.mark.parametrize("more", [1, 3, 19, 20, 45])
    async def test_order_and_completeness_hold(self, tmp_path, queue, more):
        talk, path = Talk(), tmp_path / "o.db"
        async with Outbox.open(path, ["a"]) as outbox:
            spool = DurableSpool(64, 20, outbox, "a")
            for _ in range(20):
                spool.put(talk.warning())
            spool.clear()
        async with Outbox.open(path, ["a"]) as outbox:
            spool = DurableSpool(queue, 20, outbox, "a")
            refill = asyncio.create_task(spool.refill())
            await asyncio.sleep(0)
            for _ in range(more):
                spool.put(talk.warning())
            await refill
            assert spool._rows  # something of it came, however much was dropped
            assert spool.finals == 20
            assert spool.lost_finals == more
            assert await self.sent(spool) == list(range(more, 20 + more))
            assert (spool.finals, spool.hungry) == (0, False)
            spool.put(talk.warning())
            assert await self.sent(spool) == [20 + more]
        async with Outbox.open(path, ["a"]) as outbox:
            assert outbox.found == {}

    async def test_an_event_nobody_can_read_holds_up_nobody(self, tmp_path):
        talk, path = Talk(), tmp_path / "o.db"
        async with Outbox.open(path, ["a"]) as outbox:
            outbox.append("a", "s:x", b'{"type": "of tomorrow"}')
            outbox.found["a"] = [1]
            spool = DurableSpool(4, 20, outbox, "a")
            spool.put(talk.warning())
            assert await self.sent(spool) == [0]
            assert spool.lost_finals == 1


class Locked:
    """A disk that takes nothing for as long as another process holds the file."""

    def __init__(self, path):
        self._other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        self._other.execute("BEGIN IMMEDIATE")

    def open(self):
        self._other.execute("ROLLBACK")
        self._other.close()


class TestDiskThatTakesNothing:
    @pytest.fixture(autouse=True)
    def impatient(self, monkeypatch):
        monkeypatch.setattr(outbox_module, "RETRY_S", 0.005)
        monkeypatch.setattr(outbox_module, "GATHER_S", 0.001)
        connect = sqlite3.connect

        def at_once(*args, **keys):
            return connect(*args, **{"timeout": 0, **keys})

        monkeypatch.setattr(sqlite3, "connect", at_once)

    async def test_the_backlog_has_a_bound_and_the_rest_is_counted(self, tmp_path, monkeypatch):
        monkeypatch.setattr(outbox_module, "BACKLOG", 100)
        path = tmp_path / "o.db"
        async with Outbox.open(path, ["a"]) as outbox:
            disk = await asyncio.to_thread(Locked, path)
            first = [outbox.append("a", "s", b"%d" % i) for i in range(50)]
            await until(lambda: outbox.failure is not None)
            # Once the thread holds them, they count as before.
            second = [outbox.append("a", "s", b"%d" % i) for i in range(50, 3000)]
            assert None not in first + second[:50]
            assert set(second[50:]) == {None}
            assert outbox.lost == 2900
            # What waits can be read, in order, and what goes again makes room.
            rows = await outbox.read("a", 10, 1000)
            assert [row.data for row in rows] == [b"%d" % i for i in range(10, 100)]
            for n in first:
                outbox.settle(n)
            await until(lambda: outbox._given - outbox._finished == 50)
            assert outbox.append("a", "s", b"more") is not None
            await asyncio.to_thread(disk.open)
            await until(lambda: outbox.failure is None)
        async with Outbox.open(path, ["a"]) as outbox:
            assert len(outbox.found["a"]) == 51

    async def test_an_attempt_takes_some_of_what_waits(self, tmp_path, monkeypatch):
        monkeypatch.setattr(outbox_module, "TOGETHER", 7)
        tried = []
        commit = Outbox._commit
        monkeypatch.setattr(
            Outbox,
            "_commit",
            lambda self, database, jobs: tried.append(len(jobs)) or commit(self, database, jobs),
        )
        path = tmp_path / "o.db"
        async with Outbox.open(path, ["a"]) as outbox:
            disk = await asyncio.to_thread(Locked, path)
            for i in range(100):
                outbox.append("a", "s", b"%d" % i)
            await until(lambda: len(tried) > 3)
            await asyncio.to_thread(disk.open)
            assert [row.data for row in await outbox.read("a", 0, 200)] == [
                b"%d" % i for i in range(100)
            ]
        assert max(tried) == 7

    async def test_what_is_not_on_disk_at_the_end_is_counted_and_logged(self, tmp_path):
        talk, path, down = Talk(), tmp_path / "o.db", recorder()
        down._open_errors.extend([Disconnected("down")] * 10_000)
        with structlog.testing.capture_logs() as logs:
            async with Fanout({"a": down}, durable(path)) as out:
                for _ in range(3):
                    await out.publish(talk.warning())
                outbox = out._outbox
                await outbox.read("a", 0, 1)  # written
                disk = await asyncio.to_thread(Locked, path)
                for _ in range(5):
                    await out.publish(talk.warning())
            statistics = out.statistics()["a"]
            await asyncio.to_thread(disk.open)
        assert outbox.lost == 5
        assert (statistics.lost_finals, statistics.queued) == (5, 3)
        errors = {log["event"]: log["events"] for log in logs if "events" in log}
        assert errors["outbox lost events at the end"] == 5
        assert errors["events not delivered"] == 5


WRITER = """
import asyncio, sys
import structlog
from sinks import JsonlSettings
from stream.fanout import Fanout, FanoutSettings
from tests.sinks.samples import Talk

async def main(folder, session):
    sinks = {"log": JsonlSettings(path=folder + "/events.jsonl")}
    talk = Talk(session)
    async with Fanout(sinks, FanoutSettings(outbox=folder + "/outbox.db")) as out:
        while True:
            await out.publish(talk.warning("x" * 50))
            print(talk.seq - 1, flush=True)
            await asyncio.sleep(0.001)

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main(sys.argv[1], sys.argv[2]))
"""


@pytest.mark.slow
def test_a_killed_daemon_loses_nothing_it_committed_and_tears_no_line(tmp_path):
    """Reliability bar, row 3."""
    for number in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path), f"s{number}"],
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert process.stdout is not None
        for _ in range(100 + 37 * number):
            last = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        process.stdout.close()
        process.wait()
        with contextlib.closing(sqlite3.connect(tmp_path / "outbox.db")) as database:
            waiting = {row[0] for row in database.execute("SELECT id FROM waiting")}
        lines = (tmp_path / "events.jsonl").read_bytes().splitlines()
        written = {parse(line).id for line in lines}  # every line is whole
        # What was published and is nowhere had not been committed: the last milliseconds.
        published = {f"s{number}:{seq}" for seq in range(last + 1)}
        missing = sorted(int(each.partition(":")[2]) for each in published - written - waiting)
        assert len(missing) <= 100, f"{len(missing)} of {last} are nowhere"
        assert missing == list(range(last + 1 - len(missing), last + 1))


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
class TestFullDisk:
    """Reliability bar, row 14: a disk of one mebibyte in a namespace of its own."""

    SCRIPT = """
import asyncio, contextlib, os, sys
from sinks import JsonlSettings
from sinks.events import parse
from stream.fanout import Fanout, FanoutSettings
from tests.sinks.samples import Talk

async def main(small, large):
    told = []
    sinks = {
        "small": JsonlSettings(path=small + "/events.jsonl"),
        "large": JsonlSettings(path=large + "/events.jsonl"),
    }
    settings = FanoutSettings(outbox=small + "/outbox.db", retry_first_s=0.05, retry_longest_s=0.1)
    talk = Talk()
    ballast = small + "/ballast"
    trouble = lambda name, error: told.append((name, error))
    async with Fanout(sinks, settings, trouble=trouble) as out:
        # Full to the last page: whether what follows fits is not left to chance.
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        for _ in range(200):
            await out.publish(talk.warning("x" * 300))
        while out._outbox.failure is None:
            await asyncio.sleep(0.01)
        while out.statistics()["large"].sent < 200:
            await asyncio.sleep(0.01)
        while not told:
            await asyncio.sleep(0.01)
        assert out.statistics()["small"].sent < 200
        os.truncate(ballast, 0)
        while out.statistics()["small"].sent < 200:
            await asyncio.sleep(0.01)
        while out._outbox.failure is not None:
            await asyncio.sleep(0.01)
    assert told[0][0] == "small" and "No space left" in told[0][1], told
    lines = open(small + "/events.jsonl", "rb").read().splitlines(keepends=True)
    assert [parse(line).seq for line in lines] == list(range(len(lines)))
    assert all(line.endswith(b"\\n") for line in lines)
    print(len(lines), told)

asyncio.run(main(*sys.argv[1:]))
"""

    def test_other_sinks_go_on_and_no_record_is_torn(self, tmp_path):
        if shutil.which("unshare") is None:
            pytest.skip("unshare is not installed")
        small, large = tmp_path / "small", tmp_path / "large"
        small.mkdir()
        large.mkdir()
        script = tmp_path / "script.py"
        script.write_text(self.SCRIPT)
        mount = f"mount -t tmpfs -o size=1m tmpfs {small}"
        run = f"{sys.executable} {script} {small} {large}"
        result = subprocess.run(
            ["unshare", "-m", "sh", "-c", f"{mount} && exec {run}"],
            capture_output=True,
            text=True,
            timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        if "unshare" in result.stderr or "mount" in result.stderr:
            pytest.skip(result.stderr.strip())
        assert result.returncode == 0, result.stderr
        assert "small" in result.stdout
