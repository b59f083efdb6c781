"""The web demo in a real headless browser, as a person meets it. Skipped where there is no Chromium."""

from __future__ import annotations

import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

pytest.importorskip("uvicorn", reason="the web demo needs the serve extra")
pytest.importorskip("playwright.sync_api", reason="browser tests need playwright (the test extra)")

from playwright.sync_api import expect, sync_playwright

from tests.app.web import Puppet, serving
from unichar_jax.app.annotate.annotation import Annotation
from unichar_jax.app.annotate.asking import Collected, Item, Rejected
from unichar_jax.app.annotate.review import write_review
from unichar_jax.app.annotate.writing import Decisions
from unichar_jax.app.web.guests import invite
from unichar_jax.app.web.server import Server
from unichar_jax.app.web.settings import Settings
from unichar_jax.config import presets
from unichar_jax.data.rolescape import read_character
from workshop.miniworld.cast import member
from workshop.miniworld.write import write_character

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine; install it (Debian: apt-get install chromium)"
)
SECONDS = 20_000


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as driver:
        arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]  # as in containers
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


@contextmanager
def visit(browser, url: str, **more):
    """A page of a visitor of their own; what goes wrong in it, or asks elsewhere, fails the test."""
    context = browser.new_context(**more)
    context.set_default_timeout(SECONDS)
    expect.set_options(timeout=SECONDS)
    page, faults = context.new_page(), []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console",
        lambda m: (
            faults.append(m.text)
            if m.type == "error" and "Failed to load resource" not in m.text and "ERR_" not in m.text
            else None
        ),
    )
    own = (urlsplit(url).netloc, "")
    page.on("request", lambda r: faults.append(r.url) if urlsplit(r.url).netloc not in own else None)
    try:
        page.goto(url)
        yield page
        assert faults == []
    finally:
        context.close()


def say(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.get_by_role("button", name="Send", exact=True).click()


def test_a_persons_path(browser):
    """Open, pick, say hello, get a picture; it is all there after a reload."""
    with serving(Puppet(pause=0.01)) as server, visit(browser, server.url) as page:
        expect(page.get_by_role("heading", level=1)).to_have_text("Pip")
        page.get_by_role("button", name="Luna").click()
        expect(page.get_by_role("heading", level=1)).to_have_text("Luna")
        expect(page.get_by_text("Ahoy, Luna is here!")).to_be_visible()
        expect(page.get_by_text("Trained on these 10 pictures")).to_be_visible()
        expect(page.locator("#training img")).to_have_count(10)
        say(page, "Hello <b>you</b> <img src=x onerror=alert(1)>")
        turn = page.locator(".turn")
        expect(turn.locator(".them")).to_have_text(
            "I heard: Hello <b>you</b> <img src=x onerror=alert(1)> ! "
        )
        expect(turn.locator("figure img")).to_be_visible()
        expect(turn.locator("figcaption")).to_have_text(re.compile(r"seed \d+, 2 steps"))
        assert turn.locator("figure img").evaluate("img => img.naturalWidth") == 32
        assert page.get_by_label("Your message").input_value() == ""
        page.reload()
        expect(page.get_by_role("heading", level=1)).to_have_text("Luna")
        expect(page.locator(".turn figure img")).to_be_visible()
        page.get_by_role("button", name="Pip").click()
        expect(page.locator(".turn")).to_have_count(0)
        page.get_by_role("button", name="Luna").click()
        page.get_by_role("button", name="New conversation").click()
        expect(page.locator(".turn")).to_have_count(0)
        expect(page.get_by_role("button", name="Where do you live?")).to_be_visible()


@pytest.mark.slow
def test_a_persons_path_with_the_mini_model(browser, tmp_path):
    """The same with the model that ships, from a cold start of the server: a minute's work at most, compiling
    included. It is counted in processor time, so that other work on the machine does not fail it.
    """
    for name in ("Pip", "Luna"):
        write_character(member(name), tmp_path)
    folders = [tmp_path / "personalized_data" / "train" / name for name in ("Pip", "Luna")]
    guests = invite([presets.folder_or_shipped("mini")], folders)
    try:
        with Server(Settings(port=0), guests, warm=True) as server:
            started = time.process_time()
            with visit(browser, server.url) as page:
                page.get_by_role("button", name="Luna").click()
                say(page, "Hello!")
                drawn = page.locator(".turn figure img")
                expect(drawn).to_have_js_property("naturalWidth", 96, timeout=300_000)
                assert time.process_time() - started < 60
                expect(page.locator(".turn .them")).to_have_text(re.compile(r"\w"))
    finally:
        guests[0].engine.close()


def test_a_sheet_and_a_question_about_a_picture(browser, tmp_path):
    with serving(Puppet()) as server, visit(browser, server.url) as page:
        page.get_by_role("tab", name="Talk").focus()
        page.keyboard.press("ArrowRight")
        page.get_by_role("button", name="Pip flies a kite.").click()
        page.get_by_label("Pictures", exact=True).fill("3")
        page.get_by_label("Seed").fill("7")
        page.get_by_role("button", name="Draw", exact=True).click()
        sheet = page.locator(".sheet")
        expect(sheet.locator("figcaption")).to_have_text([f"seed {s}, 2 steps" for s in (7, 8, 9)])
        sheet.get_by_role("button", name="Again, with other seeds").click()
        expect(page.locator(".sheet")).to_have_count(2)

        page.locator(".sheet figure button").last.click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("seed 9")
        page.mouse.click(5, 5)  # beside it
        expect(dialog).to_be_hidden()
        page.locator(".sheet figure button").last.click()
        dialog.get_by_role("button", name="Ask about this picture").click()
        page.get_by_label("Your question").fill("Who is it?")
        page.keyboard.press("Enter")
        expect(page.locator(".answer p").first).to_have_text("I heard: Who is it? ! ")

        Image.linear_gradient("L").save(tmp_path / "mine.png")
        page.locator("#upload").set_input_files(tmp_path / "mine.png")
        expect(page.locator("#chosen")).to_have_js_property("naturalWidth", 256)
        (tmp_path / "not.png").write_text("no picture")
        page.locator("#upload").set_input_files(tmp_path / "not.png")
        expect(page.get_by_role("alert")).to_contain_text("not a picture")
        expect(page.locator("#chosen")).to_have_js_property("naturalWidth", 256)


def test_two_users_at_once(browser):
    with (
        serving(Puppet(pause=0.02)) as server,
        visit(browser, server.url) as ann,
        visit(browser, server.url) as bob,
    ):
        say(ann, "I am Ann")
        say(bob, "I am Bob")
        expect(ann.locator(".turn figure img")).to_be_visible()
        expect(bob.locator(".turn figure img")).to_be_visible()
        expect(ann.locator(".turn")).to_have_count(1)
        expect(ann.locator(".turn .you")).to_have_text("I am Ann")
        expect(bob.locator(".turn .you")).to_have_text("I am Bob")


def test_a_lost_connection(browser):
    """The line is cut in the middle of a reply; the page says so, comes back, and has missed nothing."""
    puppet = Puppet()
    puppet.go.clear()
    with serving(puppet) as server, line(server.url) as (url, cut), visit(browser, url) as page:
        say(page, "one two three four")
        expect(page.get_by_text("writing")).to_be_visible()
        with cut():
            expect(page.get_by_text("The connection is lost.")).to_be_visible()
            puppet.go.set()
            page.get_by_label("Your message").fill("more")
            page.keyboard.press("Enter")
            expect(page.get_by_role("alert")).to_contain_text("cannot be reached")
        expect(page.locator(".turn .them")).to_have_text("I heard: one two three four ! ")
        expect(page.locator(".turn figure img")).to_be_visible()
        expect(page.get_by_text("The connection is lost.")).to_be_hidden()
        assert page.get_by_label("Your message").input_value() == "more"  # what was typed is not lost
        page.keyboard.press("Enter")
        expect(page.locator(".turn")).to_have_count(2)


@contextmanager
def line(url: str) -> Iterator[tuple[str, object]]:
    """A line to a server that can be cut: its address, and a context in which there is no connection."""
    target = (urlsplit(url).hostname, urlsplit(url).port)
    listener = socket.create_server(("127.0.0.1", 0))
    pairs: list[socket.socket] = []
    up = threading.Event()
    up.set()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            end.close()

    def accept() -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            if not up.is_set():
                near.close()
                continue
            far = socket.create_connection(target)
            pairs.extend((near, far))
            for ends in ((near, far), (far, near)):
                threading.Thread(target=pump, args=ends, daemon=True).start()

    @contextmanager
    def cut():
        up.clear()
        for end in pairs:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        pairs.clear()
        yield
        up.set()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", cut
    finally:
        listener.close()


def test_login(browser):
    users = (("ann", "correct horse"),)
    with serving(Puppet(), users=users) as server, visit(browser, server.url) as page:
        page.get_by_label("Name").fill("ann")
        page.get_by_label("Password").fill("wrong horse")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("alert")).to_contain_text("do not go together")
        page.get_by_label("Password").fill("correct horse")
        page.get_by_role("button", name="Log in").click()
        expect(page.get_by_role("heading", name="Pip")).to_be_visible()
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_label("Password")).to_be_visible()


