"""Reliability bar, row 18: a connection that is not what it should be is refused, by both ends."""

import json
import ssl

import pytest
import websockets

from stream.sources.source import SourceError
from tests.certificates import certificates, without_openssl
from tests.stream.house import serving
from tests.stream.test_daemon import config

TOKEN = "a-token-that-is-long-enough"

__all__ = ["certificates"]

pytestmark = without_openssl


async def ready(house, authority, host="localhost"):
    context = ssl.create_default_context(cafile=authority)
    headers = {"Authorization": f"Bearer {TOKEN}"}
    url = f"wss://{host}:{house.port}/v1/audio"
    async with websockets.connect(url, ssl=context, additional_headers=headers) as socket:
        return json.loads(await socket.recv())["type"]


@pytest.mark.parametrize(
    ("certificate", "authority", "expected"),
    [
        ("good", "ca", None),
        ("good", "other", "unable to get local issuer certificate|self.signed"),
        ("expired", "ca", "certificate has expired"),
        ("elsewhere", "ca", "Hostname mismatch"),
    ],
)
async def test_a_client_gets_in_by_the_right_certificate_alone(
    checkpoint, certificates, certificate, authority, expected, capfd
):
    server = {
        "token": TOKEN,
        "tls_cert": certificates / f"{certificate}.pem",
        "tls_key": certificates / f"{certificate}.key",
    }
    async with serving(checkpoint, server, probe=certificates / "ca.pem") as house:
        where = certificates / f"{authority}.pem"
        if expected is None:
            assert await ready(house, where) == "ready"
        else:
            with pytest.raises(ssl.SSLCertVerificationError, match=expected):
                await ready(house, where)
    assert TOKEN not in "".join(capfd.readouterr())


async def test_files_that_are_no_certificate_are_said(checkpoint, certificates):
    from stream.daemon import run

    server = {
        "port": 0,
        "tls_cert": certificates / "good.ext",
        "tls_key": certificates / "good.key",
    }
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - looked at below
        await run(config(checkpoint, {}, server=server))
    error = caught.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, SourceError)
    assert "cannot use the TLS files" in str(error)
