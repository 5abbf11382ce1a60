"""Reliability bar, row 18: a connection that is not what it should be is refused, by both ends."""

import json
import shutil
import ssl
import subprocess

import pytest
import websockets

from stream.sources.source import SourceError
from tests.stream.house import serving
from tests.stream.test_daemon import config

TOKEN = "a-token-that-is-long-enough"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")


def openssl(*arguments, cwd):
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """Two authorities; of the first a good certificate, an expired one and one of another host."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            cwd=folder,
        )
    for name, host, days in (
        ("good", "localhost", "2"),
        ("expired", "localhost", "-1"),
        ("elsewhere", "elsewhere.example", "2"),
    ):
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={host}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
            cwd=folder,
        )
        (folder / f"{name}.ext").write_text(f"subjectAltName=DNS:{host}\n")
        span = ["-days", days]
        if days == "-1":
            span = ["-not_before", "20200101000000Z", "-not_after", "20200102000000Z"]
        command = [
            *("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key"),
            *("-CAcreateserial", "-extfile", f"{name}.ext", "-out", f"{name}.pem"),
        ]
        try:
            openssl(*command, *span, cwd=folder)
        except subprocess.CalledProcessError:
            if days != "-1":
                raise
            openssl(*command, "-days", "-1", cwd=folder)  # openssl 3.0 has no -not_after
    return folder


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
