"""The scoring encoders against PyTorch with random weights, through the files that they are published as.

CLIP and DINOv2 are ``transformers``' own, saved as the Hub has them and read by our converters. LPIPS is a
plain PyTorch reading of the ``lpips`` package, written below with its names.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from safetensors.torch import save_file  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from tests.parity.golden import assert_close  # noqa: E402
from tests.torch_parity.common import names, numpy_tensors, randomize  # noqa: E402
from unichar_jax.checkpoint import encoders, table  # noqa: E402
from unichar_jax.errors import UserError  # noqa: E402
from unichar_jax.models.encoders.clip import ClipConfig  # noqa: E402
from unichar_jax.models.encoders.dinov2 import Dinov2Config, bicubic_matrix  # noqa: E402
from unichar_jax.models.encoders.lpips import SCALE, SHIFT, LpipsConfig  # noqa: E402

pytestmark = pytest.mark.torch

TOLERANCE = 1e-4


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def _images(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def _nhwc(images: np.ndarray) -> jax.Array:
    return jnp.asarray(images.transpose(0, 2, 3, 1))


# -- CLIP ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[2, 95], ids=["OpenAI's wrong end id", "end id"])
def clip(request, tmp_path_factory):
    from transformers import CLIPConfig, CLIPModel

    tower = dict(intermediate_size=72, num_attention_heads=4, hidden_act="quick_gelu")
    config = CLIPConfig(
        text_config=dict(
            tower, hidden_size=32, num_hidden_layers=3, vocab_size=96, max_position_embeddings=11
        )
        | dict(eos_token_id=request.param),
        vision_config=dict(tower, hidden_size=48, num_hidden_layers=2, image_size=28, patch_size=7),
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("clip")
    theirs = randomize(CLIPModel(config))
    theirs.save_pretrained(folder)
    return theirs, encoders.load_clip(folder)


def test_clip(clip):
    theirs, ours = clip
    images = _images(3, 3, 28, 28)
    ids = np.random.default_rng(1).integers(3, 95, (4, 11))
    for row, length in enumerate((11, 5, 1, 8)):  # an end token, and padding with the same id
        ids[row, length - 1 :] = 95
    with torch.no_grad():
        out = theirs(input_ids=torch.tensor(ids), pixel_values=torch.tensor(images))
    got_images, got_texts = ours.encode_images(_nhwc(images)), ours.encode_texts(jnp.asarray(ids))
    assert_close(got_images, out.image_embeds.numpy(), TOLERANCE, "image embeddings")
    assert_close(got_texts, out.text_embeds.numpy(), TOLERANCE, "text embeddings")
    assert_close(ours.logits(got_images, got_texts), out.logits_per_image.numpy(), TOLERANCE, "logits")


def test_clip_table_covers_the_published_model():
    assert len(encoders.clip_table(ClipConfig())) == 590


# -- DINOv2 -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory):
    from transformers import Dinov2Config as TheirConfig
    from transformers import Dinov2Model

    config = TheirConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, mlp_ratio=3, image_size=35, patch_size=7
    )
    folder = tmp_path_factory.mktemp("dinov2")
    theirs = randomize(Dinov2Model(config))
    theirs.save_pretrained(folder)
    return theirs, encoders.load_dinov2(folder)


@pytest.mark.parametrize("size", [(35, 35), (28, 28), (49, 21)], ids=str)
def test_dinov2(dinov2, size):
    """At the learned size, and at sizes that interpolate the learned positions."""
    theirs, ours = dinov2
    images = _images(2, 3, *size)
    with torch.no_grad():
        expected = theirs(torch.tensor(images)).last_hidden_state[:, 0].numpy()
    assert_close(ours(_nhwc(images)), expected, TOLERANCE, "class token")


@pytest.mark.parametrize("new_size", [16, 37, 50])
def test_bicubic_matrix(new_size):
    table = _images(1, 2, 37, 37)
    expected = F.interpolate(torch.tensor(table), size=(new_size, new_size), mode="bicubic").numpy()
    m = bicubic_matrix(37, new_size)
    # PyTorch finds its sampling points in float32, ours are float64.
    assert_close(np.einsum("rs,bcsz,tz->bcrt", m, table, m), expected, 1e-5, "interpolation")


def test_dinov2_table_covers_the_published_model():
    assert len(encoders.dinov2_table(Dinov2Config())) == 222


# -- LPIPS --------------------------------------------------------------------------------------------------


class _Lpips(nn.Module):
    """AlexNet's features in five slices, unit length, squared difference, linear heads, spatial mean, sum."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        a, b, c, d, e = widths
        self.net = nn.Module()
        plan = [
            [("0", nn.Conv2d(3, a, 11, stride=4, padding=2)), ("1", nn.ReLU())],
            [("2", nn.MaxPool2d(3, 2)), ("3", nn.Conv2d(a, b, 5, padding=2)), ("4", nn.ReLU())],
            [("5", nn.MaxPool2d(3, 2)), ("6", nn.Conv2d(b, c, 3, padding=1)), ("7", nn.ReLU())],
            [("8", nn.Conv2d(c, d, 3, padding=1)), ("9", nn.ReLU())],
            [("10", nn.Conv2d(d, e, 3, padding=1)), ("11", nn.ReLU())],
        ]
        for i, layers in enumerate(plan):
            slice_ = nn.Sequential()
            for name, layer in layers:
                slice_.add_module(name, layer)
            self.net.add_module(f"slice{i + 1}", slice_)
            head = nn.Module()
            head.model = nn.Sequential(nn.Dropout(), nn.Conv2d(widths[i], 1, 1, bias=False))
            self.add_module(f"lin{i}", head)
        self.scaling_layer = nn.Module()
        self.scaling_layer.register_buffer("shift", torch.tensor(SHIFT).reshape(1, 3, 1, 1))
        self.scaling_layer.register_buffer("scale", torch.tensor(SCALE).reshape(1, 3, 1, 1))
        self.lins = nn.ModuleList([getattr(self, f"lin{i}") for i in range(5)])

    def _features(self, x):
        x = (x - self.scaling_layer.shift) / self.scaling_layer.scale
        for i in range(5):
            x = getattr(self.net, f"slice{i + 1}")(x)
            yield x / (torch.sqrt(torch.sum(x**2, dim=1, keepdim=True)) + 1e-10)

    def forward(self, x, y):
        pairs = zip(self.lins, self._features(x), self._features(y), strict=True)
        return sum(lin.model((a - b) ** 2).mean(dim=(1, 2, 3)) for lin, a, b in pairs)


