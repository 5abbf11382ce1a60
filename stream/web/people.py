"""Who is who: naming a live speaker, and the enrolled people."""

from dataclasses import dataclass
from typing import Any, Final, cast

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stream.server import Desk
from stream.voiceprints import VoiceprintError, expiry
from stream.web.body import Unread, read_json

_LONGEST: Final = 200
_LONGEST_NOTE: Final = 1000
_MOST_DAYS: Final = 36_500  # as of `livesat enroll --days`


@dataclass(frozen=True, slots=True)
class _Naming:
    """What a listener says of a speaker; see `Desk.name_speaker`."""

    name: str
    enrol: bool
    consent: str | None
    days: int | None


class People:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def name(self, request: Request) -> Response:
        """``{"name": "Anna", "enrol": false}`` for a label of an open session.

        With ``"enrol": true`` also ``"consent": "what she agreed to"`` and ``"days": 30``.
        """
        try:
            asked = _naming(await read_json(request))
        except Unread as unread:
            return unread.response()
        except ValueError as error:
            return JSONResponse({"error": str(error)}, 400)
        expires = expiry(asked.days)
        session, label = request.path_params["session"], request.path_params["label"]
        try:
            await self._desk.name_speaker(
                session, label, asked.name, asked.enrol, asked.consent, expires
            )
        except LookupError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        except VoiceprintError as error:
            return JSONResponse({"error": str(error)}, 409)
        told = {"session": session, "label": label, "name": asked.name, "enrolled": asked.enrol}
        return JSONResponse(told)

    async def voices(self, request: Request) -> Response:
        """Names of the enrolled people."""
        del request
        try:
            return JSONResponse({"voices": await self._desk.voices()})
        except VoiceprintError as error:
            return JSONResponse({"error": str(error)}, 503)


def _naming(body: Any) -> _Naming:
    """A request's body, checked; null is as if it were not there.

    Raises:
        ValueError: the key, and what was expected.
    """
    if not isinstance(body, dict) or "name" not in body:
        raise ValueError('expected {"name": …, "enrol": false}')
    given = cast("dict[str, Any]", body)
    name, enrol, consent, days = (given.get(k) for k in ("name", "enrol", "consent", "days"))
    if not isinstance(name, str) or not _fits(name := name.strip(), _LONGEST):
        raise ValueError(f"name: expected 1 to {_LONGEST} characters")
    if enrol is not None and not isinstance(enrol, bool):
        raise ValueError("enrol: expected true or false")
    if consent is not None and (
        not isinstance(consent, str) or not _fits(consent := consent.strip(), _LONGEST_NOTE)
    ):
        raise ValueError(f"consent: expected 1 to {_LONGEST_NOTE} characters, or null")
    if days is not None and (type(days) is not int or not 1 <= days <= _MOST_DAYS):
        raise ValueError(f"days: expected a whole number from 1 to {_MOST_DAYS}, or null")
    if not enrol and (consent is not None or days is not None):
        raise ValueError('consent and days are kept with a voice: expected "enrol": true with them')
    return _Naming(name, bool(enrol), consent, days)


def _fits(text: str, longest: int) -> bool:
    return 0 < len(text) <= longest and text.isprintable()
