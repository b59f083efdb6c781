"""The picture cache: right values, computed once, safe against damage and several processes."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unichar_jax.data.cache import GeneratedImage, ImageCache, identify
from unichar_jax.data.character import ImageFile
from unichar_jax.data.images import ImageError, ImageTransform, open_image, patchify

LOOK = ImageTransform(stride=14, min_size=28, max_size=56)
DRAW = ImageTransform(stride=16, min_size=32, max_size=64)


class Encoder:
    """Stands for an autoencoder: latent tokens are patch means; counts what it is given."""

    def __init__(self, scale: float = 1.0):
        self.scale, self.shapes = scale, []

    def __call__(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        self.shapes.append(images.shape)
        tokens = np.stack([patchify(image, 16) for image in images])[..., :4] * self.scale
        return tokens, tokens - 1


def picture(folder: Path, name: str, seed: int = 0, size: tuple[int, int] = (50, 40)) -> ImageFile:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / f"{name}.png")
    return ImageFile(name, folder / f"{name}.png", *size, "PNG", "RGB")


def test_values_are_those_of_the_transform(tmp_path):
    image = picture(tmp_path, "a")
    opened = open_image("a.png", tmp_path)
    encoder = Encoder()
    cache = ImageCache(tmp_path / "cache", encoder, "x")
    for _ in range(2):  # computed, then read
        np.testing.assert_array_equal(cache.patches(image, LOOK), patchify(LOOK(opened), 14))
        mean, logvar = cache.moments(image, DRAW)
        expected = encoder(DRAW(opened)[None])
        np.testing.assert_array_equal(mean, expected[0][0])
        np.testing.assert_array_equal(logvar, expected[1][0])
    assert len(encoder.shapes) == 3  # one computation, and one expectation in each turn


@pytest.mark.parametrize("on_disk", [True, False])
def test_each_content_size_and_encoder_is_computed_once(tmp_path, on_disk):
    first, same, other = picture(tmp_path, "a"), picture(tmp_path, "b"), picture(tmp_path, "c", 1)
    larger = picture(tmp_path, "d", 2, (80, 70))
    folder = tmp_path / "cache" if on_disk else None
    encoder = Encoder()
    cache = ImageCache(folder, encoder, identify(encoder, 64))
    encoder.shapes.clear()
    jobs = [(p, DRAW, 1) for p in (first, same, other, larger, first)]
    assert cache.warm(jobs) == 3
    assert encoder.shapes == [(2, 32, 48, 3), (1, 64, 64, 3)]
    assert cache.warm(jobs) == 0
    if on_disk:
        assert ImageCache(folder, encoder, identify(encoder, 64)).warm(jobs) == 0
        assert ImageCache(folder, Encoder(2.0), identify(Encoder(2.0), 64)).warm(jobs) == 3


def test_a_short_last_group_is_filled_up(tmp_path):
    encoder = Encoder()
    cache = ImageCache(tmp_path / "cache", encoder, "x")
    pictures = [picture(tmp_path, f"p{i}", i) for i in range(5)]
    cache.warm([(p, DRAW, 1) for p in pictures], pixels=2 * 32 * 48)
    assert encoder.shapes == [(2, 32, 48, 3)] * 3
    alone = ImageCache(None, encoder, "x")
    for p in pictures:
        np.testing.assert_array_equal(cache.moments(p, DRAW)[0], alone.moments(p, DRAW)[0])


def test_a_damaged_file_is_computed_again(tmp_path):
    image = picture(tmp_path, "a")
    cache = ImageCache(tmp_path / "cache", Encoder(), "x")
    expected = np.array(cache.moments(image, DRAW)[0])
    (file,) = (tmp_path / "cache").rglob("*.npy")
    whole = file.read_bytes()
    for damage in (whole[:-7], b"", b"not an array", whole[:60]):
        file.write_bytes(damage)
        again = ImageCache(tmp_path / "cache", Encoder(), "x")
        np.testing.assert_array_equal(again.moments(image, DRAW)[0], expected)
        assert file.read_bytes() == whole


def test_a_bad_picture_leaves_nothing_behind(tmp_path):
    image = picture(tmp_path, "a")
    image.path.write_bytes(image.path.read_bytes()[:200])
    cache = ImageCache(tmp_path / "cache", Encoder(), "x")
    for use in (lambda: cache.patches(image, LOOK), lambda: cache.warm([(image, DRAW, 1)])):
        with pytest.raises(ImageError, match="truncated"):
            use()
    assert not list((tmp_path / "cache").rglob("*.npy"))


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    image = picture(tmp_path, "a")
    cache = ImageCache(tmp_path / "cache", Encoder(), "x")
    monkeypatch.setattr(np, "save", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cache.patches(image, LOOK)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_workers_copy_reads_and_cannot_encode(tmp_path):
    image, other = picture(tmp_path, "a"), picture(tmp_path, "b", 1)
    cache = ImageCache(tmp_path / "cache", Encoder(), "x")
    expected = cache.moments(image, DRAW)[0]
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy.moments(image, DRAW)[0], expected)
    with pytest.raises(LookupError, match=r"b\.png are not in the cache"):
        copy.moments(other, DRAW)
    in_memory = ImageCache(None, Encoder(), "x")
    in_memory.moments(image, DRAW)
    sent = pickle.loads(pickle.dumps(in_memory))
    np.testing.assert_array_equal(sent.moments(image, DRAW)[0], expected)


def _patches_of(folder: Path, name: str, turn: int) -> bytes:
    image = ImageFile(name, folder / f"{name}.png", 50, 40, "PNG", "RGB")
    return ImageCache(folder / "cache").patches(image, LOOK).tobytes()


def test_several_processes_share_a_folder(tmp_path):
    names = [f"p{i}" for i in range(3)]
    for i, name in enumerate(names):
        picture(tmp_path, name, i)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        jobs = [(n, pool.submit(_patches_of, tmp_path, n, t)) for t in range(4) for n in names]
        results = {(n, job.result()) for n, job in jobs}
    assert len(results) == 3  # every process got the same bytes
    files = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(files) == 3
    assert all(f.suffix == ".npy" for f in files)


def test_generated_pictures_are_kept_only_under_a_key(tmp_path):
    drawn = []

    def render() -> np.ndarray:
        drawn.append(1)
        return np.full((40, 50, 3), 128, np.uint8)

    cache = ImageCache(tmp_path / "cache")
    for key, times in (("", 2), ("world 7", 3)):
        for _ in range(2):
            patches = cache.patches(GeneratedImage(50, 40, render, key), LOOK)
        assert len(drawn) == times
    np.testing.assert_allclose(patches, 128 / 127.5 - 1, atol=1e-6)
