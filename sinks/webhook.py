"""Webhook: batches of events as HTTP POST, signed, again and again until they are taken.

The body is a JSON array of events (``application/json``; with the envelope ``cloudevents`` it is
``application/cloudevents-batch+json``). Headers:

``X-Livesat-Signature``
    ``t=<seconds since 1970>,v1=<hex>``: HMAC-SHA256, under the shared secret, of the time, a full
    stop and the body. The time lets a receiver refuse what is replayed later.
``Idempotency-Key``
    ``<id of the first event>/<how many>``: the same for the same batch sent again.

A 2xx takes the batch. 5xx, and what says nothing of the events (401, 403, 404, 407, 408, 425, 429),
mean *not now*; any other status refuses it: its events are then sent one by one, so that one of
them does not cost the others.
"""

import asyncio
import hashlib
import hmac
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal, Self

from pydantic import Field, HttpUrl, SecretStr, model_validator

from sinks.envelope import EnvelopeSettings
from sinks.events import Event
from sinks.sink import Disconnected, Rejected, SinkError
from sinks.tls import TlsSettings

if TYPE_CHECKING:
    import httpx

AGAIN: Final = frozenset({401, 403, 404, 407, 408, 425, 429})
"""Statuses below 500 that a later attempt, or a credential put right, may change."""

SIGNATURE: Final = "X-Livesat-Signature"


class WebhookSettings(EnvelopeSettings, frozen=True):
    """A URL that takes events."""

    kind: Literal["webhook"] = "webhook"
    url: HttpUrl = Field(description="http:// or https://.")
    secret: SecretStr | None = Field(default=None, description="Signs every batch.")
    bearer: SecretStr | None = Field(default=None, description="Sent as Authorization: Bearer.")
    tls: TlsSettings | None = Field(
        default=None, description="For https://; without it well-known CAs are trusted."
    )
    batch: int = Field(default=100, ge=1, le=10_000, description="Events in one request at most.")
    timeout_s: float = Field(default=10.0, gt=0, description="How long the receiver may take.")
    partials: bool = Field(
        default=False, description="Also events that later ones may replace (is_final false)."
    )

    @model_validator(mode="after")
    def _no_secret_in_the_url(self) -> Self:
        if self.url.password:
            raise ValueError("expected url without a password (it would be logged); see bearer")
        return self

    @asynccontextmanager
    async def open(self) -> AsyncGenerator["WebhookSink"]:
        """Nothing is sent yet: a receiver that is not there is seen at the first batch.

        Raises:
            SinkError: the driver is not installed, or a file of TLS is not what it should be.
        """
        try:
            import httpx
        except ModuleNotFoundError as error:
            raise SinkError(
                f"the webhook sink needs {error.name}: pip install 'livesat[webhook]'"
            ) from None

        def make() -> httpx.AsyncClient:
            verify = True if self.tls is None else self.tls.context()
            return httpx.AsyncClient(timeout=self.timeout_s, follow_redirects=False, verify=verify)

        # In a thread: it loads the certificates we trust, which takes tens of milliseconds.
        async with await asyncio.to_thread(make) as client:
            yield WebhookSink(self, client)


class WebhookSink:
    """An open connection, if the receiver keeps it."""

    def __init__(
        self,
        settings: WebhookSettings,
        client: "httpx.AsyncClient",
        now: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._client, self._now = settings, client, now

    @property
    def limit(self) -> int:
        """Events of one request."""
        return self._settings.batch

    async def send(self, event: Event) -> None:
        """Deliver one event."""
        await self.send_many([event])

    async def send_many(self, events: Sequence[Event]) -> None:
        """Deliver a batch.

        Raises:
            Disconnected: the receiver cannot be reached, or did not answer in time.
            SinkError: it says that it cannot now.
            Rejected: it refuses the batch.
        """
        import httpx

        body = b"[" + b",".join(self._settings.encode(event) for event in events) + b"]"
        try:
            # The client's own time-out is one of each read: an answer may drip for ever.
            async with asyncio.timeout(self._settings.timeout_s):
                answer = await self._client.post(
                    str(self._settings.url), content=body, headers=self._headers(events, body)
                )
        except (httpx.HTTPError, TimeoutError) as error:
            what = str(error) or type(error).__name__
            raise Disconnected(f"{self._settings.url.host}: {what}") from None
        if answer.is_success:
            return
        said = f"{self._settings.url.host} answers {answer.status_code} {answer.reason_phrase}"
        if answer.status_code >= 500 or answer.status_code in AGAIN:
            raise SinkError(said)
        raise Rejected(said)

    def _headers(self, events: Sequence[Event], body: bytes) -> dict[str, str]:
        settings = self._settings
        plain = settings.envelope == "plain"
        media = "application/json" if plain else "application/cloudevents-batch+json"
        headers = {
            "Content-Type": media,
            "User-Agent": "livesat",
            "Idempotency-Key": f"{events[0].id}/{len(events)}",
        }
        if settings.bearer is not None:
            headers["Authorization"] = f"Bearer {settings.bearer.get_secret_value()}"
        if settings.secret is not None:
            secret = settings.secret.get_secret_value().encode()
            headers[SIGNATURE] = signature(secret, int(self._now()), body)
        return headers


def signature(secret: bytes, at: int, body: bytes) -> str:
    """What a receiver should find in the signature header, at this time for this body."""
    digest = hmac.new(secret, b"%d." % at + body, hashlib.sha256).hexdigest()
    return f"t={at},v1={digest}"
