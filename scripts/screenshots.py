"""Takes the pictures of the documents again: the quickstart's report, and the web demo with finished runs.

    python scripts/screenshots.py runs/quickstart/sft --report runs/quickstart/report.html --out docs

It does what a person does (open, pick, say hello, wait for the picture; a contact sheet; a question about a
picture), prints how long the first of these took from opening the page, and writes ``demo-talk.png``,
``demo-draw.png``, ``demo-ask.png`` and, with ``--report``, ``quickstart.png``. Use runs of the mini
world: pictures in documents show no others. It needs the test extra and a Chromium.
"""

from __future__ import annotations

import io
import re
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from PIL import Image

from unichar_jax.app import engines
from unichar_jax.app.web.guests import invite
from unichar_jax.app.web.server import Server
from unichar_jax.app.web.settings import Settings
from unichar_jax.cli.train import use_compilation_cache
from unichar_jax.errors import UserError

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WINDOW = {"width": 1200, "height": 830}
SECONDS = 120_000


@dataclass(frozen=True)
class Screenshots:
    """What is shown, and where the pictures go."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Finished runs of the mini world's characters; the last one is talked to."""
    report: Path | None = None
    """The quickstart's report, to show its beginning."""
    out: Path = Path("docs")
    """Gets the pictures."""
    hello: str = "Hello! Who are you?"
    """What is said."""
    prompt: str = "{name} is waving in the snow."
    """What is drawn."""
    question: str = "Where is {name}?"
    """What is asked about the fourth training picture."""


def take(cfg: Screenshots) -> float:
    """Takes the pictures; returns the seconds from opening the page to the first picture drawn.

    Raises:
      UserError: no Chromium, or a run that cannot be served.
    """
    from playwright.sync_api import expect, sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        raise UserError(
            "there is no Chromium on this machine; install it (Debian: apt-get install chromium)."
        )
    cfg.out.mkdir(parents=True, exist_ok=True)
    expect.set_options(timeout=SECONDS)
    guests = invite(cfg.runs, load=engines.load_engine)
    try:
        with Server(Settings(port=0), guests) as server, sync_playwright() as driver:
            arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
            browser = driver.chromium.launch(executable_path=chromium, args=arguments)
            if cfg.report is not None:
                page = browser.new_page(viewport={"width": 950, "height": 1000})
                page.goto(cfg.report.absolute().as_uri())
                save(page, cfg.out / "quickstart.png")
            seconds = visit(browser, server.url, guests[-1].persona.name, cfg)
            browser.close()
    finally:
        for engine in {id(guest.engine): guest.engine for guest in guests}.values():
            engine.close()
    return seconds


def visit(browser: Browser, url: str, name: str, cfg: Screenshots) -> float:
    """A person's way through the page."""
    from playwright.sync_api import expect

    page = browser.new_page(viewport=WINDOW)
    page.set_default_timeout(SECONDS)
    started = time.perf_counter()
    page.goto(url)
    choice = page.get_by_role("navigation").get_by_role("button", name=name)
    if choice.count() and choice.is_visible():
        choice.click()
    page.get_by_label("Your message").fill(cfg.hello)
    page.get_by_role("button", name="Send", exact=True).click()
    expect(page.locator(".turn figure img")).to_have_js_property("complete", True)
    seconds = time.perf_counter() - started
    save(page, cfg.out / "demo-talk.png")

    page.get_by_role("tab", name="Draw").click()
    page.get_by_label("What shall be drawn?").fill(cfg.prompt.format(name=name))
    page.get_by_label("Pictures", exact=True).fill("8")
    page.get_by_label("Seed").fill("0")
    page.get_by_role("button", name="Draw", exact=True).click()
    expect(page.locator(".sheet figure img")).to_have_count(8)
    save(page, cfg.out / "demo-draw.png")

    page.locator("#training button").nth(3).click()
    page.get_by_role("button", name="Ask about this picture").click()
    page.get_by_label("Your question").fill(cfg.question.format(name=name))
    page.get_by_role("button", name="Ask", exact=True).click()
    expect(page.locator(".answer p").first).to_have_text(re.compile(r"\w"))
    expect(page.locator(".answer .state")).to_be_hidden()
    save(page, cfg.out / "demo-ask.png")
    return seconds


def save(page: Page, path: Path) -> None:
    """The window as a PNG of few colours, which keeps a checkout small."""
    page.evaluate("document.activeElement.blur()")
    page.wait_for_timeout(500)  # pictures are decoded, animations are over
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1024} KiB")


def main(args: Sequence[str] | None = None) -> int:
    cfg = tyro.cli(Screenshots, args=args, description=__doc__)
    use_compilation_cache()
    try:
        print(f"open, pick, hello, picture: {take(cfg):.1f} s")
    except UserError as error:
        print(f"screenshots: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
