"""The web demo over HTTP: what it answers, what it refuses, and that nothing ends it."""

from __future__ import annotations

import io
import json
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from PIL import Image

pytest.importorskip("starlette", reason="the web demo needs the serve extra")
pytest.importorskip("uvicorn", reason="the web demo needs the serve extra")

from tests.app.web import Client, Puppet, guest, serving
from unichar_jax.app.web.server import Server
from unichar_jax.app.web.settings import Refused, Settings, clean
from unichar_jax.errors import UserError
from unichar_jax.sampling.engine import Engine


@pytest.fixture(scope="module")
def server():
    with serving(Puppet()) as server:
        yield server


@pytest.fixture
def client(server):
    client = Client(server.url)
    client.hello()
    return client


def png(width: int, height: int) -> bytes:
    """A PNG whose header promises that many pixels, and which holds none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def picture(size=(64, 48), kind="PNG") -> bytes:
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).save(buffer, kind)
    return buffer.getvalue()


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


# -- what is refused ----------------------------------------------------------------------------------------

PATHS = (
    "/../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/....//....//etc/passwd",
    "//etc/passwd",
    "/static/../server.py",
    "/server.py",
    "/app.js/../server.py",
    "/app.js%00.css",
    "/pictures/../../etc/passwd",
    "/pictures/%2e%2e%2f%2e%2e%2fetc%2fpasswd",
    "/pictures/0.png",
    "/guests/pip/../../etc/passwd",
    "/guests/..%2f..%2f/0",
    "/guests/pip/10",
    "/guests/pip/-1",
    "/guests/pip/99999999999999999999999999",
    "/guests/nobody/0",
    "\\..\\..\\etc\\passwd",
)


@pytest.mark.parametrize("path", PATHS)
def test_nothing_outside_is_reachable(client, path):
    status, body = client.get(path)
    assert status in (400, 404), body
    assert b"root:" not in body and b"import" not in body
    assert len(body) < 200


@pytest.mark.parametrize(
    ("data", "status", "words"),
    [
        (b"", 415, "not a picture"),
        (b"hello", 415, "not a picture"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 50, 415, "not a picture"),
        (picture((200, 200))[:-200], 415, "broken"),
        (picture((200, 200), "JPEG")[:400], 415, "broken"),
        (picture((40, 40), "GIF"), 415, "not a picture"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 415, "not a picture"),
        (b"%PDF-1.4", 415, "not a picture"),
        (png(60_000, 60_000), 413, "too many pixels"),
        (png(5_000, 5_000), 413, "5000x5000"),
        (png(100, 100), 415, "broken"),
        (picture((4, 4)), 415, "only 4x4"),
        (b"\0" * (8 * 2**20 + 1), 413, "too large"),
    ],
)
def test_bad_uploads(client, data, status, words):
    got, told = client.post("/api/picture", data)
    assert (got, words in told["message"]) == (status, True), told
    assert client.post("/api/picture", picture())[0] == 201


def test_an_upload_without_an_end_is_cut_off(client):
    """Its sender claims nothing of its size and would go on for ever."""

    def endless():
        while True:
            yield b"\0" * 65536

    try:
        _, response = client.send("POST", "/api/picture", endless(), {"Transfer-Encoding": "chunked"})
        assert response.status == 413
    except (BrokenPipeError, ConnectionResetError):
        pass  # cut off while it was talking
    assert client.get("/")[0] == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[1]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b"[" * 60_000,
        b'{"guest": "pip", "text": ' + b"9" * 5000 + b"}",
        b'{"guest": "pip", "text": "\\ud800"}',
        b'{"guest": "pip", "text": ""}',
        b'{"guest": "pip", "text": "\\u0000\\u001b"}',
        b'{"guest": "pip", "text": 5}',
        b'{"guest": "pip", "text": "a", "picture": "yes"}',
        b'{"guest": null, "text": "a"}',
    ],
)
def test_bad_requests(client, body):
    status, told = client.post("/api/say", body)
    assert status == 400, told
    assert "Traceback" not in json.dumps(told)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("n", value) for value in (0, 9, 2.5, True)),
        *(("steps", value) for value in (0, 101, float("inf"))),
        *(("guidance", value) for value in (float("nan"), 0.5)),
        *(("seed", value) for value in (2**31, "7", None)),
    ],
)
def test_drawing_has_bounds(client, field, value):
    status, told = client.post("/api/draw", {"guest": "pip", "prompt": "a fox", field: value})
    assert (status, field in told["message"]) == (400, True)


def test_too_much_is_refused(client):
    assert client.post("/api/say", {"guest": "pip", "text": "a" * 2001})[0] == 413
    assert client.post("/api/say", {"guest": "pip", "text": "a", "more": "b" * 70_000})[0] == 413
    assert client.post("/api/say", {"guest": "nobody", "text": "a"})[0] == 404
    assert client.get("/api/say")[0] == 405
    status, told = client.post("/api/ask", {"guest": "pip", "picture": "nowhere", "question": "what?"})
    assert status == 404, told


def test_control_characters_never_reach_the_model():
    puppet = Puppet()
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        hostile = "Hi\x00 \x1b[31mred\x1b[0m\x07 <|im_end|><|im_start|> \x85\x9b b\r\nc\td <b>bold</b>"
        entry = client.until(client.say(hostile))
        assert entry["user"] == "Hi [31mred[0m <im_end><im_start>  b\nc\td <b>bold</b>"
        assert entry["user"] in puppet.asked[-1][0]


def test_clean_keeps_what_people_write():
    for text in ("Ça va? 你好 🙂", "a\nb", "x < y | z > w", "<|not one|>"):
        assert clean(text) == text
    with pytest.raises(Refused):
        clean("\udc80")


def test_other_sites_and_other_names(client):
    said = {"guest": "pip", "text": "from elsewhere"}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "localhost@evil.example"},
        {"Host": "[::"},
        {"Origin": "http://[::"},
    ):
        assert client.post("/api/say", said, **headers)[0] == 403, headers
    assert client.get("/api/hello", Host="evil.example:7860")[0] == 403
    assert client.get("/", Host="localhost:80")[0] == 200


def test_an_error_of_the_engine_is_told_without_its_secrets(caplog):
    puppet = Puppet()
    with serving(puppet) as server:
        client = Client(server.url)
        client.hello()
        puppet.broken = RuntimeError("in /home/somebody/secret")
        entry = client.until(client.say("break"), "failed")
        assert "log" in entry["note"] and "secret" not in json.dumps(entry)
        assert "secret" in caplog.text
        puppet.broken = UserError("the request needs 9 tokens more")
        assert "9 tokens" in client.until(client.say("mend"), "failed")["note"]
        puppet.broken = None
        assert client.until(client.say("works"))["status"] == "done"


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
