"""One door for pictures: every kind of file, through every way in, gives the same pixels or the same refusal."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unichar_jax
from tests.data.odd_pictures import odd_pictures
from unichar_jax.app.annotate import annotation, review
from unichar_jax.app.sheet import _fit
from unichar_jax.app.web.pictures import read_upload
from unichar_jax.app.web.settings import Refused
from unichar_jax.config.model import model_preset
from unichar_jax.data.cache import ImageCache
from unichar_jax.data.images import ImageTransform, image_header, open_image, patchify
from unichar_jax.data.new_character import new_character, summary
from unichar_jax.data.rolescape import read_character
from unichar_jax.errors import UserError
from unichar_jax.evaluation import endpoint, pictures
from unichar_jax.sampling.parts import PartMaker, open_picture
from unichar_jax.sampling.session import Persona, RolePlay
from unichar_jax.training.grpo.run import read_references

LOOK = ImageTransform(stride=14, min_size=28, max_size=56)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return odd_pictures(tmp_path_factory.mktemp("odd"))


# -- the doors: each takes a file and a folder to work in, and returns (seen, what the picture became there) --


def as_it_is(seen):
    return seen


def small(seen):
    return np.asarray(Image.fromarray(seen).resize((16, 16)), np.float32) / 255


def patches(seen):
    return patchify(LOOK(Image.fromarray(seen)), 14)


def direct(path, work):
    return np.asarray(open_image(path))


def twice(path, work):
    return np.asarray(open_image(open_image(path)))


def opened_by_the_caller(path, work):
    with Image.open(path) as image:  # engine.answer(Image.open(...), ...)
        return np.asarray(open_picture(image))


def asked_about(path, work):
    """`ask` and the visual-question reward: what the tower gets."""
    transforms = types.SimpleNamespace(look=LOOK, draw=LOOK)
    return PartMaker(model_preset("debug"), None, None, transforms).look(path).tokens


def talked_about(path, work):
    """`chat --image`."""
    return np.asarray(RolePlay(None, Persona("Nova", ""), reference_image=path).reference_image)


def in_a_folder(path, work):
    """A training folder, where a picture is always called <id>.png."""
    folder = work / "train" / "Nova"
    folder.mkdir(parents=True)
    shutil.copy(path, folder / "0.png")
    (folder / "annotation.json").write_text('{"description": "Nova.", "scenes": []}', encoding="utf-8")
    (image,) = read_character(folder).images
    return image


def trained_on(path, work):
    image = in_a_folder(path, work)
    prepared = ImageCache(work / "cache").patches(image, LOOK)
    assert len(prepared) == LOOK.tokens(image.width, image.height)  # what the planner counted
    return prepared


def started_from(path, work):
    """`data new`."""
    (work / "images").mkdir()
    shutil.copy(path, work / "images" / ("a.png" if path.suffix in (".gif", ".tif") else path.name))
    new = new_character("Nova", work / "images", out=work / "out")
    made = Image.open(new.folder / "0.png").convert("RGBA")
    white = Image.new("RGB", made.size, "white")
    white.paste(made, mask=made.getchannel("A"))
    return np.asarray(white)


def referred_to(path, work):
    folder = work / "references"
    folder.mkdir()
    shutil.copy(path, folder / "0.png")
    return read_references(folder).pictures[0]


def measured(path, work):
    return pictures._open(path)


def judged(path, work):
    """The picture as another server is shown it."""
    data = base64.b64decode(endpoint._data_url(path).partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)))


def glanced_at(path, work):
    """`data annotate`, when it looks for near copies."""
    return annotation._look(in_a_folder(path, work))


def reviewed(path, work):
    """The size on the review page (its JPEG has other pixels)."""
    told = review._figure(in_a_folder(path, work), False)
    data = base64.b64decode(told.partition("base64,")[2].partition('"')[0])
    return np.asarray(Image.open(io.BytesIO(data))).shape


def sent(path, work):
    """An upload to the page; small pictures stay as they are."""
    shown = read_upload(path.read_bytes(), 16_000_000)
    assert shown.mime == "image/png"
    return np.asarray(shown.image())


def on_a_sheet(path, work):
    with_side = _fit(path, 128)
    return np.asarray(with_side) if max(Image.open(path).size) == 128 else np.asarray(open_image(path))


DOORS = [
    (direct, as_it_is),
    (twice, as_it_is),
    (opened_by_the_caller, as_it_is),
    (asked_about, patches),
    (talked_about, as_it_is),
    (trained_on, patches),
    (started_from, as_it_is),
    (referred_to, as_it_is),
    (measured, as_it_is),
    (judged, as_it_is),
    (glanced_at, small),
    (reviewed, np.shape),
    (sent, as_it_is),
    (on_a_sheet, as_it_is),
]


@pytest.mark.parametrize(("door", "wanted"), DOORS, ids=[door.__name__ for door, _ in DOORS])
def test_every_kind_of_picture_through_every_door(made, tmp_path, door, wanted):
    wrong = {}
    for kind, (path, seen) in made.items():
        if isinstance(seen, str) and door in (opened_by_the_caller, on_a_sheet):
            continue  # PIL itself refuses some, and reads some
        work = tmp_path / kind
        work.mkdir()
        try:
            got = door(path, work)
        except (UserError, Refused) as error:
            if not isinstance(seen, str):
                wrong[kind] = str(error)
            elif seen not in str(error) and not (isinstance(error, Refused) and error.status in (413, 415)):
                wrong[kind] = f"refused without {seen!r}: {error}"
            continue
        if isinstance(seen, str):
            wrong[kind] = f"not refused: {seen}"
        elif not np.array_equal(got, wanted(seen)):
            wrong[kind] = "other pixels"
    assert wrong == {}


def test_the_set_has_the_right_values(made):
    """What the expectations themselves must say."""
    grey, turned = made["grey16"][1], made["exif6_jpeg"][1]
    assert 127 <= grey.mean() <= 128 and grey[0, 0, 0] == 0 and grey[0, -1, 0] == 255
    assert turned.shape == (128, 96, 3)
    assert turned[5, -6, 2] < 90 < 200 < turned[5, -6, 0]  # yellow, top right
    header = image_header(made["exif6_jpeg"][0])
    assert (header.width, header.height, header.orientation) == (96, 128, 6)


@pytest.mark.parametrize("kind", ["anim_webp", "anim_png"])
def test_the_first_frame_is_told(made, tmp_path, kind):
    path, _ = made[kind]
    image = in_a_folder(path, tmp_path)
    (told,) = (n for n in read_character(image.path.parent).notes if "frames" in n.got)
    assert (told.file, told.got, told.remedy) == ("0.png", "3 frames", "the first is used")
    (tmp_path / "images").mkdir()
    shutil.copy(path, tmp_path / "images")
    new = new_character("Nova", tmp_path / "images", out=tmp_path / "out")
    assert f"note: {path.name}: expected one still picture, got 3 frames" in summary(new)


@pytest.mark.parametrize(
    ("size", "drawn"),
    [((8, 8), "512x512"), ((31, 200), "160x1024"), ((40, 400), "96x1024"), ((9, 4000), "16x1024")],
)
def test_small_and_thin_pictures_are_told_with_what_will_be_drawn(tmp_path, size, drawn):
    Image.new("RGB", size, (9, 99, 9)).save(tmp_path / "a.png")
    image = in_a_folder(tmp_path / "a.png", tmp_path)
    (told,) = (n for n in read_character(image.path.parent).notes if "pixels" in n.got)
    assert told.got == f"{size[0]}x{size[1]} pixels" and told.remedy.endswith(f"at {drawn}")


def test_usual_pictures_have_no_note(tmp_path):
    for size in ((32, 32), (96, 96), (240, 238), (452, 1685)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert image_header(tmp_path / "a.png").notes == ()


def test_prepared_pictures_are_kept_apart_where_pixels_changed(made, tmp_path):
    """A cache made before pictures were turned must not be taken for the turned ones; others must."""
    names = {}
    for kind in ("exif2_png", "exif3_png", "exif6_png", "upper"):
        image = in_a_folder(made[kind][0], tmp_path / kind)
        cache = ImageCache(tmp_path / "cache")
        digest = hashlib.sha256(image.path.read_bytes()).hexdigest()
        names[kind] = cache.content(image)
        assert (names[kind] == digest) == (kind == "upper")
    assert len(set(names.values())) == 4


def test_heic_is_read_where_the_plugin_is(made, tmp_path, monkeypatch):
    """A stand-in for pillow_heif: it registers a reader of its format, as the real one does."""
    path, _ = made["heic"]
    (tmp_path / "images").mkdir()
    shutil.copy(path, tmp_path / "images" / "IMG_1.HEIC")
    shutil.copy(made["upper"][0], tmp_path / "images" / "b.png")
    new = new_character("Nova", tmp_path / "images", out=tmp_path / "without")
    assert new.unread == ("IMG_1.HEIC",)
    assert "save them as PNG or JPEG, or: pip install pillow-heif and start again" in summary(new)

    def register():
        def opened(file, name=None):
            image = Image.new("RGB", (40, 30), (1, 2, 3))
            image.format = "HEIF"
            return image

        Image.register_open("HEIF", opened, lambda head: head[4:8] == b"ftyp")

    monkeypatch.setitem(sys.modules, "pillow_heif", types.SimpleNamespace(register_heif_opener=register))
    for table in ("OPEN", "ID"):
        monkeypatch.setattr(Image, table, getattr(Image, table).copy())
    new = new_character("Nova", tmp_path / "images", out=tmp_path / "with")
    assert new.unread == () and open_image(new.folder / "1.png").getpixel((0, 0)) == (1, 2, 3)


def test_names_that_are_no_picture_of_ours_are_told(made, tmp_path):
    shutil.copy(made["gif"][0], tmp_path / "a.gif")
    with pytest.raises(UserError, match=r"no picture found.*Not read: a\.gif; save it as PNG"):
        new_character("Nova", tmp_path, out=tmp_path / "out")


def test_pictures_are_opened_in_one_place():
    """No other file of the package opens a picture or turns one."""
    root = Path(unichar_jax.__file__).parent
    found = set()
    for path in root.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and (
                (node.attr == "open" and isinstance(node.value, ast.Name) and node.value.id == "Image")
                or node.attr == "exif_transpose"
            ):
                found.add(path.relative_to(root).as_posix())
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("PIL"):
                assert not {alias.name for alias in node.names} & {"open", "exif_transpose"}, path
    assert found == {"data/images.py"}
