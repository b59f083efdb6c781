"""The demo's routes and its login.

Everything is answered from memory: the page's three files and the guests' pictures are read at the start, a
visitor's pictures live in the session. No part of a request is ever a path. Sessions are told apart by an
unguessable cookie that scripts cannot read and other sites cannot send; a request that changes something
must come from the page itself; on loopback only loopback names are answered, so that no foreign name can be
pointed at this machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import AsyncIterator, Sequence
from importlib import resources
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from unichar_jax.app.web.guard import Guard, Throttle
from unichar_jax.app.web.guests import Guest
from unichar_jax.app.web.pictures import Shown, read_upload
from unichar_jax.app.web.sessions import Session, Visitors
from unichar_jax.app.web.settings import Fields, Refused, Settings
from unichar_jax.app.web.work import Service
from unichar_jax.errors import UserError

COOKIE = "unichar"
MAX_JSON = 64 * 1024
BODY_SECONDS = 30.0
STILL_HERE = 15.0
"""Seconds between signs of life on a quiet stream."""

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}


class Web:
    """The endpoints. One object for each server."""

    def __init__(self, settings: Settings, guests: Sequence[Guest]):
        self.settings = settings
        self.visitors, self.service = Visitors(settings), Service(settings, guests)
        self._throttle = Throttle()
        self._uploads = asyncio.Semaphore(4)
        folder = resources.files("unichar_jax.app.web").joinpath("static")
        self._files = {at: (folder.joinpath(name).read_bytes(), mime) for at, (name, mime) in FILES.items()}

    def app(self, warm: bool = False) -> Starlette:
        """The application; with ``warm`` it compiles what is needed while it already answers."""

        @contextlib.asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            if warm:
                threading.Thread(target=self.service.warm_up, daemon=True).start()
            yield
            self.close()

        asked = (self.login, self.logout, self.say, self.draw, self.ask, self.stop, self.forget)
        app = Starlette(
            routes=[
                *(Route(at, self.file) for at in FILES),
                Route("/guests/{guest}/{number:int}", self.training_picture),
                Route("/pictures/{name}", self.picture),
                Route("/api/hello", self.hello),
                Route("/api/events", self.events),
                Route("/api/picture", self.upload, methods=["POST"]),
                *(Route(f"/api/{end.__name__}", end, methods=["POST"]) for end in asked),
            ],
            exception_handlers={
                Refused: lambda _, e: JSONResponse({"message": e.message}, e.status),
                HTTPException: lambda _, e: JSONResponse({"message": e.detail}, e.status_code, e.headers),
                ClientDisconnect: lambda *_: Response(status_code=400),
                Exception: lambda *_: JSONResponse({"message": "Something went wrong here."}, 500),
            },
            lifespan=lifespan,
        )
        app.add_middleware(Guard, settings=self.settings)
        return app

    def close(self) -> None:
        """Lets listeners go and stops the work."""
        self.visitors.close()
        self.service.close()

    # -- who is asking --------------------------------------------------------------------------------------

    def _session(self, request: Request) -> Session:
        session = self.visitors.find(request.cookies.get(COOKIE))
        if session is None:
            raise Refused(401, "Please log in." if self.settings.users else "Please load the page again.")
        return session

    def _with_cookie(self, response: Response, request: Request, session: Session) -> Response:
        response.set_cookie(
            COOKIE,
            session.token,
            max_age=30 * 24 * 3600,
            httponly=True,
            samesite="strict",
            secure=request.url.scheme == "https",
        )
        return response

    async def hello(self, request: Request) -> Response:
        """Who is here and what may be asked; a new visitor gets a session unless a login is wanted."""
        session = self.visitors.find(request.cookies.get(COOKIE))
        if session is None:
            if self.settings.users:
                return JSONResponse({"message": "Please log in.", "login": True}, 401)
            session = self.visitors.enter()
        limits = ("max_text", "max_upload", "max_pictures", "max_steps", "steps", "guidance")
        told = {
            "user": session.user,
            "guests": [_about(guest) for guest in self.service.guests.values()],
            "limits": {name: getattr(self.settings, name) for name in limits},
        }
        return self._with_cookie(JSONResponse(told), request, session)

    async def login(self, request: Request) -> Response:
        address = request.client.host if request.client else ""
        if not self._throttle.allows(address):
            raise Refused(429, "Too many wrong logins; please wait five minutes.")
        fields = await self._fields(request)
        name, password = (fields.text(key, 200) for key in ("name", "password"))
        if not self.settings.knows(name, password):
            self._throttle.failed(address)
            await asyncio.sleep(0.3)
            raise Refused(401, "That name and password do not go together.")
        return self._with_cookie(JSONResponse({}), request, self.visitors.enter(name))

    async def logout(self, request: Request) -> Response:
        """Forgets the visitor and everything said."""
        self.visitors.drop(self._session(request))
        response = JSONResponse({})
        response.delete_cookie(COOKIE, httponly=True, samesite="strict")
        return response

    # -- what is shown --------------------------------------------------------------------------------------

    async def file(self, request: Request) -> Response:
        data, mime = self._files[request.url.path]
        return Response(data, media_type=mime)

    async def training_picture(self, request: Request) -> Response:
        self._session(request)
        pictures = self.service.guest(request.path_params["guest"]).pictures
        number = request.path_params["number"]
        return _picture(pictures[number][0] if number < len(pictures) else None)

    async def picture(self, request: Request) -> Response:
        return _picture(self._session(request).picture(request.path_params["name"]))

    async def events(self, request: Request) -> Response:
        """Changed entries as they change, from the version that the listener has seen."""
        session = self._session(request)
        seen = request.headers.get("last-event-id", "")
        return StreamingResponse(_tell(session, seen), media_type="text/event-stream")

    # -- what is asked --------------------------------------------------------------------------------------

    async def say(self, request: Request) -> Response:
        session, fields = self._session(request), await self._fields(request)
        key = self.service.say(
            session,
            self._guest(fields),
            fields.text("text", self.settings.max_text),
            picture=fields.flag("picture"),
            thinking=fields.flag("thinking"),
        )
        return JSONResponse({"entry": key}, 202)

    async def draw(self, request: Request) -> Response:
        session, fields, limits = self._session(request), await self._fields(request), self.settings
        seed = fields.whole("seed", -1, -1, 2**31 - 1)
        key = self.service.draw(
            session,
            self._guest(fields),
            fields.text("prompt", limits.max_text),
            fields.whole("n", 4, 1, limits.max_pictures),
            fields.whole("steps", limits.steps, 1, limits.max_steps),
            fields.number("guidance", limits.guidance, 1.0, 15.0),
            None if seed < 0 else seed,
        )
        return JSONResponse({"entry": key}, 202)

    async def ask(self, request: Request) -> Response:
        session, fields = self._session(request), await self._fields(request)
        name = fields.text("picture", 100)
        picture = session.picture(name)
        if picture is None:
            raise Refused(404, "That picture is not here any more; please choose it again.")
        question = fields.text("question", self.settings.max_text)
        return JSONResponse(
            {"entry": self.service.ask(session, self._guest(fields), question, name, picture)}, 202
        )

    async def stop(self, request: Request) -> Response:
        session, fields = self._session(request), await self._fields(request)
        self.service.stop(session, fields.text("entry", 20))
        return JSONResponse({})

    async def forget(self, request: Request) -> Response:
        session, fields = self._session(request), await self._fields(request)
        self.service.forget(session, self._guest(fields))
        return JSONResponse({})

    async def upload(self, request: Request) -> Response:
        """A picture as the request's body; answers with its name."""
        session = self._session(request)
        async with self._uploads:
            data = await _body(request, self.settings.max_upload, "The picture is too large")
            picture = await run_in_threadpool(read_upload, data, self.settings.max_pixels)
        name = session.keep(picture)
        return JSONResponse({"picture": name, "width": picture.width, "height": picture.height}, 201)

    def _guest(self, fields: Fields) -> Guest:
        return self.service.guest(fields.text("guest", 100))

    async def _fields(self, request: Request) -> Fields:
        data = await _body(request, MAX_JSON, "The request is too large")
        try:
            return Fields(json.loads(data))
        except (ValueError, RecursionError):  # not UTF-8, not JSON, endless nesting, endless numbers
            raise Refused(400, "Expected a JSON object.") from None


