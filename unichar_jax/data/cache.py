"""Prepared pictures, computed once: resized patches for looking, autoencoder moments for drawing.

Twelve pictures feed thousands of steps, so decoding, resizing and encoding happen once per picture
content, size and autoencoder, and the results lie on disk (or in memory). What is random stays
outside: the posterior is sampled at every step, on the device, from the mean and log-variance kept here.

Files are written to a temporary name and renamed, so any number of processes may share a folder; a
damaged file is computed again. Encoding needs a device and happens only in ``warm`` and in the process
that holds the encoder; a copy of the cache sent to a worker can only read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from unichar_jax.data.character import ImageFile
from unichar_jax.data.images import ImageTransform, content_of, open_image, patchify
from unichar_jax.files import digest, replacing

MomentsFn = Callable[[np.ndarray], tuple[Any, Any]]
"""Images float32 ``[B, H, W, 3]`` in [-1, 1] to the posterior's mean and log-variance in latent
tokens, each ``[B, N, latent_dim]``, unscaled."""


def identify(moments: MomentsFn, side: int) -> str:
    """A name for an encoder, made from what it says of one noise picture of ``side`` pixels.

    Two encoders with other weights have other names; nobody has to keep the names apart.
    """
    noise = np.random.default_rng(0).uniform(-1, 1, (1, side, side, 3)).astype(np.float32)
    said = b"".join(np.asarray(x, np.float16).tobytes() for x in moments(noise))
    return digest(said)[:16]


@dataclass(frozen=True)
class GeneratedImage:
    """A picture that a function draws.

    Attributes:
      width, height: in pixels.
      render: draws it, uint8 ``[height, width, 3]``.
      key: what tells it from all others; empty if it is not worth keeping.
    """

    width: int
    height: int
    render: Callable[[], np.ndarray]
    key: str = ""


Picture = ImageFile | GeneratedImage


class ImageCache:
    """Prepared pictures by content, size and encoder.

    Args:
      folder: where they are kept; None for this process's memory.
      encoder: computes moments; without one, only cached moments can be had.
      identity: of the encoder, from ``identify``.
    """

    def __init__(self, folder: Path | None, encoder: MomentsFn | None = None, identity: str = ""):
        self.folder, self.encoder = folder, encoder
        self._identity = identity
        self._contents: dict[Path, str] = {}
        self._memory: dict[str, np.ndarray] = {}

    def __getstate__(self) -> dict[str, Any]:
        # memory maps are opened again by the worker; without a folder, memory is all there is
        kept = self._memory if self.folder is None else {}
        return self.__dict__ | {"encoder": None, "_memory": kept}

    def patches(self, picture: Picture, transform: ImageTransform, img_num: int = 1) -> np.ndarray:
        """Patches of a picture to look at, float32 ``[N, stride * stride * 3]`` in [-1, 1]."""
        name = self._name("patches", picture, transform, img_num)

        def compute() -> np.ndarray:
            return patchify(self._resized(picture, transform, img_num), transform.stride)

        levels = self._get(name, transform.tokens(picture.width, picture.height, img_num), compute)
        return _LEVELS[levels]

    def moments(
        self, picture: Picture, transform: ImageTransform, img_num: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """Posterior mean and log-variance in latent patches, each float32 ``[N, latent_dim]``.

        Raises:
          LookupError: they are not in the cache and there is no encoder here.
        """
        name = self._name(f"moments-{self._identity}", picture, transform, img_num)

        def compute() -> np.ndarray:
            if self.encoder is None:
                raise LookupError(
                    f"moments of {_label(picture)} are not in the cache, and this process has no"
                    " autoencoder; call ImageCache.warm before starting workers"
                )
            return self._encode([(picture, transform, img_num)])[0]

        tokens = transform.tokens(picture.width, picture.height, img_num)
        both = self._get(name, tokens, compute, axis=1)
        return both[0], both[1]

    def warm(self, wanted: Iterable[tuple[Picture, ImageTransform, int]], pixels: int = 2**20) -> int:
        """Encodes what is missing, pictures of one size together.

        Args:
          wanted: pictures to draw, with their transform and the number of images of their sample.
          pixels: how many to encode at once.

        Returns:
          How many pictures were encoded.
        """
        missing: dict[tuple[int, int], dict[str, tuple[Picture, ImageTransform, int]]] = {}
        for picture, transform, img_num in wanted:
            name = self._name(f"moments-{self._identity}", picture, transform, img_num)
            tokens = transform.tokens(picture.width, picture.height, img_num)
            if name and self._read(name, tokens, axis=1) is None:
                size = transform.size(picture.width, picture.height, img_num)
                missing.setdefault(size, {})[name] = (picture, transform, img_num)
        for (width, height), pictures in missing.items():
            at_once = max(1, min(len(pictures), pixels // (width * height)))
            items = list(pictures.items())
            for start in range(0, len(items), at_once):
                chunk = items[start : start + at_once]
                # a short last chunk is filled up, so that each size compiles once
                filled = [job for _, job in chunk] + [chunk[0][1]] * (at_once - len(chunk))
                for (name, _), value in zip(chunk, self._encode(filled), strict=False):
                    self._write(name, value)
        return sum(map(len, missing.values()))

    def _encode(self, jobs: list[tuple[Picture, ImageTransform, int]]) -> list[np.ndarray]:
        """Moments of pictures of one size, float32 ``[2, N, latent_dim]`` each."""
        if self.encoder is None:
            raise LookupError("this process has no autoencoder to encode pictures with")
        images = np.stack([_LEVELS[self._resized(*job)] for job in jobs])
        mean, logvar = (np.asarray(x, np.float32) for x in self.encoder(images))
        return list(np.stack([mean, logvar], axis=1))

    def _resized(self, picture: Picture, transform: ImageTransform, img_num: int) -> np.ndarray:
        if isinstance(picture, ImageFile):
            image = open_image(picture.path)
        else:
            image = Image.fromarray(picture.render())
        return np.asarray(transform.resize(image, img_num))

    def content(self, picture: ImageFile) -> str:
        """Hash of what a picture's file shows, read once."""
        if picture.path not in self._contents:
            self._contents[picture.path] = content_of(picture.path)
        return self._contents[picture.path]

    def _name(self, kind: str, picture: Picture, transform: ImageTransform, img_num: int) -> str:
        """File name of a result; empty for a picture that is not kept."""
        if isinstance(picture, GeneratedImage):
            if not picture.key:
                return ""
            content = picture.key
        else:
            content = self.content(picture)
        width, height = transform.size(picture.width, picture.height, img_num)
        what = f"{content} {width}x{height} {transform.stride} {transform.square}"
        return f"{kind}/{digest(what)[:32]}.npy"

    def _get(self, name: str, tokens: int, compute: Callable[[], np.ndarray], axis: int = 0) -> np.ndarray:
        value = self._read(name, tokens, axis) if name else None
        if value is None:
            value = compute()
            if name:
                self._write(name, value)
        return value

    def _read(self, name: str, tokens: int, axis: int) -> np.ndarray | None:
        if name not in self._memory and self.folder is not None:
            try:
                with _HEADERS:
                    value = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):  # absent, or damaged: computed again
                return None
            if value.ndim <= axis or value.shape[axis] != tokens:
                return None
            self._memory[name] = value
        return self._memory.get(name)

    def _write(self, name: str, value: np.ndarray) -> None:
        if self.folder is None:
            self._memory[name] = value
            return
        with replacing(self.folder / name) as made:
            np.save(made, value)


_HEADERS = threading.Lock()
"""Held while NumPy parses a file's header: Python 3.11's parser fails if two threads use it at once."""

_LEVELS = (np.arange(256, dtype=np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(0.5)
"""The model's value of each of a picture's 256 levels; looking it up is the fastest conversion."""


def _label(picture: Picture) -> str:
    return str(picture.path) if isinstance(picture, ImageFile) else picture.key or "a generated picture"
