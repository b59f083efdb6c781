"""The web demo over HTTP: what it answers, to one or many; what it refuses is in test_serve_refuses.py."""

from __future__ import annotations

import io
import json
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the web demo needs the serve extra")
pytest.importorskip("uvicorn", reason="the web demo needs the serve extra")

from tests.app.web import Client, Puppet, guest, picture, serving
from unichar_jax.app.web.server import Server
from unichar_jax.app.web.settings import Settings
from unichar_jax.errors import UserError
from unichar_jax.sampling.engine import Engine

# -- what it is for -----------------------------------------------------------------------------------------


def test_the_page_and_what_it_loads(client):
    status, page = client.get("/")
    assert status == 200
    assert b"http" not in page.replace(b"http://www.w3.org", b"")  # nothing from anywhere else
    for path in ("/style.css", "/app.js", "/icon.svg"):
        assert client.get(path)[0] == 200
    _, response = client.send("GET", "/")
    assert "script-src 'self'" in response.getheader("content-security-policy")
    assert response.getheader("x-content-type-options") == "nosniff"
    assert response.getheader("server") is None


def test_a_conversation_with_pictures(client):
    told = client.hello()
    assert [g["name"] for g in told["guests"]] == ["Pip", "Luna"]
    assert len(told["guests"][0]["pictures"]) == 10
    status, data = client.get(told["guests"][0]["pictures"][3]["at"])
    assert status == 200
    assert Image.open(io.BytesIO(data)).size == (40, 40)

    entry = client.until(client.say("Hello there", picture=True))
    assert entry["reply"] == "I heard: Hello there ! "
    status, data = client.get(f"/pictures/{entry['picture']}")
    assert (status, Image.open(io.BytesIO(data)).size) == (200, (32, 32))
    assert client.until(client.say("And now?"))["reply"].startswith("I heard: And now?")


def test_earlier_turns_are_told_and_can_be_forgotten():
    puppet = Puppet()
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        first = client.say("first words")
        client.until(first)
        client.until(client.say("second words"))
        assert "first words" in puppet.asked[-1][0]
        client.post("/api/forget", {"guest": "pip"})
        assert client.until(first, "removed")["user"] == ""
        client.until(client.say("third words"))
        assert "words" in puppet.asked[-1][0]
        assert "first words" not in puppet.asked[-1][0]


def test_a_sheet_has_seeds_and_steps(client):
    asked = {"guest": "pip", "prompt": "Pip in the snow", "n": 3, "steps": 7, "seed": 40, "guidance": 2.5}
    status, told = client.post("/api/draw", asked)
    assert status == 202
    entry = client.until(told["entry"])
    assert [p["seed"] for p in entry["pictures"]] == [40, 41, 42]
    assert (entry["steps"], entry["guidance"], entry["prompt"]) == (7, 2.5, "Pip in the snow")
    drawn = {client.get(f"/pictures/{p['name']}")[1] for p in entry["pictures"]}
    assert len(drawn) == 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_question_about_a_picture(client, kind):
    status, sent = client.post("/api/picture", picture((300, 200), kind))
    assert (status, sent["width"], sent["height"]) == (201, 300, 200)
    asked = {"guest": "luna", "picture": sent["picture"], "question": "What is it?"}
    status, told = client.post("/api/ask", asked)
    assert status == 202
    assert client.until(told["entry"])["text"] == "I heard: What is it? ! "


def test_a_reload_shows_everything(client):
    key = client.say("Remember me", picture=True)
    before = client.until(key)
    again = Client(client.url.geturl())
    again.cookie = client.cookie
    again.hello()
    assert again.cookie == client.cookie
    assert again.until(key) == before


def test_work_can_be_stopped():
    puppet = Puppet(pause=0.05)
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        key = client.say("a b c d e f g h i j k l m n o p q r s t u v w x y z")
        client.until(key, "writing")
        client.post("/api/stop", {"entry": key})
        assert len(client.until(key, "stopped")["reply"]) < 40
        assert client.until(client.say("next"))["reply"] == "I heard: next ! "
        assert "a b c" not in puppet.asked[-1][0]  # what was stopped is not part of the conversation


