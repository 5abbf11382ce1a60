import json
import subprocess
import sys
from pathlib import Path

import pytest

from stream.log import without_credentials

# A process of its own: what is changed here is changed for the whole of it.
SCRIPT = """
import asyncio, gc, logging, sys, threading, warnings
import structlog
from stream.log import LogSettings, complain

LogSettings(format=sys.argv[1]).configure()
LogSettings(format=sys.argv[1]).configure()  # a reload: no line is said twice
log = structlog.get_logger("ours")
log.info("ours", url="rtsp://ada:hush@camera/stream")
log.debug("too quiet")
logging.getLogger("uvicorn.error").warning("GET %s", "/v1/events?access_token=hush&stream=a")
logging.getLogger("httpx").info("hush")
warnings.warn("old-fashioned")

async def main():
    asyncio.create_task(fail(), name="lost")
    await asyncio.sleep(0)
    await asyncio.sleep(0)

async def fail():
    raise ValueError("http://ada:hush@host/ cannot be reached")

asyncio.run(main())
gc.collect()
thread = threading.Thread(target=lambda: 1 / 0, name="worker")
thread.start()
thread.join()

class Rude:
    def __del__(self):
        raise OSError("not now")

Rude()
complain("two lines\\nof it")
"""


def said(form: str) -> list[str]:
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, form], capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == ""
    assert "hush" not in ran.stderr
    return ran.stderr.splitlines()


def test_every_line_of_a_service_is_one_json_object_without_secrets() -> None:
    lines = [json.loads(line) for line in said("json")]
    assert [(line["level"], line.get("logger"), line["event"].split(":")[0]) for line in lines] == [
        ("info", None, "ours"),
        ("warning", "uvicorn.error", "GET /v1/events?access_token=…&stream=a"),
        ("warning", "py.warnings", "<string>"),
        ("error", "asyncio", "Task exception was never retrieved\nfuture"),
        ("error", None, "uncaught exception"),
        ("error", None, "exception ignored"),
        ("critical", None, "two lines\nof it"),
    ]
    assert all(line["timestamp"].endswith("Z") for line in lines)
    assert lines[0]["url"] == "rtsp://…@camera/stream"
    assert "old-fashioned" in lines[2]["event"]
    assert "ValueError: http://…@host/ cannot be reached" in lines[3]["exception"]
    assert (lines[4]["thread"], "ZeroDivisionError" in lines[4]["exception"]) == ("worker", True)
    assert "OSError: not now" in lines[5]["exception"]


def test_so_is_why_a_service_ends(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "sources: {a: {kind: file, path: missing.wav}}\nlog: {format: json}\n", encoding="utf-8"
    )
    command = [sys.executable, "-m", "stream", "run", "--config", str(config)]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ran.returncode == 1
    (line,) = map(json.loads, ran.stderr.splitlines())
    assert (line["level"], line["event"]) == ("critical", "missing.wav: no such file")


def test_for_a_person_they_are_lines_of_one_kind() -> None:
    lines = said("console")
    assert "[info     ] ours" in lines[0]
    assert "[warning  ] GET /v1/events?access_token=…&stream=a" in lines[1]
    assert lines[-2:] == ["livesat: error: two lines", "of it"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("mqtt://u:p@h:1/ and http://h/", "mqtt://…@h:1/ and http://h/"),
        ("https://h/a?api_key=1&b=2&secret=3", "https://h/a?api_key=…&b=2&secret=…"),
        ("'http://h/?token=a'", "'http://h/?token=…'"),
        ("a token = 3", "a token = 3"),
    ],
)
def test_credentials_in_a_url_are_not_shown(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