@pytest.fixture(scope="module")
def lpips(tmp_path_factory):
    cfg = LpipsConfig(widths=(8, 12, 16, 12, 10))
    path = tmp_path_factory.mktemp("lpips") / encoders.LPIPS_FILE
    theirs = randomize(_Lpips(cfg.widths))
    save_file({k: v.clone() for k, v in theirs.state_dict().items()}, path)
    return theirs, encoders.load_lpips(path, cfg), cfg, path


def test_lpips(lpips):
    theirs, ours, _, _ = lpips
    images = np.random.default_rng(0).uniform(0, 1, (4, 3, 67, 80)).astype(np.float32)
    got = np.asarray(ours.pairwise(ours.features(_nhwc(images))))
    x = torch.tensor(images) * 2 - 1
    with torch.no_grad():
        expected = np.stack([theirs(one[None].expand_as(x), x).numpy() for one in x])
    assert_close(got, expected, TOLERANCE, "pairwise distances")
    assert not np.diag(got).any()


def test_lpips_table_covers_the_published_model():
    assert len(encoders.lpips_table()) == 15


# -- accounting ---------------------------------------------------------------------------------------------


def test_table_goes_both_ways(dinov2, lpips):
    theirs, ours = dinov2
    back = table.module_to_torch(ours, encoders.dinov2_table(ours.cfg))
    assert {k: v.shape for k, v in back.items()} == {
        k: v for k, v in _published_shapes(theirs).items() if k != "embeddings.mask_token"
    }
    theirs, ours, cfg, _ = lpips
    back, expected = table.module_to_torch(ours, encoders.lpips_table(cfg)), numpy_tensors(theirs)
    assert set(back) == names(encoders.lpips_table(cfg)) == set(expected)
    for name, value in back.items():
        np.testing.assert_array_equal(value, expected[name])


def _published_shapes(theirs) -> dict[str, tuple[int, ...]]:
    """Names and shapes as ``transformers`` writes them."""
    import tempfile

    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "np") as f:
            return {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118


def test_everything_that_is_wrong_is_in_one_error(lpips, tmp_path):
    theirs, _, cfg, _ = lpips
    state = {k: v.clone() for k, v in theirs.state_dict().items()}
    del state["lin3.model.1.weight"]
    state["net.slice1.0.bias"] = torch.zeros(3)
    state["net.slice1.0.weight"] = state["net.slice1.0.weight"].to(torch.int32)
    state["extra"] = torch.zeros(1)
    save_file(state, tmp_path / encoders.LPIPS_FILE)
    with pytest.raises(UserError) as caught:
        encoders.load_lpips(tmp_path, cfg)
    for name in ("lin3.model.1.weight", "net.slice1.0.bias", "net.slice1.0.weight", "extra"):
        assert name in str(caught.value)


def test_wrong_kind_of_model(dinov2, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    with pytest.raises(UserError, match="expected model_type 'clip', got 'dinov2'"):
        encoders.load_clip(tmp_path)
