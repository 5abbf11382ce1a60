import asyncio
import json

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from stream.clock import SAMPLE_RATE
from stream.daemon import _TIMED
from stream.metrics import Histogram
from stream.web.health import LAG_BOUNDS_S
from tests.stream.conftest import speechlike
from tests.stream.house import pcm, serving, talk, until


def test_quantiles_are_true_to_a_percent():
    values = np.random.default_rng(0).lognormal(5, 1, 10_000)
    histogram = Histogram()
    for value in values:
        histogram.observe(value)
    for q in (0.01, 0.5, 0.99):
        assert histogram.quantile(q) == pytest.approx(np.quantile(values, q), rel=0.02)
    assert histogram.count == 10_000
    assert histogram.total == pytest.approx(values.sum())


def test_nothing_and_zero_have_quantiles_too():
    histogram = Histogram()
    assert histogram.quantile(0.5) == 0
    histogram.observe(0.0)
    assert histogram.quantile(0.99) == 0


def test_values_are_counted_up_to_bounds():
    values = np.random.default_rng(1).lognormal(5, 2, 10_000)
    histogram = Histogram()
    assert histogram.cumulative([1.0, 2.0]) == [0, 0]
    for value in (0.0, *values):
        histogram.observe(value)
    bounds = [0.001, 0.01, 1.0, 50.0, 150.0, 151.0, 1e4, 1e9]
    counts = histogram.cumulative(bounds)
    assert counts == sorted(counts)
    assert counts[0] == 1
    assert counts[-1] == histogram.count == 10_001
    for bound, count in zip(bounds[1:], counts[1:], strict=True):
        assert 1 + (values <= bound / 1.02).sum() <= count <= 1 + (values <= bound).sum()


class TestFigures:
    """What a scrape says after a run whose every figure is known by other ways."""

    @staticmethod
    async def scrape(http):
        families = text_string_to_metric_families((await http.get("/metrics")).text)
        return {
            (sample.name, *sample.labels.values()): sample.value
            for family in families
            for sample in family.samples
        }

    async def test_they_are_those_of_the_run(self, checkpoint):
        speech = speechlike(6 * SAMPLE_RATE, seed=5)
        # Nobody listens there, and it is not tried again before the end.
        stuck = {"kind": "webhook", "url": "http://127.0.0.1:9/", "batch": 1, "partials": True}
        fanout = {"queue": 1, "retry_first_s": 600, "retry_longest_s": 600, "drain_s": 0}
        async with (
            serving(
                checkpoint, session={"heartbeat_s": 0}, sinks={"stuck": stuck}, fanout=fanout
            ) as house,
            house.http() as http,
        ):
            async with house.connect("/v1/audio") as socket:
                token = json.loads(await socket.recv())["resume_token"]
                await socket.send(pcm(speech[:16_000]))
                await until(lambda: house.events[-1].end > 0)
                socket.transport.abort()
            path = f"/v1/audio?resume={token}&have=20000&after=-1"
            async with house.connect("/v1/events") as reader, house.connect(path) as socket:
                assert json.loads(await socket.recv())["received"] == 20_000
                await reader.recv()
                during = await self.scrape(http)
                await socket.send(pcm(speech[20_000:]))
                await socket.send('{"type": "close"}')
                async for _ in socket:
                    pass
            one = await self.scrape(http)
            await asyncio.gather(talk(house, speech), talk(house, speech))
            figures = await self.scrape(http)
            status = (await http.get("/v1/status")).json()
            events = list(house.events)

        assert during[("livesat_streams",)] == during[("livesat_calls",)] == 1
        assert during[("livesat_readers",)] == 2  # the caller reads its own events
        assert figures[("livesat_streams",)] == figures[("livesat_calls",)] == 0
        assert figures[("livesat_slots",)] == 4

        # Lag: every event that tells it, its sum, and how many were no later than each bound.
        lags = np.array([event.lag_ms for event in events if event.type in _TIMED]) / 1e3
        assert figures[("livesat_lag_seconds_count",)] == len(lags) > 20
        assert figures[("livesat_lag_seconds_bucket", "+Inf")] == len(lags)
        assert figures[("livesat_lag_seconds_sum",)] == pytest.approx(lags.sum())
        for bound in LAG_BOUNDS_S:
            count = figures[("livesat_lag_seconds_bucket", str(bound))]
            assert (lags <= bound / 1.02).sum() <= count <= (lags <= bound).sum()

        # The real-time factor is the quotient of these two.
        assert one[("livesat_audio_seconds_total",)] == pytest.approx(6)  # the hole was filled
        assert figures[("livesat_audio_seconds_total",)] == pytest.approx(18)
        assert figures[("livesat_compute_seconds_total",)] == pytest.approx(status["compute_s"])
        assert status["realtime_factor"] == pytest.approx(
            figures[("livesat_compute_seconds_total",)] / figures[("livesat_audio_seconds_total",)]
        )

        # A stream alone makes batches of one chunk; two beside each other share some.
        chunks = 6 * SAMPLE_RATE // 6400 + 1  # after the last, what the look-ahead held back
        assert one[("livesat_batches_total", "1")] == chunks
        batches = {key[1]: n for key, n in figures.items() if key[0] == "livesat_batches_total"}
        assert set(batches) <= {"1", "2"}
        assert sum(int(size) * count for size, count in batches.items()) == 3 * chunks

        assert figures[("livesat_gap_seconds_total",)] == 4000 / SAMPLE_RATE
        assert figures[("livesat_engine_waiting_chunks",)] == 0
        finals = sum(event.is_final for event in events)
        assert figures[("livesat_sink_queued", "stuck")] == finals
        assert figures[("livesat_sink_dropped_partials_total", "stuck")] == len(events) - finals > 0
        assert figures[("livesat_sink_sent_total", "stuck")] == 0
        assert figures[("livesat_sink_lost_finals_total", "stuck")] == 0
