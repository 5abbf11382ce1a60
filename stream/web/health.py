"""``/livez``, ``/readyz`` and ``/metrics``: what a supervisor and a monitoring system ask."""

from collections.abc import Iterable
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from stream.calls import Calls
from stream.server import Desk

STUCK_S: Final = 2.0
"""A batch that takes longer than this is not computed any more (reliability bar, row 17)."""

LAG_BOUNDS_S: Final = (
    *(0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5, 3.0, 4.0, 5.0),
    *(7.5, 10.0, 15.0, 30.0, 60.0),
)
"""Of the buckets of the lag: closest where a chunk and its look-ahead put it."""


class Probes:
    """The endpoints."""

    def __init__(self, desk: Desk, calls: Calls) -> None:
        self._desk = desk
        self._registry = CollectorRegistry()
        self._registry.register(Figures(desk, calls))

    async def live(self, request: Request) -> Response:
        """The event loop answers: the process lives. No broker and no model is asked."""
        del request
        return PlainTextResponse("ok\n")

    async def ready(self, request: Request) -> Response:
        """Whether a stream brought now would be computed."""
        del request
        status = self._desk.status()
        if status.stopping:
            return PlainTextResponse("stopping\n", 503)
        if status.busy_s > STUCK_S:
            return PlainTextResponse(f"the engine is stuck for {status.busy_s:.1f} s\n", 503)
        return PlainTextResponse("ready\n")

    async def metrics(self, request: Request) -> Response:
        """Prometheus' text format."""
        del request
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


class Figures(Collector):
    """What the house counts, as Prometheus reads it.

    Lag is a histogram, and the real-time factor two counters, compute and audio, so that a query
    chooses the stretch of time: over weeks an average since the start hides what is late today.
    """

    def __init__(self, desk: Desk, calls: Calls) -> None:
        self._desk, self._calls = desk, calls

    def collect(self) -> Iterable[Metric]:
        """One scrape."""
        s = self._desk.status()
        gauges = {
            "streams": ("Open sessions.", s.streams),
            "slots": ("Sessions there could be.", s.slots),
            "calls": ("Sessions that callers of the server brought.", len(self._calls)),
            "engine_busy_seconds": ("Age of the batch in the engine.", s.busy_s),
            "engine_waiting_chunks": ("Chunks that wait for the engine.", s.engine_waiting),
            "readers": ("Subscribers of the live feed.", s.readers),
            "history_bytes": ("Lines kept for who comes late.", s.history_bytes),
            "loop_lag_p99_seconds": ("Lateness of the event loop.", s.loop_p99_ms / 1e3),
            "tasks": ("Tasks of the event loop.", s.tasks),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"livesat_{name}", text, value=value)
        counters = {
            "audio_seconds": ("Audio computed.", s.audio_s),
            "compute_seconds": ("Time of the inference.", s.compute_s),
            "gap_seconds": ("Audio lost in gaps.", s.lost_s),
            "readers_dropped_partials": (
                "Partials that subscribers were too slow for.",
                self._desk.feed.dropped,
            ),
            "readers_evicted": ("Subscribers that read too slowly.", s.evicted),
            "unhandled_exceptions": ("Exceptions that nobody retrieved.", s.faults),
        }
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"livesat_{name}", text, value=value)
        yield self._lag()
        events = CounterMetricFamily("livesat_events", "Events emitted.", labels=["type"])
        for kind, count in s.events.items():
            events.add_metric([kind], count)
        yield events
        batches = CounterMetricFamily("livesat_batches", "Batches computed.", labels=["size"])
        for size, count in sorted(s.batches.items()):
            batches.add_metric([str(size)], count)
        yield batches
        queued = GaugeMetricFamily("livesat_sink_queued", "Events that wait.", labels=["sink"])
        up = GaugeMetricFamily("livesat_sink_up", "1 while it is connected.", labels=["sink"])
        sent = CounterMetricFamily("livesat_sink_sent", "Events delivered.", labels=["sink"])
        dropped = CounterMetricFamily(
            "livesat_sink_dropped_partials", "Partials it was too slow for.", labels=["sink"]
        )
        lost = CounterMetricFamily(
            "livesat_sink_lost_finals", "Finals that never arrived.", labels=["sink"]
        )
        retries = CounterMetricFamily("livesat_sink_retries", "Failed attempts.", labels=["sink"])
        for name, each in s.sinks.items():
            queued.add_metric([name], each.queued)
            up.add_metric([name], float(each.connected))
            sent.add_metric([name], each.sent)
            dropped.add_metric([name], each.dropped_partials)
            lost.add_metric([name], each.lost_finals + each.rejected)
            retries.add_metric([name], each.retries)
        yield from (queued, up, sent, dropped, lost, retries)

    def _lag(self) -> Metric:
        lag = self._desk.lag
        counts = lag.cumulative([bound * 1e3 for bound in LAG_BOUNDS_S])
        buckets = [(str(bound), float(n)) for bound, n in zip(LAG_BOUNDS_S, counts, strict=True)]
        return HistogramMetricFamily(
            "livesat_lag_seconds",
            "Capture to emission.",
            buckets=[*buckets, ("+Inf", float(lag.count))],
            sum_value=lag.total / 1e3,
        )
