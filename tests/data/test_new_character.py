"""A new character is written whole, reads back, says what it lacks, and leaves no debris."""

import json

import pytest
from PIL import Image

from unichar_jax.data.check import check
from unichar_jax.data.new_character import describe, new_character, read_dialogues, summary
from unichar_jax.data.rl_prompts import read_rl_prompts
from unichar_jax.data.rolescape import read_character
from unichar_jax.data.tasks import TASKS, TEST_SETS, samples
from unichar_jax.errors import UserError

DIALOGUE = """\
Opening: The shop bell rings.

Image: wave.jpg
User: Good morning!
Nova: Morning.
Mind the wet paint.

User: Do you sell maps: big ones?
nova: Only of places that hold still.
"""

PROFILE = """\
# Nova
Nova keeps a shop of *maps*. She is dry and kind.

- **Height:** 160 cm
Home town: Lyra
"""


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("10.png", "2.png"):
        Image.new("RGBA", (20, 10), (int(name[0]) * 50, 0, 0, 120)).save(folder / name)
    turned = Image.new("RGB", (30, 10), (0, 0, 200))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(folder / "wave.jpg", exif=exif)
    (folder / "2.txt").write_text("Nova, from afar\n")
    (tmp_path / "dialogue.txt").write_text(DIALOGUE)
    (tmp_path / "profile.md").write_text(PROFILE)
    return folder


def _new(source, out, **more):
    base = source.parent
    files = {"profile": base / "profile.md", "dialogues": base / "dialogue.txt"} | more
    return new_character("Nova", source, out=out, **files)


def test_everything_that_follows_is_written(source, tmp_path):
    out = tmp_path / "data"
    new = _new(source, out)
    nova = read_character(new.folder)
    assert (nova.name, nova.split, nova.opening) == ("Nova", "train", "The shop bell rings.")
    assert nova.description.startswith("Nova keeps a shop of maps. She is dry and kind.")
    (scene,) = nova.scenes
    assert scene.reply == "Morning.\nMind the wet paint."
    assert scene.image.id == "0" and (scene.image.width, scene.image.height) == (10, 30)
    assert not Image.open(scene.image.path).getexif()
    assert [caption.text for caption in nova.captions] == [
        "A picture of Nova",
        "Nova, from afar",
        "A picture of Nova",
    ]
    assert [spoken.user for spoken in nova.extension_train] == [
        "Do you sell maps: big ones?",
        "Good morning!",
    ]
    assert [(q.question, q.answer) for q in nova.knowledge_qa] == [
        ("What is Nova's height?", "160 cm"),
        ("What is Nova's home town?", "Lyra"),
    ]
    assert new.counts == {task: n for task in TASKS if (n := len(samples(nova, task)))}
    assert set(new.counts) | set(new.missing) == {*TASKS, *(f"test {name}" for name in TEST_SETS)}
    assert "vqa: 'qa_pairs' for each scene in Nova_with_image.json" in summary(new)
    assert new.placeholders == ("2 captions: write <picture>.txt beside each picture",)
    report = check(out)
    assert report.ok and len(report.folders) == 2
    assert all(p.questions and "Nova" in p.text for p in read_rl_prompts(new.prompts))
    assert sorted(path.name for path in out.iterdir()) == ["personalized_data", "personalized_t2i"]


def test_pictures_alone_are_enough(source, tmp_path):
    new = new_character("Friends-Nova", source, out=tmp_path / "data")
    nova = read_character(new.folder)
    assert nova.name == "Friends-Nova" and len(nova.captions) == 3
    assert set(new.counts) == {"pure_t2i"} and len(new.placeholders) == 2


def test_json_dialogues_read_as_the_text_does(source, tmp_path):
    opening, exchanges = read_dialogues(tmp_path / "dialogue.txt", "Nova")
    rows = [{"user": e.user, "reply": e.reply, "image": e.image} for e in exchanges]
    path = tmp_path / "dialogue.json"
    path.write_text(json.dumps({"opening": opening, "dialogues": rows}))
    assert read_dialogues(path, "Nova") == (opening, exchanges)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("User: hi\n", "exchange 1: Nova: expected a line 'Nova: ...'"),
        ("User: hi\nNova: ho\nUser: again\nNova: yes\n", "empty line between exchanges"),
        ("Vega: hi\nNova: ho\n", "add the speaker"),
        ("Image: absent.png\nUser: a\nNova: b\n", "'absent.png', which is not in"),
        ("Image: 2.png\nUser: a\nNova: b\n\nImage: 2.png\nUser: c\nNova: d\n", "more than one"),
        ("Image: ../profile.md\nUser: a\nNova: b\n", "which is not in"),
    ],
)
def test_faulty_dialogues_leave_nothing_behind(source, tmp_path, text, message):
    path = tmp_path / "faulty.txt"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        _new(source, tmp_path / "data", dialogues=path)
    assert not list(tmp_path.glob("data/**/*"))


def test_faulty_pictures_leave_nothing_behind(source, tmp_path):
    (source / "2.png").write_text("no picture")
    (source / "link.png").symlink_to(tmp_path / "profile.md")
    with pytest.raises(UserError, match=r"(?s)2\.png.*link\.png"):
        _new(source, tmp_path / "data")
    assert not list(tmp_path.glob("data/*"))


def test_pictures_of_other_formats_are_named(source, tmp_path):
    (source / "IMG_1.HEIC").write_bytes(b"heic")
    new = _new(source, tmp_path / "data")
    assert new.unread == ("IMG_1.HEIC",)
    assert "Left out: IMG_1.HEIC; save them as PNG or JPEG" in summary(new)


def test_an_existing_character_is_not_touched(source, tmp_path):
    new = _new(source, tmp_path / "data")
    before = {p: p.read_bytes() for p in new.folder.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        _new(source, tmp_path / "data")
    assert before == {p: p.read_bytes() for p in new.folder.iterdir()}


@pytest.mark.parametrize("name", ["", "../Nova", "a/b", ".hidden", "Nova ", "n\0", "User", "x" * 65])
def test_names_that_cannot_be_folders(source, tmp_path, name):
    with pytest.raises(UserError, match="name"):
        new_character(name, source, out=tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_descriptions_end_with_a_sentence():
    long = "Nova sells maps. " * 60
    assert describe(long).endswith("maps.") and len(describe(long)) <= 600
    assert describe("") == ""
