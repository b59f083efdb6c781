"""A language model by rule behind a real local endpoint: it answers well, wrongly, slowly, or not at all."""

from __future__ import annotations

import itertools
import json
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

WORDS = re.findall(
    r"\w+",
    """
river stone lantern harbour melody ribbon thunder basket feather compass orchard whisper marble velvet copper
meadow candle ladder pebble saddle anchor button cricket dragon engine falcon garden hammer island jacket kettle
lemon mirror needle orange parrot quilt rocket sailor ticket umbrella violin window yogurt zipper almond bridge
carpet
""",
)


class Stub:
    """Its rules.

    Attributes:
      fault: given the task and how often it was asked, what to do instead of a good answer: "silent", "slow",
        a status, or a text to answer; None for a good answer.
      asked: (task, whether a picture was shown), in order.
    """

    def __init__(self, fault=lambda task, times: None):
        self.fault, self.asked, self.prompts = fault, [], []
        self._counter = itertools.count()
        self._lock = threading.Lock()

    def _words(self, count: int, number: int) -> str:
        return " ".join(random.Random(number).sample(WORDS, count))

    def items(self, task: str, prompt: str, count: int) -> list[dict]:
        name = re.search(r"\$?\b(Wisp|Nova|Pip)\b", prompt).group(1)
        profile = (re.findall(r"<profile>\n(.*?)\n</profile>", prompt, re.DOTALL) or [""])[0]
        sentences = [s.strip() for s in re.split(r"(?<=[.!?])\s", profile) if len(s.strip()) > 8] or [
            "nothing"
        ]
        made = []
        for _ in range(count):
            with self._lock:
                number = next(self._counter)
            words = self._words(4, number)
            evidence = sentences[number % len(sentences)]
            wrong = [self._words(2, -number - i) + f" {i}" for i in range(1, 4)]
            made.append(
                {
                    "description": {
                        "description": f"{name} is kind, and cares for every {words}, and speaks softly."
                    },
                    "manner": {"profile": f"- {name} is shy.\n- {name} likes {words}."},
                    "caption": {"caption": f"{name} near a {words}, smiling, by day."},
                    "exchange": {"user": f"Is that your {words}?", "reply": f"Um... yes, my {words}. Boo!"},
                    "dialogue": {"user": f"Tell me of {words}!", "reply": f"Boo, maybe! {words}."},
                    "dialogue_test": {"user": f"And the {words}?", "reply": f"Um... {words}."},
                    "plan": {
                        "thinking": f"The picture shows {name} in full, with the {words}, because that was said.",
                        "instruction": f"A small ghost beside a {words}, soft light",
                    },
                    "vqa": {"question": f"Where is the {words}?", "answer": "In front.", "type": "objective"},
                    "image_mcq": {
                        "question": f"Which {words} is it?",
                        "answer": f"The {words} one",
                        "wrong": wrong,
                        "difficulty": "easy",
                        "rationale": "One sees it.",
                    },
                    "knowledge": {
                        "question": f"What of the {words}?",
                        "answer": evidence[:100],
                        "evidence": evidence,
                        "type": "fact",
                        "difficulty": "medium",
                        "reasoning_steps": ["Read."],
                        "confidence": 0.9,
                    },
                    "knowledge_mcq": {
                        "question": f"Who has the {words}?",
                        "answer": f"{name} and {words}",
                        "wrong": wrong,
                        "evidence": evidence,
                        "rationale": "It is said.",
                    },
                    "memorization": {"question": f"Do you remember the {words}?"},
                    "personality": {"question": f"How do you feel about {words}?"},
                    "rl_prompts": {
                        "text": f"{name} paints a {words}",
                        "questions": [
                            {
                                "question": f"Does {name} paint?",
                                "answer": "yes",
                                "type": "yes_no",
                                "weight": 1,
                            },
                            {
                                "question": f"Does {name} paint ?",
                                "answer": "yes",
                                "type": "yes_no",
                                "weight": 1,
                            },
                            {"question": "Is it raining?", "answer": "no", "type": "yes_no", "weight": 0.5},
                            {
                                "question": "What is painted?",
                                "answer": words,
                                "choices": [words, "a cat", "a dog"],
                                "type": "multiple_choice",
                                "category": "object",
                                "weight": 0.8,
                            },
                        ],
                    },
                }[task]
            )
        return made

    def answer(self, content) -> tuple[int, str]:
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        prompt = "".join(p.get("text", "") for p in parts)
        shown = [p["image_url"]["url"] for p in parts if p["type"] == "image_url"]
        assert all(u.startswith("data:image/png;base64,") for u in shown)
        task = re.match(r"Task: (\w+)", prompt).group(1)
        with self._lock:
            self.asked.append((task, bool(shown)))
            self.prompts.append(prompt)
            times = Counter(t for t, _ in self.asked)[task]
        fault = self.fault(task, times)
        if fault == "slow":
            time.sleep(1.5)
        elif isinstance(fault, int):
            return fault, "busy"
        elif fault is not None:
            return 200, fault
        count = int(re.search(r"exactly (\d+) object", prompt).group(1))
        return 200, "Here you are:\n```json\n" + json.dumps(self.items(task, prompt, count)) + "\n```"


@contextmanager
def endpoint(stub: Stub) -> Iterator[str]:
    """The address of the stub."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = stub.answer(body["messages"][0]["content"])
            if text == "silent":
                return  # the connection is closed without a word
            said = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)
            except OSError:  # the other side did not wait
                pass

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
