"""The web demo's login: who may come in, what strangers are told, and the file of names."""

from __future__ import annotations

import json
import time

import pytest

pytest.importorskip("starlette", reason="the web demo needs the serve extra")
pytest.importorskip("uvicorn", reason="the web demo needs the serve extra")

from tests.app.web import Client, Puppet, serving
from unichar_jax.app.web.guard import Throttle
from unichar_jax.app.web.settings import read_users
from unichar_jax.errors import UserError

USERS = (("ann", "correct horse"), ("bob", "battery staple"))


def test_login():
    with serving(Puppet(), users=USERS) as server:
        stranger = Client(server.url)
        assert stranger.get("/")[0] == 200
        status, told = stranger.get("/api/hello")
        assert (status, json.loads(told)["login"]) == (401, True)
        assert b"Pip" not in told
        for path in ("/api/events", "/guests/pip/0", "/pictures/x"):
            assert stranger.get(path)[0] == 401
        for path in (
            "/api/say",
            "/api/draw",
            "/api/ask",
            "/api/picture",
            "/api/stop",
            "/api/forget",
            "/api/logout",
        ):
            assert stranger.post(path, {"guest": "pip"})[0] == 401
        for name, password in (
            ("ann", "wrong"),
            ("ann", "battery staple"),
            ("eve", "correct horse"),
            ("ann\0", "é"),
        ):
            status, told = stranger.post("/api/login", {"name": name, "password": password})
            assert (status, told["message"]) == (401, "That name and password do not go together.")
        assert stranger.cookie == ""
        assert len(server.web.visitors) == 0

        ann, bob, elsewhere = (Client(server.url) for _ in range(3))
        for client, (name, password) in ((ann, USERS[0]), (bob, USERS[1]), (elsewhere, USERS[0])):
            assert client.post("/api/login", {"name": name, "password": password})[0] == 200
        assert ann.hello()["user"] == "ann"
        key = ann.say("my secret")
        assert ann.until(key) == elsewhere.until(key)
        with bob.listen() as stream:
            bob.say("mine")
            next(stream)
            assert "secret" not in json.dumps(next(stream)[1])
        assert ann.post("/api/logout", {})[0] == 200
        assert elsewhere.get("/api/hello")[0] == 401


def test_guessing_is_slowed_down(monkeypatch):
    throttle = Throttle(most=3, seconds=100.0)
    for _ in range(3):
        assert throttle.allows("a")
        throttle.failed("a")
    assert not throttle.allows("a")
    assert throttle.allows("b")
    late = time.monotonic() + 101
    monkeypatch.setattr(time, "monotonic", lambda: late)
    assert throttle.allows("a")


def test_the_login_file(tmp_path):
    path = tmp_path / "users.txt"
    path.write_text("# who may come\nann:correct horse\n\nbob: a:b c d e\n")
    assert read_users(path) == (("ann", "correct horse"), ("bob", "a:b c d e"))
    with serving(Puppet(), users=read_users(path)) as server:  # what the file says can be typed
        for name, password in (("ann", "correct horse"), ("bob", " a:b c d e"), ("bob", "a:b c d e")):
            assert Client(server.url).post("/api/login", {"name": name, "password": password})[0] == 200
    for text, words in (("ann", "line 1"), ("ann:short", "8 characters"), ("# nobody\n", "no login")):
        path.write_text(text)
        with pytest.raises(UserError, match=words):
            read_users(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_users(tmp_path / "absent")
