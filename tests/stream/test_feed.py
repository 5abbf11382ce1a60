import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stream.feed import Feed, Wanted
from tests.sinks.samples import Talk


async def read(reader):
    return [line async for line in reader]


class TestFeed:
    async def test_a_reader_gets_what_it_wants_in_order(self):
        feed, talk = Feed(), Talk()
        everything, finals = feed.subscribe(Wanted()), feed.subscribe(Wanted(partials=False))
        turns = feed.subscribe(Wanted(types=frozenset({"turn.ended"}), stream="talk"))
        other = feed.subscribe(Wanted(session="another"))
        sent = talk.every_type()
        for event in sent:
            feed.publish(event)
        feed.close()
        assert [line.seq for line in await read(everything)] == [event.seq for event in sent]
        assert all(line.final for line in await read(finals))
        assert [line.type for line in await read(turns)] == ["turn.ended"]
        assert await read(other) == []

    async def test_one_that_never_reads_is_evicted_and_the_others_miss_nothing(self):
        """Reliability bar, row 9."""
        feed, talk = Feed(queue=20_000), Talk()
        stuck, good = feed.subscribe(Wanted()), feed.subscribe(Wanted())
        got = asyncio.create_task(read(good))
        for _ in range(200):
            feed.publish(talk.warning("x" * 100))
            await asyncio.sleep(0)
        assert stuck.evicted
        assert stuck.waiting == 0
        assert feed.evicted == 1
        assert len(feed) == 1
        feed.close()
        assert [line.seq for line in await got] == list(range(200))
        # It comes back and resumes where it was.
        again = feed.subscribe(Wanted(session="s1"), after=-1)
        assert again.complete
        assert [line.seq for line in await read(again)] == list(range(200))

    async def test_events_of_an_earlier_process_are_for_who_missed_them(self):
        feed, talk = Feed(), Talk()
        early = feed.subscribe(Wanted())
        for _ in range(3):
            feed.keep(talk.warning())
        feed.publish(talk.warning().model_copy(update={"seq": 1000}))
        late = feed.subscribe(Wanted(session="s1"), after=2)
        later = feed.subscribe(Wanted(session="s1"), after=0)
        feed.close()
        assert [line.seq for line in await read(early)] == [1000]
        assert [line.seq for line in await read(late)] == [1000]
        assert [line.seq for line in await read(later)] == [1, 2, 1000]
        assert late.complete
        assert later.complete

    async def test_who_is_evicted_amid_the_past_reads_no_more_of_it(self):
        feed, talk = Feed(queue=20_000), Talk()
        for _ in range(100):
            feed.publish(talk.warning())
        reader = feed.subscribe(Wanted(), cursor="0")
        assert reader.begin == f"{feed.epoch}.0"
        feed.publish(talk.warning("x" * 30_000))
        assert reader.evicted
        assert await read(reader) == []

    async def test_partials_go_before_the_reader_does(self):
        feed, talk = Feed(queue=20_000), Talk()
        slow = feed.subscribe(Wanted())
        for _ in range(500):
            feed.publish(talk.heard("…"))
        feed.publish(talk.warning())
        assert not slow.evicted
        assert slow.dropped > 300
        assert feed.dropped == slow.dropped
        feed.leave(slow)
        feed.leave(slow)
        assert feed.dropped == slow.dropped  # also when it has gone
        feed.close()
        assert [line.type for line in await read(slow)][-1] == "warning"

    async def test_what_is_no_longer_kept_is_said(self):
        feed, talk = Feed(history=5_000), Talk()
        for _ in range(100):
            feed.publish(talk.warning())
        assert not feed.subscribe(Wanted(session="s1"), after=3).complete
        assert not feed.subscribe(Wanted(), cursor=f"{feed.epoch}.3").complete
        assert feed.subscribe(Wanted(), cursor=feed.cursor()).complete
        assert not feed.subscribe(Wanted(), cursor="deadbeef.50").complete  # of another process

    async def test_finals_are_kept_for_longer_than_partials(self):
        feed, talk = Feed(history=20_000, partials=2_000), Talk()
        feed.publish(talk.opened())
        sent = [talk.warning() if n % 10 == 0 else talk.heard("…") for n in range(400)]
        for event in sent:
            feed.publish(event)
        missed = feed.subscribe(Wanted(session="s1"), after=0)
        feed.close()
        assert missed.complete
        lines = await read(missed)
        finals = [event.seq for event in sent if event.is_final]
        assert [line.seq for line in lines if line.final] == finals
        assert [line.seq for line in lines] == sorted(line.seq for line in lines)
        partials = [line for line in lines if not line.final]
        assert 0 < sum(len(line.data) for line in partials) <= 2_000
        assert partials[-1].seq == sent[-1].seq
        assert feed.kept == sum(len(line.data) for line in feed.lines("s1"))

    async def test_memory_is_bounded(self):
        feed, talk = Feed(history=10_000, partials=3_000), Talk()
        for _ in range(500):
            feed.publish(talk.warning())
            feed.publish(talk.heard("…"))
        assert 10_000 < feed.kept <= 13_000

    @given(st.integers(0, 40), st.integers(0, 40))
    def test_a_cursor_resumes_exactly(self, first, second):
        async def scene():
            feed, talk = Feed(), Talk()
            for _ in range(first):
                feed.publish(talk.warning())
            cursor = feed.cursor()
            for _ in range(second):
                feed.publish(talk.warning())
            reader = feed.subscribe(Wanted(), cursor=cursor)
            feed.close()
            assert [line.seq for line in await read(reader)] == list(range(first, first + second))

        asyncio.run(scene())

    async def test_sessions_are_listed_with_who_was_heard(self):
        feed, talk = Feed(), Talk()
        for event in (
            talk.opened(),
            talk.turn("T1", "S1", 0.0, 2.0),
            talk.turn("T2", "S2", 2.0, 3.0),
            talk.identified("S1", "Anna"),
            talk.revised(["T2"], "S2", "S1"),
            talk.closed(9.0),
        ):
            feed.publish(event)
        (entry,) = feed.sessions
        assert (entry.state, entry.audio_s) == ("closed", 9.0)
        assert (entry.speakers, entry.names) == (["S1"], {"S1": "Anna"})

    @pytest.mark.parametrize("count", [1, 500])
    async def test_the_list_of_sessions_is_bounded(self, count):
        feed = Feed()
        for number in range(count):
            talk = Talk(f"s{number}")
            feed.publish(talk.opened())
            feed.publish(talk.closed())
        assert len(feed.sessions) == min(count, 200)
