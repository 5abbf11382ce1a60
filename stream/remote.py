"""A running daemon, as another process of the same machine, or another machine, talks to it."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from typing import Any, Final

TIMEOUT_S: Final = 10.0


class RemoteError(Exception):
    """The daemon cannot be reached, or refuses; what it said."""


class Daemon:
    """The server of a daemon.

    Args:
        url: ``http://host:port``.
        token: What it asks for, if it does.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        if not url.startswith(("http://", "https://")):
            raise RemoteError(f"--url: expected http://… or https://…, got {url!r}")
        self._url, self._token = url.rstrip("/"), token

    def only_session(self) -> str:
        """The id of the one session that is open.

        Raises:
            RemoteError: there is none, or more than one.
        """
        sessions = self._ask("GET", "/v1/sessions")["sessions"]
        found = [f"{s['session']} ({s['stream']})" for s in sessions if s["state"] == "open"]
        if len(found) != 1:
            raise RemoteError(
                f"expected one open session, there is {', '.join(found) or 'none'}; "
                "--session chooses"
            )
        return found[0].partition(" ")[0]

    def name(
        self,
        session: str,
        label: str,
        name: str,
        *,
        enrol: bool = False,
        consent: str | None = None,
        days: int | None = None,
    ) -> None:
        """Say who a speaker is.

        Args:
            session: Its id.
            label: As "S2".
            name: The person's.
            enrol: Keep the voice.
            consent: What the person agreed to; None is the daemon's own note.
            days: Erase the voice after so many; None is never.

        Raises:
            RemoteError: the daemon refuses; with its reason.
        """
        where = f"/v1/sessions/{_quoted(session)}/speakers/{_quoted(label)}"
        told = {"consent": consent, "days": days}
        more = {key: value for key, value in told.items() if value is not None}
        self._ask("PUT", where, {"name": name, "enrol": enrol, **more})

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        request = urllib.request.Request(
            self._url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        if self._token:
            request.add_header("Authorization", f"Bearer {self._token}")
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                raise RemoteError(_reason(error)) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise RemoteError(f"{self._url}: no daemon answers ({reason})") from error


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        said = json.load(error)
        return str(said.get("error") or said.get("err_msg") or error)
    except (ValueError, AttributeError):
        return str(error)


def _quoted(part: str) -> str:
    return urllib.parse.quote(part, safe="")