@pytest.mark.parametrize("width", [360, 1280])
def test_everybody_can_use_it(browser, width):
    """Every control has a name, nothing sticks out of a small window."""
    with (
        serving(Puppet()) as server,
        visit(browser, server.url, viewport={"width": width, "height": 740}) as page,
    ):
        say(page, "a" * 300)
        expect(page.locator(".turn figure img")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for name in ("Talk", "Draw", "Ask"):
            page.get_by_role("tab", name=name).click()
            nameless = page.evaluate(
                "[...document.querySelectorAll('button, input, textarea, img')].filter(e => e.checkVisibility() &&"
                " !(e.labels?.length || e.ariaLabel || e.title || e.textContent.trim() || e.hasAttribute('alt')))"
                ".map(e => e.outerHTML)"
            )
            assert nameless == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_review_page_saves_decisions(browser, tiny_root, tmp_path):
    character = read_character(tiny_root / "train" / "Friends-Tess")
    found = Annotation(character, ())
    items = [Item(f"vqa-0-{i}", "vqa", "0", {"question": f"What is {i}?", "answer": "It."}) for i in range(3)]
    found.collected["vqa", "0"] = Collected(
        "vqa", "0", 4, items, [Rejected("vqa", "0", "it repeats", "</li>")]
    )
    page_file = write_review(found, Decisions(frozenset({"vqa-0-2"})), Path(tmp_path) / "review.html")
    context = browser.new_context()
    page = context.new_page()
    page.goto(page_file.as_uri())
    expect(page.get_by_role("status")).to_have_text("1 dropped, 0 edited")
    page.get_by_label("answer").first.fill("It is <b>blue</b>.")
    page.get_by_label("keep").nth(1).uncheck()
    expect(page.get_by_role("status")).to_have_text("2 dropped, 1 edited")
    with page.expect_download() as download:
        page.get_by_role("button", name="Save decisions").click()
    download.value.save_as(tmp_path / "decisions.json")
    made = Decisions.load(tmp_path / "decisions.json")
    assert made.drop == {"vqa-0-1", "vqa-0-2"}
    assert made.edit == {"vqa-0-0": {"answer": "It is <b>blue</b>."}}
    context.close()