async def _body(request: Request, most: int, complaint: str) -> bytes:
    """The request's body, given up as soon as it is too long or takes too long."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                data += chunk
                if len(data) > most:
                    raise Refused(413, f"{complaint}; at most {most // 1024} KiB are taken.")
    except TimeoutError:
        raise Refused(408, "The request took too long.") from None
    return bytes(data)


async def _tell(session: Session, seen: str) -> AsyncIterator[str]:
    """The stream of one listener: whole entries, so that hearing one twice or late does no harm."""
    listener = session.listen()
    try:
        epoch, _, number = seen.partition("-")
        version = int(number) if epoch == session.epoch and number.isdecimal() else 0
        yield "retry: 1000\n\n"
        if not version:
            yield "event: reset\ndata: {}\n\n"
        woken = True
        while not listener.gone:
            entries, now = session.since(version)
            if entries:
                version = now
                yield f"id: {session.epoch}-{version}\ndata: {json.dumps(entries)}\n\n"
            elif not woken:
                yield ": still here\n\n"
            woken = await listener.wait(STILL_HERE)
        yield "event: gone\ndata: {}\n\n"
    finally:
        session.leave(listener)


def _about(guest: Guest) -> dict[str, Any]:
    return {
        "id": guest.id,
        "name": guest.persona.name,
        "description": guest.persona.description,
        "opening": guest.persona.opening,
        "run": guest.run,
        "greetings": guest.greetings,
        "ideas": guest.ideas,
        "pictures": [
            {"at": f"/guests/{guest.id}/{i}", "caption": caption, "width": p.width, "height": p.height}
            for i, (p, caption) in enumerate(guest.pictures)
        ],
    }


def _picture(picture: Shown | None) -> Response:
    if picture is None:
        raise Refused(404, "There is no such picture.")
    return Response(
        picture.data, media_type=picture.mime, headers={"cache-control": "private, max-age=86400"}
    )


class Server:
    """A listening server. ``run`` serves until interrupted; in a ``with`` it serves from a thread.

    Raises:
      UserError: the address cannot be listened on.
    """

    def __init__(self, settings: Settings, guests: Sequence[Guest], *, warm: bool = False):
        self.web = Web(settings, guests)
        family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
        try:
            self._socket = socket.create_server((settings.host, settings.port), family=family, backlog=512)
        except OSError as error:
            raise UserError(
                f"{settings.host}:{settings.port} cannot be listened on ({error.strerror or error});"
                " choose another --port, or end the program that has it."
            ) from None
        host = f"[{settings.host}]" if family == socket.AF_INET6 else settings.host
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(
            uvicorn.Config(
                self.web.app(warm),
                log_level="warning",
                access_log=False,
                server_header=False,
                limit_concurrency=1000,
                timeout_keep_alive=20,
                timeout_graceful_shutdown=3,
                ws="none",
            )
        )
        self._thread = threading.Thread(target=self.run, daemon=True)

    def run(self) -> None:
        self._server.run(sockets=[self._socket])

    def __enter__(self) -> Server:
        self._thread.start()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.01)
        return self

    def __exit__(self, *_: object) -> None:
        self.web.visitors.close()
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