def test_a_drawing_is_stopped_while_it_runs():
    """Not when the first picture is there: the engine's job is cancelled at once."""
    puppet = Puppet()
    puppet.go.clear()  # no picture will come
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        asked = {"guest": "pip", "prompt": "a kite", "n": 2, "steps": 10, "guidance": 2}
        keys = [client.post("/api/draw", asked)[1]["entry"], client.say("Draw", picture=True)]
        for key in keys:
            client.until(key, "drawing", "writing")
            client.post("/api/stop", {"entry": key})
            client.until(key, "stopped")
            # Stopped before the engine had the job, it is cancelled as soon as it has.
            until = time.monotonic() + 10
            while (
                not (puppet.jobs and all(job.cancelled for job in puppet.jobs)) and time.monotonic() < until
            ):
                time.sleep(0.01)
            assert all(job.cancelled for job in puppet.jobs)
        assert len(puppet.jobs) == 2
        puppet.go.set()
        assert client.until(client.say("next"))["reply"] == "I heard: next ! "


def test_work_of_a_visitor_who_logged_out_is_dropped():
    puppet = Puppet()
    puppet.go.clear()
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        asked = {"guest": "pip", "prompt": "a kite", "n": 2, "steps": 10, "guidance": 2}
        for _ in range(2):
            status, _ = client.post("/api/draw", asked)
            assert status == 202
        client.until("1", "drawing")
        client.post("/api/logout", {})
        puppet.go.set()
        other = Client(server.url)
        other.hello()
        other.until(other.say("Hello"))
        assert [job.cancelled for job in puppet.jobs] == [
            True,
            False,
        ]  # the second of the first's never began


# -- connections --------------------------------------------------------------------------------------------


def test_a_lost_connection_loses_nothing():
    puppet = Puppet()
    puppet.go.clear()
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        key, last = client.say("one two three", picture=True), ""
        with client.listen() as stream:
            for last, entries in stream:  # noqa: B007
                if entries and entries[0]["status"] == "writing":
                    break
        puppet.go.set()  # nobody listens now
        done = client.until(key)
        assert done["reply"] == "I heard: one two three ! "
        with client.listen(last) as stream:  # as a browser does that comes back
            name, entries = next(stream)
            assert name != last
            assert entries == [done]
        with client.listen(name) as stream:
            client.say("more")
            assert all(e["id"] != key for e in next(stream)[1])  # only what is new
        with client.listen("0badc0de-77") as stream:  # of a server that was started again since
            assert next(stream) == ("reset", [])
            assert key in [e["id"] for e in next(stream)[1]]


def test_too_many_windows_let_the_oldest_go():
    with serving(Puppet(), max_listeners=2) as server:
        client = Client(server.url)
        client.hello()
        with client.listen() as first, client.listen(), client.listen() as last:
            assert [name for name, _ in first] == ["reset", "gone"]
            key = client.say("still here?")
            assert any(e["id"] == key for _, entries in [next(last), next(last)] for e in entries)


def test_two_visitors_at_once():
    with serving(Puppet(pause=0.01)) as server:
        ann, bob = Client(server.url), Client(server.url)
        ann.hello(), bob.hello()
        keys = ann.say("I am Ann", picture=True), bob.say("I am Bob", picture=True)
        told = ann.until(keys[0]), bob.until(keys[1])
        assert [t["user"] for t in told] == ["I am Ann", "I am Bob"]
        assert ann.get(f"/pictures/{told[0]['picture']}")[0] == 200
        assert bob.get(f"/pictures/{told[0]['picture']}")[0] == 404
        with bob.listen() as stream:
            next(stream)
            assert "Ann" not in json.dumps(next(stream)[1])


