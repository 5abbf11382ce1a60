"""Who is who: naming a live speaker, and the enrolled people."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from stream.server import Desk
from stream.voiceprints import VoiceprintError
from stream.web.body import Unread, read_json

_LONGEST = 200


class People:
    """The endpoints."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk

    async def name(self, request: Request) -> Response:
        """``{"name": "Anna", "enrol": false}`` for a label of an open session."""
        try:
            body = await read_json(request)
            name, enrol = str(body["name"]).strip(), bool(body.get("enrol", False))
        except Unread as unread:
            return unread.response()
        except (ValueError, KeyError, TypeError, AttributeError):
            return JSONResponse({"error": 'expected {"name": …, "enrol": false}'}, 400)
        if not 0 < len(name) <= _LONGEST or not name.isprintable():
            return JSONResponse({"error": f"name: expected 1 to {_LONGEST} characters"}, 400)
        session, label = request.path_params["session"], request.path_params["label"]
        try:
            await self._desk.name_speaker(session, label, name, enrol)
        except LookupError as error:
            return JSONResponse({"error": str(error.args[0])}, 404)
        except VoiceprintError as error:
            return JSONResponse({"error": str(error)}, 409)
        return JSONResponse({"session": session, "label": label, "name": name, "enrolled": enrol})

    async def voices(self, request: Request) -> Response:
        """Names of the enrolled people."""
        del request
        return JSONResponse({"voices": await self._desk.voices()})
