"""A server to test with: an engine that answers by rule, and a client that says exactly what it is told."""

from __future__ import annotations

import http.client
import io
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from urllib.parse import urlsplit

from PIL import Image

from unichar_jax.app.web.guests import Guest
from unichar_jax.app.web.pictures import shown
from unichar_jax.app.web.server import COOKIE, Server
from unichar_jax.app.web.settings import Settings
from unichar_jax.sampling.batching import Job
from unichar_jax.sampling.flow import FlowSettings
from unichar_jax.sampling.session import Persona


class Puppet:
    """Stands for an engine: answers word by word, draws plain colours, can be slow, held, or broken."""

    def __init__(self, pause: float = 0.0):
        self.pause, self.asked, self.jobs, self.go = pause, [], [], threading.Event()
        self.config = SimpleNamespace(as_shipped=False)
        self.broken: Exception | None = None
        self.go.set()

    def submit_text(self, prompt, image=None, settings=None, *, model="base", wait=False, **_):
        self.asked.append((prompt, image))
        said = prompt.split("User Input: ")[-1].split("\n")[0]
        return self._start(f"I heard: {said} !".split(" "), lambda pieces: "".join(pieces), " ")

    def submit_images(self, prompt, n=1, settings=None, *, seed=0, model="base", wait=False, **_):
        self.asked.append((prompt, settings))
        colours = [((seed + i) * 40 % 256, 90, 160) for i in range(n)]
        return self._start([Image.new("RGB", (32, 32), c) for c in colours], list)

    def _start(self, pieces, whole, end=""):
        job = Job(None, None)
        self.jobs.append(job)

        def work() -> None:
            told = []
            for piece in pieces:
                self.go.wait(10)
                time.sleep(self.pause)
                if job.cancelled:
                    break
                told.append(piece + end if end else piece)
                job.emit(told[-1])
            job.finish(whole(told), self.broken)

        threading.Thread(target=work, daemon=True).start()
        return job

    def close(self) -> None:
        pass


def guest(engine, name: str = "Pip") -> Guest:
    pictures = tuple((shown(Image.new("RGB", (40, 40), (25 * i, 80, 80))), f"{name}, {i}") for i in range(10))
    return Guest(
        id=name.lower(),
        persona=Persona(name, f"{name} is a blue fox <b>&</b> sailor.", f"Ahoy, {name} is here!"),
        run="run",
        engine=engine,
        drawing=lambda steps, guidance: FlowSettings(steps + 1, 1.0),
        pictures=pictures,
        greetings=("Hello!", "Where do you live?"),
        ideas=(f"{name} flies a kite.",),
    )


class Client:
    """One browser: keeps its cookie, sends its page's headers unless told otherwise."""

    def __init__(self, url: str):
        self.url, self.cookie = urlsplit(url), ""

    def send(self, method, path, body=None, headers=None):
        """Opens a connection and returns it with its response."""
        connection = http.client.HTTPConnection(self.url.hostname, self.url.port, timeout=20)
        if isinstance(body, dict):
            body = json.dumps(body)
        sent = {"Cookie": f"{COOKIE}={self.cookie}", "Origin": self.url.geturl()} | (headers or {})
        connection.request(method, path, body, sent)
        response = connection.getresponse()
        cookie = (response.getheader("set-cookie") or "").split(";")[0].partition("=")[2]
        self.cookie = cookie.strip('"') or self.cookie
        return connection, response

    def get(self, path, **headers) -> tuple[int, bytes]:
        connection, response = self.send("GET", path, headers=headers)
        with connection_closed(connection):
            return response.status, response.read()

    def post(self, path, body, **headers) -> tuple[int, dict]:
        connection, response = self.send("POST", path, body, headers)
        with connection_closed(connection):
            return response.status, json.loads(response.read())

    def hello(self) -> dict:
        status, told = self.get("/api/hello")
        assert status == 200, told
        return json.loads(told)

    @contextmanager
    def listen(self, last: str = "") -> Iterator[Iterator[tuple[str, list]]]:
        """The stream as (id or kind of event, entries)."""
        connection, response = self.send("GET", "/api/events", headers={"Last-Event-ID": last})
        assert response.status == 200
        try:
            yield _messages(response)
        finally:
            response.close()  # which closes the socket, read or not
            connection.close()

    def until(self, key: str, *statuses: str) -> dict:
        """The entry as soon as it has one of the statuses."""
        with self.listen() as stream:
            for _, entries in stream:
                for entry in entries:
                    if entry["id"] == key and entry["status"] in (statuses or ("done",)):
                        return entry
        raise AssertionError("the stream ended")

    def say(self, text: str, **more) -> str:
        status, told = self.post("/api/say", {"guest": "pip", "text": text} | more)
        assert status == 202, told
        return told["entry"]


@contextmanager
def connection_closed(connection):
    try:
        yield
    finally:
        connection.close()


def _messages(response) -> Iterator[tuple[str, list]]:
    fields: dict[str, str] = {}
    for line in iter(response.readline, b""):
        name, _, value = line.decode().rstrip("\n").partition(": ")
        if name:
            fields[name] = value
        elif "data" in fields:
            data = json.loads(fields["data"])
            yield fields.get("event") or fields["id"], data if isinstance(data, list) else []
            fields = {}


@contextmanager
def serving(*engines, names=("Pip", "Luna"), **settings) -> Iterator[Server]:
    guests = [guest(engine, name) for engine, name in zip(engines * 2, names, strict=False)]
    with Server(Settings(port=0, steps=2, **settings), guests) as server:
        yield server


def picture(size=(64, 48), kind="PNG") -> bytes:
    """A file that a visitor sends."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(buffer, kind)
    return buffer.getvalue()