def test_a_hundred_clients():
    with serving(Puppet(), max_waiting=40) as server:

        def visit(number: int) -> str:
            client = Client(server.url)
            client.hello()
            for _ in range(100):
                status, told = client.post("/api/say", {"guest": "pip", "text": f"I am number {number}"})
                if status == 202:
                    return client.until(told["entry"])["reply"]
                assert status == 503, told
                time.sleep(0.05)
            raise AssertionError("never let in")

        with ThreadPoolExecutor(100) as pool:
            replies = list(pool.map(visit, range(100)))
        assert replies == [f"I heard: I am number {i} ! " for i in range(100)]
        assert Client(server.url).get("/")[0] == 200


def test_visitors_are_bounded():
    with serving(Puppet(), max_sessions=2) as server:
        first, second, third = (Client(server.url) for _ in range(3))
        first.hello(), second.hello()
        first.until(first.say("I stay"))
        third.hello()  # in place of the second, who has said nothing
        assert first.post("/api/say", {"guest": "pip", "text": "still here"})[0] == 202
        assert second.post("/api/say", {"guest": "pip", "text": "gone"})[0] == 401
        third.until(third.say("I stay, too"))
        assert Client(server.url).get("/api/hello")[0] == 503
        assert len(server.web.visitors) == 2


def test_one_visitor_cannot_fill_the_queue():
    puppet = Puppet()
    puppet.go.clear()
    with serving(puppet, max_waiting_each=2) as server:
        client, other = Client(server.url), Client(server.url)
        client.hello(), other.hello()
        statuses = [client.post("/api/say", {"guest": "pip", "text": "again"})[0] for _ in range(6)]
        assert statuses == [202, 202, 202, 429, 429, 429]
        key = other.say("me, too")
        puppet.go.set()
        assert other.until(key)["status"] == "done"


def test_what_is_kept_is_bounded():
    with serving(Puppet(), max_entries=3, max_kept=300) as server:
        client = Client(server.url)
        client.hello()
        keys = [client.say(f"number {i}", picture=True) for i in range(4)]
        for key in keys[1:]:
            last = client.until(key)
        client.until(client.say("one more"))
        with client.listen() as stream:
            next(stream)
            assert len(next(stream)[1]) == 3
        assert client.get(f"/pictures/{last['picture']}")[0] == 200
        assert len(server.web.visitors.find(client.cookie)._pictures) < 4


# -- starting -----------------------------------------------------------------------------------------------


def test_loopback_unless_told_otherwise(server):
    assert Settings().host == "127.0.0.1"
    assert server._socket.getsockname()[0] == "127.0.0.1"
    with pytest.raises(UserError, match="--port"):
        Server(Settings(port=server._socket.getsockname()[1]), [])
    for wrong in ({"port": 70000}, {"max_sessions": 0}, {"steps": 101}):
        with pytest.raises(UserError, match="serve"):
            Settings(**wrong)


def test_with_a_real_model(tmp_path):
    """Random weights through the real engine: a turn with its picture, a question about that."""
    from unichar_jax.config.model import model_preset
    from unichar_jax.data.tokenizer import load_tokenizer, write_debug_tokenizer
    from unichar_jax.models import params
    from unichar_jax.models.autoencoder import Autoencoder
    from unichar_jax.models.unified import UnifiedModel

    cfg = model_preset("debug")
    write_debug_tokenizer(tmp_path)
    model = params.initialize(UnifiedModel(cfg), 0)
    autoencoder = params.initialize(Autoencoder(cfg.autoencoder), 1)
    with (
        Engine(model, autoencoder, load_tokenizer(tmp_path)) as engine,
        Server(Settings(port=0, steps=2, max_reply=8), [guest(engine)]) as server,
    ):
        client = Client(server.url)
        client.hello()
        entry = client.until(client.say("Hello", picture=True))
        assert entry["steps"] == 2
        status, data = client.get(f"/pictures/{entry['picture']}")
        assert status == 200
        _, sent = client.post("/api/picture", data)
        _, told = client.post("/api/ask", {"guest": "pip", "picture": sent["picture"], "question": "Who?"})
        assert client.until(told["entry"])["status"] == "done"
