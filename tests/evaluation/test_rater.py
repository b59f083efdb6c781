"""Marks by an endpoint: parsed, remembered, retried, and left out without one."""

import json
import threading
import urllib.error
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from tests.evaluation.conftest import Scripted
from unichar_jax.errors import UserError
from unichar_jax.evaluation.endpoint import Endpoint, chat
from unichar_jax.evaluation.outputs import OutputStore
from unichar_jax.evaluation.pictures import Instruments
from unichar_jax.evaluation.rater import RUBRICS, Rater, Reply, parse_score
from unichar_jax.evaluation.suite import Plan, evaluate
from unichar_jax.files import Journal

ENDPOINT = Endpoint("http://localhost:1/v1", "judge", workers=2)
REPLY = Reply("memorization", "Pip", "Pip likes $5 notes.", "What do you like?", "Pancakes.")


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        ("Fine.\nScore: 6", 6),
        ("Score: 2 was my first thought.\n**Score:** 5", 5),
        ("score 7.", 7),
        ("Score: 12", None),
        ("Score: 0", None),
        ("It is a 6.", None),
        ("", None),
    ],
)
def test_the_last_score_counts(answer, score):
    assert parse_score(answer) == score


def test_rubrics_hold_what_is_marked():
    for rubric in RUBRICS:
        text = Reply(rubric, REPLY.name, REPLY.profile, REPLY.question, REPLY.reply).prompt()
        for part in ("Pip likes $5 notes.", "What do you like?", "Pancakes.", "Score:"):
            assert part in text
        assert "$reply" not in text


def test_a_mark_is_paid_for_once(tmp_path):
    asked = []

    def ask(endpoint, prompt):
        asked.append(prompt)
        return "Good. Score: 4"

    memory = tmp_path / "marks.jsonl"
    assert Rater(ENDPOINT, memory, ask).rate([REPLY, REPLY]) == [4, 4]
    before = len(asked)
    with memory.open("a") as file:
        file.write('{"key": "cut o')
    assert Rater(ENDPOINT, memory, ask).rate([REPLY]) == [4]
    assert len(asked) == before
    other = Endpoint("http://localhost:1/v1", "another judge")
    assert Rater(other, memory, ask).rate([REPLY]) == [4]
    assert len(asked) == before + 1


def test_a_busy_service_gets_time_and_a_refusal_ends(tmp_path):
    waits, left = [], [429, 503]

    def ask(endpoint, prompt):
        if left:
            raise urllib.error.HTTPError(endpoint.url, left.pop(0), "busy", None, None)
        return "Score: 3"

    assert Rater(ENDPOINT, tmp_path / "a", ask, waits.append).rate([REPLY]) == [3]
    assert waits == [1.0, 2.0]

    def refuse(endpoint, prompt):
        raise urllib.error.HTTPError(endpoint.url, 401, "Unauthorized", None, None)

    waits.clear()
    with pytest.raises(UserError, match=r"401.*UNICHAR_JUDGE_KEY"):
        Rater(ENDPOINT, tmp_path / "b", refuse, waits.append).rate([REPLY])
    assert waits == []


def test_the_protocol_of_the_endpoint(monkeypatch):
    seen = {}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            seen["path"], seen["key"] = self.path, self.headers["Authorization"]
            seen["body"] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = {"choices": [{"message": {"content": "Score: 7"}}]}
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.handle_request, daemon=True).start()
    monkeypatch.setenv("UNICHAR_JUDGE_KEY", "secret")
    endpoint = Endpoint(f"http://127.0.0.1:{server.server_port}/v1/", "judge")
    assert chat(endpoint, "Mark this.") == "Score: 7"
    server.server_close()
    assert seen["path"] == "/v1/chat/completions"
    assert seen["key"] == "Bearer secret"
    assert seen["body"]["messages"] == [{"role": "user", "content": "Mark this."}]
    assert (seen["body"]["model"], seen["body"]["temperature"]) == ("judge", 0)


def test_marks_are_metrics_and_unparsed_answers_are_not(pip, tmp_path):
    def ask(endpoint, prompt):
        return (
            "Score: 6"
            if "reply" in prompt and "how well a role-played character remembers" in prompt
            else "no"
        )

    rater = Rater(ENDPOINT, tmp_path / "marks.jsonl", ask)
    plan = Plan(("memorization", "personality"), seeds=1)
    store = OutputStore(tmp_path)
    results = evaluate(Scripted(), [pip], store, plan, Instruments(rater=rater))
    assert results.interval("memorization", "judged").mean == 6.0
    assert results.interval("personality", "judged") is None
    assert "judged" not in results.left_out


def test_only_web_addresses(tmp_path):
    with pytest.raises(UserError, match="http://"):
        Endpoint("file:///etc/passwd", "judge")
    with pytest.raises(UserError, match="model's name"):
        Endpoint("http://localhost:8000/v1", "")


def test_a_line_cut_off_harms_no_other(tmp_path):
    """A process was killed while it wrote: what came before holds, and the next mark is not glued to the stump."""
    path = tmp_path / "marks.jsonl"
    journal = Journal(path, "score")
    journal.add("a", 4, answer="Score: 4")
    with path.open("ab") as file:
        file.write('{"key": "b", "score": 3, "answer": "ö'.encode()[:-1])
    again = Journal(path, "score")
    assert again.known == {"a": 4}
    again.add("c", None)
    assert Journal(path, "score").known == {"a": 4, "c": None}
