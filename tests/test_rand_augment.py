"""RandAugment's operations against Pillow's, what timm makes of a strength, and random erasing."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageFilter
import PIL.ImageOps
import pytest

from ssl_jax import augment
from ssl_jax.rand_augment import OPERATIONS, apply, draw, rand_augment

FILL = (124, 116, 104)
BICUBIC = PIL.Image.Resampling.BICUBIC


def pillow(image, name, m, sign):
  """What timm calls for the operation at magnitude m of 10."""
  warp = dict(resample=BICUBIC, fillcolor=FILL if image.mode == "RGB" else FILL[0])
  affine = functools.partial(image.transform, image.size, PIL.Image.Transform.AFFINE, **warp)
  factor = max(0.1, 1 + sign * m / 10 * 0.9)
  return {
    "rotate": lambda: image.rotate(sign * m / 10 * 30, **warp),
    "shear_x": lambda: affine((1, sign * m / 10 * 0.3, 0, 0, 1, 0)),
    "shear_y": lambda: affine((1, 0, 0, sign * m / 10 * 0.3, 1, 0)),
    "translate_x": lambda: affine((1, 0, sign * m / 10 * 0.45 * image.size[0], 0, 1, 0)),
    "translate_y": lambda: affine((1, 0, 0, 0, 1, sign * m / 10 * 0.45 * image.size[1])),
    "auto_contrast": lambda: PIL.ImageOps.autocontrast(image),
    "equalize": lambda: PIL.ImageOps.equalize(image),
    "invert": lambda: PIL.ImageOps.invert(image),
    # ImageOps.posterize, which no longer takes 0 bits
    "posterize": lambda: image.point(
      [i & ~(2 ** (4 + int(m / 10 * 4)) - 1) for i in range(256)] * len(image.getbands())
    ),
    "solarize": lambda: PIL.ImageOps.solarize(image, 256 - min(256, int(m / 10 * 256))),
    "solarize_add": lambda: image.point(
      [min(255, i + min(128, int(m / 10 * 110))) if i < 128 else i for i in range(256)] * len(image.getbands())
    ),
    "brightness": lambda: PIL.ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda: PIL.ImageEnhance.Contrast(image).enhance(factor),
    "color": lambda: PIL.ImageEnhance.Color(image).enhance(factor),
    "sharpness": lambda: PIL.ImageEnhance.Sharpness(image).enhance(factor),
  }[name]()


def picture(height, width, channels):
  """Smooth colours with some noise, in a part of the range."""
  rng = np.random.default_rng(0)
  small = PIL.Image.fromarray(rng.integers(20, 220, (4, 5, 3), dtype=np.uint8)).resize((width, height), BICUBIC)
  pixels = np.asarray(small).astype(int) + rng.integers(-9, 10, (height, width, 3))
  return np.clip(pixels, 9, 231).astype(np.uint8)[..., :channels]


@pytest.mark.parametrize("height, width, channels", [(24, 31, 3), (60, 50, 1)])
def test_every_operation_is_pillows_to_a_level(height, width, channels):
  pixels = picture(height, width, channels)
  image = PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
  planes, fill = jnp.moveaxis(jnp.asarray(pixels, jnp.float32), -1, 0), jnp.array(FILL[:channels], jnp.float32)
  ours = jax.jit(lambda operation, strength, sign: apply(planes, operation, strength, sign, fill))
  for number, name in enumerate(OPERATIONS):
    for m, sign in ((0.0, 1), (3.3, -1), (9.0, 1), (9.7, -1), (10.0, 1)):
      want = np.atleast_3d(np.asarray(pillow(image, name, m, sign))).astype(int)
      got = np.moveaxis(np.asarray(ours(number, m / 10, float(sign))), 0, -1)
      assert np.array_equal(got, np.round(got)) and got.min() >= 0 and got.max() <= 255
      off = np.abs(got - want)
      # float32 puts a value on the other side of a whole number now and then
      assert off.max() <= 1 and np.mean(off) <= 0.006, (name, m, sign, np.mean(off), off.max())


def test_flat_and_tiny_images_survive_every_operation():
  ours = jax.jit(lambda flat, number: apply(flat, number, 0.9, 1.0, flat[:, 0, 0]))
  for value in (0.0, 77.0, 255.0):
    flat = jnp.full((1, 2, 2), value)
    for name in ("auto_contrast", "equalize", "rotate", "contrast", "sharpness"):
      np.testing.assert_array_equal(ours(flat, OPERATIONS.index(name)), flat, err_msg=name)


def test_two_layers_are_drawn_and_each_is_done_half_of_the_time(monkeypatch):
  keys = jax.random.split(jax.random.key(0), 600)
  done, operations, strengths, signs = map(np.asarray, jax.jit(jax.vmap(lambda key: draw(key, 9.0)))(keys))
  counts = np.bincount(done.sum(axis=1), minlength=3) / 600
  np.testing.assert_allclose(counts, [0.25, 0.5, 0.25], atol=0.08)  # 4 standard errors
  assert np.bincount(operations.ravel(), minlength=15).min() > 40 and abs(np.mean(signs)) < 0.12  # of 80
  assert strengths.max() == 1 and abs(np.mean(strengths) - 0.9) < 0.01 and 0.03 < np.std(strengths) < 0.05
  monkeypatch.setattr("ssl_jax.rand_augment.apply", lambda x, *how: x + 1)
  levels = [rand_augment(key, jnp.full((1, 1, 1), 0.1), 9.0, jnp.zeros(1)) * 255 for key in keys[:8]]
  np.testing.assert_allclose(np.ravel(levels), 26 + done[:8].sum(axis=1), rtol=1e-6)  # 25.5 is rounded to even


def test_erasing_fills_boxes_like_timms_with_noise():
  keys = jax.random.split(jax.random.key(1), 800)
  image = jnp.full((2, 20, 30), 7.0)
  out = np.asarray(jax.jit(jax.vmap(lambda key: augment.erase(key, image, 0.25)))(keys))
  erased = out[:, 0] != 7
  share = erased.any(axis=(1, 2))
  assert abs(share.mean() - 0.25) < 0.06  # 4 standard errors
  np.testing.assert_array_equal(erased, out[:, 1] != 7)
  sizes = []
  for mask in erased[share]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert mask.sum() == len(rows) * len(columns) == (np.ptp(rows) + 1) * (np.ptp(columns) + 1)  # one whole box
    sizes.append((len(rows), len(columns)))
  h, w = np.array(sizes).T
  assert h.max() < 20 and w.max() < 30 and (h * w).min() >= 0.02 * 600 - 8 and (h * w).max() <= 200 + 20
  assert abs(np.median(h * w) / 600 - 0.18) < 0.04 and abs(np.median(np.log(h / w))) < 0.35
  noise = out[np.broadcast_to(erased[:, None], out.shape)]
  assert abs(noise.mean()) < 0.05 and abs(noise.std() - 1) < 0.05
  assert math.isclose(np.corrcoef(noise[::2][:1000], noise[1::2][:1000])[0, 1], 0, abs_tol=0.15)
