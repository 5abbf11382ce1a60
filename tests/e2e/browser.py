"""A daemon and a headless Chromium that hears a file as its microphone.

``python -m tests.e2e.browser`` takes the dashboard's pictures for the documentation.
"""

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import soundfile
import yaml

ROOT = Path(__file__).parents[2]
PICTURES = ROOT / "docs" / "pictures"


def chromium() -> str | None:
    """Debian's browser."""
    return shutil.which("chromium") or shutil.which("chromium-browser")


@contextmanager
def daemon(folder: Path, **server: Any) -> Iterator[str]:
    """`livesat run` with a server → its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    tree = {
        "server": {"port": port, **server},
        "voiceprints": str(folder / "voices.db"),
        "log": {"level": "warning"},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    process = subprocess.Popen([sys.executable, "-m", "stream", "run", "--config", str(config)])
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"{url}/readyz").close()
                break
            except OSError:
                assert process.poll() is None, "the daemon ended"
                assert time.monotonic() < deadline
                time.sleep(0.1)
        yield url
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0


@contextmanager
def browser(folder: Path, start_s: float = 0.0) -> Iterator[Any]:
    """Chromium, whose microphone is the demo conversation from ``start_s`` on."""
    from playwright.sync_api import sync_playwright

    speech = folder / "microphone.wav"
    samples, rate = soundfile.read(ROOT / "stream/demo/meeting.flac", dtype="int16")
    soundfile.write(speech, samples[int(start_s * rate) :], rate)
    with sync_playwright() as playwright:
        chrome = playwright.chromium.launch(
            executable_path=chromium(),
            args=[
                "--no-sandbox",
                "--use-fake-device-for-media-stream",
                "--use-fake-ui-for-media-stream",
                f"--use-file-for-fake-audio-capture={speech}%noloop",
            ],
        )
        try:
            yield chrome
        finally:
            chrome.close()


def take_pictures() -> None:
    """The dashboard in light, dark, and on a phone."""
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with daemon(folder) as url, browser(folder) as chrome:
            page = chrome.new_page(viewport={"width": 1280, "height": 800})
            page.goto(url)
            page.click("#mic")
            page.wait_for_timeout(48_000)
            page.screenshot(path=PICTURES / "dashboard-light.png")
            page.emulate_media(color_scheme="dark")
            page.wait_for_timeout(500)
            page.screenshot(path=PICTURES / "dashboard-dark.png")
            page.set_viewport_size({"width": 390, "height": 844})
            page.wait_for_timeout(500)
            page.screenshot(path=PICTURES / "dashboard-phone.png")
            page.click("#mic")
            page.wait_for_timeout(1000)


if __name__ == "__main__":
    take_pictures()
