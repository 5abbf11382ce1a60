"""Certificates that are good, and such as must be refused (reliability bar, row 18)."""

import shutil
import subprocess

import pytest

without_openssl = pytest.mark.skipif(
    shutil.which("openssl") is None, reason="openssl is not installed"
)

REFUSED = [
    ("good", "other", "certificate verify failed"),
    ("expired", "ca", "certificate has expired"),
    ("elsewhere", "ca", "IP address mismatch"),
]
"""What a server at 127.0.0.1 shows, whom its client trusts, and what is wrong with that."""


def openssl(*arguments, cwd):
    subprocess.run(["openssl", *arguments], cwd=cwd, check=True, capture_output=True)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory):
    """Two authorities; of the first a good certificate, an expired one and one of another host."""
    folder = tmp_path_factory.mktemp("tls")
    for name in ("ca", "other"):
        openssl(
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.pem"),
            cwd=folder,
        )
    here = "DNS:localhost,IP:127.0.0.1"
    for name, host, days in (
        ("good", here, "2"),
        ("expired", here, "-1"),
        ("elsewhere", "DNS:elsewhere.example", "2"),
    ):
        openssl(
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
            cwd=folder,
        )
        (folder / f"{name}.ext").write_text(f"subjectAltName={host}\n")
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
