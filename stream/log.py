"""What the process says about itself: lines on standard error, in one form, without secrets."""

import logging
import os
import re
import sys
import threading
from collections.abc import MutableMapping
from typing import Any, Final, Literal, cast

import structlog
from pydantic import BaseModel, ConfigDict, Field

_TALKATIVE: Final = ("httpx", "httpcore", "websockets", "aiokafka", "nats", "multipart")
"""Libraries that log whole URLs or headers, which may hold secrets, below warnings."""

_USERINFO: Final = re.compile(r"//[^/@\s'\"]*@")
_QUERY: Final = re.compile(r"([?&](?:\w*token|\w*secret|\w*key|password)=)[^&\s'\"]+")


class LogSettings(BaseModel):
    """What the process says about itself, on standard error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = Field(
        default="auto",
        description="Lines to read, or one JSON object a line; auto: JSON for systemd's journal.",
    )

    def configure(self) -> None:
        """Point structlog, and the standard library's loggers, at standard error.

        With JSON that is also where warnings go, and what is raised where nobody catches it.
        """
        global _configured
        _configured = self
        to_json = self.format == "json" or (
            self.format == "auto" and "JOURNAL_STREAM" in os.environ
        )
        renderer: Any = (
            structlog.processors.JSONRenderer()
            if to_json
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        )
        begin: list[Any] = [
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
        ]
        end: list[Any] = [structlog.processors.format_exc_info, hush, renderer]
        level: int = getattr(logging, self.level.upper())
        structlog.configure(
            processors=[*begin, *end],
            wrapper_class=structlog.make_filtering_bound_logger(level),
            logger_factory=_to_stderr,
            cache_logger_on_first_use=False,
        )
        handler = _Handler()
        handler.setFormatter(
            structlog.stdlib.ProcessorFormatter(
                foreign_pre_chain=[*begin, structlog.stdlib.add_logger_name],
                processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *end],
            )
        )
        root = logging.getLogger()
        for other in [each for each in root.handlers if isinstance(each, _Handler)]:
            root.removeHandler(other)
        root.addHandler(handler)
        root.setLevel(level)
        for name in _TALKATIVE:
            logging.getLogger(name).setLevel(max(level, logging.WARNING))
        if to_json:
            logging.captureWarnings(True)
            threading.excepthook = _uncaught_in_a_thread
            sys.unraisablehook = _unraisable


_configured: LogSettings | None = None


def configured() -> LogSettings | None:
    """The settings this process follows, for one it starts to follow them too."""
    return _configured


def complain(line: str) -> None:
    """Say why the process ends: a line of the log where that is JSON, else one for a person."""
    if isinstance(structlog.get_config()["processors"][-1], structlog.processors.JSONRenderer):
        structlog.get_logger("livesat").critical(line)
    else:
        print(f"livesat: error: {without_credentials(line)}", file=sys.stderr)  # noqa: T201


def without_credentials(text: str) -> str:
    """The text with no user and password, and no token, in any URL."""
    return _QUERY.sub(r"\1…", _USERINFO.sub("//…@", text))


def hush(logger: Any, method: str, said: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What is said, with no credentials in it; a processor of structlog's."""
    del logger, method
    for key, value in said.items():
        if isinstance(value, str):
            said[key] = without_credentials(value)
    return said


class _Handler(logging.Handler):
    """Writes to whatever standard error is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            _to_stderr().msg(self.format(record))
        except Exception:  # noqa: BLE001 - as every handler does it
            self.handleError(record)


def _to_stderr(*_: Any) -> structlog.PrintLogger:
    return structlog.PrintLogger(sys.stderr)


def _uncaught_in_a_thread(what: threading.ExceptHookArgs) -> None:
    if what.exc_type is SystemExit:
        return
    name = what.thread.name if what.thread is not None else None
    error = cast("BaseException", what.exc_value)
    structlog.get_logger("threading").error("uncaught exception", thread=name, exc_info=error)


def _unraisable(what: "sys.UnraisableHookArgs") -> None:
    said = what.err_msg or "exception ignored"
    structlog.get_logger("python").error(said, object=repr(what.object), exc_info=what.exc_value)
