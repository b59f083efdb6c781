"""Sizes and pixels of the reference, and pictures that must be refused."""

import os
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from unichar_jax.data import images
from unichar_jax.data.images import ImageError, ImageTransform, UnsafePathError
from unichar_jax.errors import UserError

GOLDEN_T2I = {
    (240, 240): (512, 512),
    (452, 803): (512, 912),
    (436, 600): (512, 704),
    (464, 378): (624, 512),
    (1685, 1685): (1024, 1024),
}
GOLDEN_VIT = {
    (240, 240): (378, 378),
    (452, 803): (448, 798),
    (436, 600): (434, 602),
    (1685, 1685): (980, 980),
}


@pytest.mark.parametrize(("size", "expected"), GOLDEN_T2I.items())
def test_golden_sizes_for_drawing(size, expected):
    assert images.T2I_TRANSFORM.size(*size) == expected


@pytest.mark.parametrize(("size", "expected"), GOLDEN_VIT.items())
def test_golden_sizes_for_looking(size, expected):
    assert images.VIT_TRANSFORM.size(*size) == expected


@given(st.integers(1, 4000), st.integers(1, 4000))
def test_sides_are_multiples_of_the_stride_and_bounded(width, height):
    for transform in (images.T2I_TRANSFORM, images.VIT_TRANSFORM):
        size = transform.size(width, height)
        assert all(side >= transform.stride and side % transform.stride == 0 for side in size)
        assert max(size) <= transform.max_size


def test_the_pixel_budget_scales_by_its_area_ratio():
    # 1024 * 1024 pixels against 262,144 for each of four images: the ratio 1/4 scales both sides.
    assert images.resize_rule(1024, 1024, 16, 512, 1024, 4 * 262_144, img_num=4) == (256, 256)


def test_pixels_equal_pil_bicubic():
    rng = np.random.default_rng(0)
    source = Image.fromarray(rng.integers(0, 256, (300, 240, 3), dtype=np.uint8))
    got = images.VIT_TRANSFORM(source)
    size = images.VIT_TRANSFORM.size(240, 300)
    resized = np.asarray(source.resize(size, Image.Resampling.BICUBIC))
    assert got.shape == (size[1], size[0], 3) and got.dtype == np.float32
    np.testing.assert_allclose((got + 1) * 127.5, resized, atol=1e-4)
    assert got.min() >= -1 and got.max() <= 1


def test_transparency_becomes_white():
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 0))
    image.putpixel((1, 0), (200, 0, 0, 255))
    assert [images.to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255,) * 3, (200, 0, 0)]
    palette = Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert images.to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_of_grey_are_scaled_not_clipped(tmp_path):
    levels = np.array([[0, 0x4000, 0x80FF, 0xFFFF]], np.uint16)
    Image.fromarray(levels.repeat(8, 0).repeat(8, 1)).save(tmp_path / "deep.png")
    grey = np.asarray(images.to_rgb(images.open_image("deep.png", tmp_path)))[::8, ::8]
    np.testing.assert_array_equal(grey[..., 0], [[0, 0x40, 0x80, 0xFF]])
    assert grey.shape == (1, 4, 3)


def test_square_transform_cuts_the_centre():
    image = Image.new("RGB", (300, 100), (0, 0, 0))
    image.paste((255, 255, 255), (100, 0, 200, 100))
    pixels = images.MINI_T2I_TRANSFORM(image)
    assert pixels.shape == (96, 96, 3) and pixels.min() == 1.0
    assert images.MINI_VIT_TRANSFORM.tokens(300, 100) == 25


def test_transform_names_its_faulty_field():
    with pytest.raises(UserError, match="min_size 1024 exceeds max_size 512"):
        ImageTransform(16, 1024, 512)
    with pytest.raises(UserError, match="multiple of stride 16"):
        ImageTransform(16, 100, 512)


def test_patches_run_row_by_row_channel_fastest():
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    tokens = images.patchify(pixels, patch=2)
    assert tokens.shape == (6, 12)
    np.testing.assert_array_equal(tokens[0], pixels[:2, :2].reshape(-1))
    np.testing.assert_array_equal(tokens[4], pixels[2:4, 2:4].reshape(-1))
    assert images.patchify(np.zeros((28, 42, 3))).shape == (6, 588)


def test_position_ids():
    assert images.position_ids(2, 3, 70).tolist() == [0, 1, 2, 70, 71, 72]
    with pytest.raises(ValueError, match="does not fit"):
        images.position_ids(71, 1, 70)


# -- pictures that must be refused ---------------------------------------------------------------


def _bomb(path, side=60_000):
    """A valid tiny PNG file that declares side x side pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "nul\0.png"])
def test_paths_that_leave_the_folder(tmp_path, name):
    (tmp_path / "secret.png").write_bytes(b"x")
    root = tmp_path / "root"
    root.mkdir()
    with pytest.raises(UnsafePathError):
        images.open_image(name, root)
    with pytest.raises(UnsafePathError, match="absolute"):
        images.open_image(str(tmp_path / "secret.png"), root)
    os.symlink(tmp_path / "secret.png", root / "0.png")
    with pytest.raises(UnsafePathError, match="symbolic link"):
        images.open_image("0.png", root)
    os.symlink("loop.png", root / "loop.png")
    with pytest.raises(ImageError):
        images.open_image("loop.png", root)


def test_each_bad_picture_has_its_own_message(tmp_path):
    Image.new("RGB", (64, 64), (1, 2, 3)).save(tmp_path / "whole.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "whole.png").read_bytes()[:-30])
    (tmp_path / "text.png").write_text("not a picture")
    (tmp_path / "folder.png").mkdir()
    _bomb(tmp_path / "bomb.png")
    _bomb(tmp_path / "small_bomb.png", side=8_000)
    os.mkfifo(tmp_path / "pipe.png")
    for name, message in {
        "truncated.png": "truncated or corrupt",
        "text.png": "not a readable image",
        "folder.png": "not a regular file",
        "pipe.png": "not a regular file",
        "bomb.png": "decompression bomb",
        "small_bomb.png": "8000x8000 pixels",
        "absent.png": "absent",
    }.items():
        with pytest.raises(ImageError, match=message):
            images.open_image(name, tmp_path)


@given(st.binary(max_size=200), st.integers(0, 150))
def test_hostile_bytes_never_escape_as_another_error(tmp_path_factory, noise, cut):
    folder = tmp_path_factory.getbasetemp()
    path = folder / "fuzz.png"
    Image.new("RGB", (9, 9)).save(path)
    path.write_bytes(path.read_bytes()[:cut] + noise)
    try:
        images.open_image("fuzz.png", folder)
    except ImageError:
        pass
