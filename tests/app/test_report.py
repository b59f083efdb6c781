"""The report: whole, self-contained, safe, and readable without what it lacks."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.app.dummy import report, results
from unichar_jax.app import charts
from unichar_jax.app.report import (
    Column,
    Command,
    Comparison,
    Conversation,
    Exchange,
    Measurements,
    Picture,
    Report,
    compare,
    conversation,
    curves,
    render,
    write_report,
)
from unichar_jax.errors import UserError
from unichar_jax.evaluation.results import Record, Results
from unichar_jax.sampling.session import Persona, Turn


class Page(HTMLParser):
    """Counts tags, notes what does not close, and everything that would be loaded."""

    VOID = ("meta", "img", "br", "path", "ellipse")

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.loads, self.text, self.ids = [], [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        told = dict(attrs)
        self.ids.add(told.get("id"))
        self.loads += [told[k] for k in ("src", "href", "data", "action") if told.get(k)]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page():
    return Page(render(report(prompts=2, seeds=2)))


def test_is_whole_and_loads_nothing(page):
    assert not page.open
    inside = [x for x in page.loads if x.startswith("#")]
    pictures = [x for x in page.loads if x.startswith("data:image/png;base64,")]
    assert len(inside) + len(pictures) == len(page.loads)
    assert len(pictures) == 10 + 2 * 2 * 4 + 1
    assert {x[1:] for x in inside} <= page.ids
    assert "script" not in page.tags
    assert "link" not in page.tags
    raw = render(report(prompts=1, seeds=1))
    assert not re.search(r"url\(|@import|https?://", raw.replace("http-equiv", ""))


def test_sections_in_order(page):
    order = ["pictures", "sheets", "conversation", "measurements", "training", "making", "next"]
    assert [x[1:] for x in page.loads if x.startswith("#")] == order
    text = " ".join(page.text)
    for part in (
        "Ten training pictures",
        "looks described",
        "Zip zap ahoy!",
        "right answer",
        "unichar chat runs/pip",
    ):
        assert part in text


def test_texts_stay_texts(page):
    assert "b" not in page.tags
    assert "Which food is <b>best</b>?" in page.text
    evil = Report(
        '<script>alert("x")</script>',
        "a & b",
        references=(Picture(Image.new("RGB", (4, 4)), '"><img src=x>'),),
    )
    shown = Page(render(evil))
    assert "script" not in shown.tags
    assert shown.tags.count("img") == 1
    assert any("a & b" in t for t in shown.text)


def test_marks_what_was_a_reward_and_what_is_missing(page):
    text = " ".join(page.text)
    assert text.count("†") == 3  # two metrics of one model, and the note
    assert "Not measured: judged" in text
    assert "77.0 %" in text  # quoted from the paper
    assert "not measured here" in text


def test_sections_without_content_are_left_out():
    shown = Page(render(Report("Title", "Summary")))
    assert "section" not in shown.tags
    assert "Summary" in shown.text


def test_pictures_are_kept_or_shrunk(tmp_path):
    small = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    large = Image.new("RGB", (1024, 600), (10, 120, 200))
    small.save(tmp_path / "small.png")
    sources = [Picture(tmp_path / "small.png"), Picture(large)]
    raw = render(Report("t", "s", references=tuple(sources)))
    kinds, opened = [], []
    for kind, data in re.findall(r"data:image/(\w+);base64,([^\"]+)", raw):
        kinds.append(kind)
        opened.append(Image.open(io.BytesIO(base64.b64decode(data))))
    assert kinds == ["png", "jpeg"]
    np.testing.assert_array_equal(np.asarray(opened[0]), np.asarray(small))
    assert opened[1].size == (512, 300)
    assert large.size == (1024, 600)  # the caller's picture is untouched


def test_written_whole_or_not_at_all(tmp_path):
    path = write_report(Report("One", "s"), tmp_path / "deep" / "report.html")
    before = path.read_text()
    with pytest.raises(UserError, match="absent"):
        write_report(Report("Two", "s", references=(Picture(tmp_path / "absent" / "x.png"),)), path)
    assert path.read_text() == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_comparison_from_results(tmp_path):
    def drawn(label, shade):
        records = []
        for item in range(4):
            for seed in (1, 0):
                path = tmp_path / f"{label}-{item}-{seed}.png"
                Image.new("RGB", (8, 8), (shade + item, seed, 0)).save(path)
                records.append(Record("t2i", "Pip", f"i{item}", seed, {}, f"prompt {item}", "", str(path)))
        return Results(label, label, tuple(records))

    found = compare([drawn("base", 10), drawn("SFT", 20)], prompts=2, notes=("name only",))
    assert found.prompts == ("prompt 0", "prompt 2")
    assert [c.label for c in found.columns] == ["base", "SFT"]
    assert found.columns[0].note == "name only"
    shades = [[Image.open(p.image).getpixel((0, 0)) for p in row] for row in found.columns[1].pictures]
    assert shades == [[(20, 0, 0), (20, 1, 0)], [(22, 0, 0), (22, 1, 0)]]
    with pytest.raises(ValueError, match="rows"):
        Comparison(("a", "b"), (Column("x", ((),)),))


def test_curves_from_a_run(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text(
        "".join(json.dumps({"step": i, "loss": 1 / i, "ce": 2.0}) + "\n" for i in range(1, 9)) + '{"st'
    )
    made = curves(log, ["loss", "ce|loss", "absent"], {"loss": "training loss"})
    assert [c.title for c in made] == ["training loss", "ce, loss"]
    assert made[0].series[0].x == tuple(map(float, range(1, 9)))
    assert [s.name for s in made[1].series] == ["ce", "loss"]
    assert curves(tmp_path / "none.jsonl", ["loss"]) == ()


# -- charts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.13, 0.98, [0.2, 0.4, 0.6, 0.8]),
        (-1, 1, [-1, -0.5, 0, 0.5, 1]),
        (1, 150, [50, 100, 150]),
        (3, 3, [3]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_smoothing_keeps_lines_and_length():
    straight = np.linspace(0, 1, 200)
    np.testing.assert_allclose(charts.smooth(straight)[10:-10], straight[10:-10])
    assert len(charts.smooth(straight)) == 200
    assert list(charts.smooth(np.array([1.0, 2.0]))) == [1, 2]
    noise = np.random.default_rng(0).normal(size=400)
    assert charts.smooth(noise).std() < 0.4


def test_a_chart_puts_points_where_they_belong():
    flat = charts.Chart("c", (charts.Series("s", (0.0, 1.0, 2.0), (0.0, float("nan"), 4.0)),))
    drawn = charts.line_chart(flat)
    (path,) = re.findall(r'class="smooth s0" d="M([^"]+)"', drawn)
    (x0, y0), (x1, y1) = (tuple(map(float, p.split())) for p in path.split("L"))
    assert x0 == 52
    assert x1 == 640 - 12
    assert y0 > y1  # larger is higher up
    thousand = tuple(map(float, range(1000)))
    long = charts.line_chart(charts.Chart("c", (charts.Series("s", thousand, thousand),)))
    (path,) = re.findall(r'class="smooth s0" d="([^"]+)"', long)
    assert 300 < path.count("L") < charts.MAX_POINTS
    assert "No points" in charts.line_chart(charts.Chart("c", (charts.Series("s", (), ()),)))


def test_a_table_of_one_model_has_no_change():
    shown = Page(render(Report("t", "s", measurements=(Measurements((results("only", 0.5, 1),)),))))
    assert not any("change" in t for t in shown.text)


def test_a_role_play_becomes_a_conversation():
    drawn = Image.new("RGB", (8, 8))
    persona = Persona("Pip", "A fox.", "Ahoy!")
    turns = [Turn("Hi", "Arr!", 0), Turn("Wave!", "I be waving.", 1, drawn, 1)]
    found = conversation(SimpleNamespace(persona=persona, turns=turns))
    assert (found.name, found.opening) == ("Pip", "Ahoy!")
    assert [(t.user, t.reply, t.picture and t.picture.image) for t in found.turns] == [
        ("Hi", "Arr!", None),
        ("Wave!", "I be waving.", drawn),
    ]


def test_a_conversation_may_only_open():
    talk = Conversation("Pip", (), "Ahoy!")
    assert "Ahoy!" in Page(render(Report("t", "s", conversation=talk))).text
    both = Conversation("Pip", (Exchange("Hi", "Arr!"),))
    assert (
        Page(render(Report("t", "s", conversation=both, commands=(Command("ls", "Look:"),)))).tags.count(
            "pre"
        )
        == 1
    )
