"""RandAugment on the device, as timm's `rand-m9-mstd0.5-inc1` (Cubuk et al., 2019, arXiv:1909.13719).

Two of fifteen operations, drawn with replacement, each done with probability 1/2 and at a strength of its own:
`timm/data/auto_augment.py`, and Pillow's ImageOps.py, ImageEnhance.py, Blend.c, Filter.c and Geometry.c for what they
do to pixels of 8 bits. Values are whole numbers from 0 to 255 before and after each operation, as Pillow's are.

Under `vmap` a `lax.switch` over the operations would run all fifteen. They are of three kinds, each of which is
computed once: a warp of the plane, a table of new values for the old ones, and a blend with another image.
"""

import jax
import jax.numpy as jnp

# The numbers of the operations, by kind.
WARPS = ("rotate", "shear_x", "shear_y", "translate_x", "translate_y")
TABLES = ("auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add")
BLENDS = ("brightness", "contrast", "color", "sharpness")
OPERATIONS = (*WARPS, *TABLES, *BLENDS)
_LAYERS, _STD, _STRONGEST = 2, 0.5, 10


def rand_augment(key: jax.Array, image: jax.Array, magnitude: float, fill: jax.Array) -> jax.Array:
  """Two random operations on one image.

  Args:
    key: of the view.
    image: float [C, H, W] in [0, 1], C 1 or 3; it is rounded to the 256 levels of an image file.
    magnitude: mean strength, in (0, 10]; its standard deviation is 1/2.
    fill: float [C] from 0 to 255, the colour of what a warp uncovers.

  Returns:
    float [C, H, W] in [0, 1], of 256 levels.
  """
  x = jnp.round(image * 255)
  for done, operation, strength, sign in zip(*draw(key, magnitude), strict=True):
    x = jnp.where(done, apply(x, operation, strength, sign, fill), x)
  return x / 255


def draw(key: jax.Array, magnitude: float) -> tuple[jax.Array, ...]:
  """Of both layers, [2] each: whether it is done, operation, strength and sign, as `apply` takes them."""
  uniform_key, normal_key = jax.random.split(key)
  which, done, sign = jax.random.uniform(uniform_key, (3, _LAYERS))
  operation = jnp.minimum((which * len(OPERATIONS)).astype(jnp.int32), len(OPERATIONS) - 1)
  strength = jnp.clip(magnitude + _STD * jax.random.normal(normal_key, (_LAYERS,)), 0, _STRONGEST) / _STRONGEST
  return done < 0.5, operation, strength, jnp.where(sign < 0.5, 1.0, -1.0)


def apply(x: jax.Array, operation: jax.Array, strength: jax.Array, sign: jax.Array, fill: jax.Array) -> jax.Array:
  """One operation, a number in `OPERATIONS`, on float [C, H, W] of whole numbers from 0 to 255.

  `strength` is in [0, 1]. `sign`, 1 or -1, is the direction of warps and blends; tables have none.
  """
  warped = _warp(x, _matrix(operation, sign * strength, x.shape[1:]), fill)
  looked_up = _look_up(x, operation - len(WARPS), strength)
  blended = _blend(x, operation - len(WARPS) - len(TABLES), 1 + sign * 0.9 * strength)
  kind = (operation >= len(WARPS)).astype(jnp.int32) + (operation >= len(WARPS) + len(TABLES))
  return jnp.select([kind == 0, kind == 1], [warped, looked_up], blended)


def _matrix(operation, amount, size):
  """(a, b, c, d, e, f) that map an output's (x, y) to where it is read, a x + b y + c and d x + e y + f."""
  height, width = size
  angle = -jnp.deg2rad(30 * amount)
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  cx, cy = width / 2, height / 2
  one, zero, shear = jnp.ones(()), jnp.zeros(()), 0.3 * amount
  rotation = (cos, sin, cx - cx * cos - cy * sin, -sin, cos, cy + cx * sin - cy * cos)
  matrices = [
    rotation,
    (one, shear, zero, zero, one, zero),
    (one, zero, zero, shear, one, zero),
    (one, zero, 0.45 * amount * width, zero, one, zero),
    (one, zero, zero, zero, one, 0.45 * amount * height),
  ]
  return jnp.stack([jnp.stack(matrix) for matrix in matrices])[jnp.clip(operation, 0, len(WARPS) - 1)]


def _warp(x, matrix, fill):
  """Pillow's affine transform, bicubic with a = -1, edges repeated; `fill` where it is read outside of the image."""
  _, height, width = x.shape
  a, b, c, d, e, f = matrix
  rows, columns = jnp.arange(height)[:, None] + 0.5, jnp.arange(width)[None, :] + 0.5
  at_x, at_y = a * columns + b * rows + c, d * columns + e * rows + f
  inside = (at_x >= 0) & (at_x < width) & (at_y >= 0) & (at_y < height)
  first_x, first_y = jnp.floor(at_x - 0.5), jnp.floor(at_y - 0.5)
  weights_x, weights_y = _cubic(at_x - 0.5 - first_x), _cubic(at_y - 0.5 - first_y)
  flat, out = x.reshape(len(x), -1), jnp.zeros_like(x)
  for i, weight_y in enumerate(weights_y):
    row = jnp.clip(first_y + (i - 1), 0, height - 1).astype(jnp.int32)
    line = jnp.zeros_like(x)
    for j, weight_x in enumerate(weights_x):
      column = jnp.clip(first_x + (j - 1), 0, width - 1).astype(jnp.int32)
      line += weight_x[None] * jnp.take(flat, row * width + column, axis=1)
    out += weight_y[None] * line
  return jnp.where(inside[None], _whole(out), fill[:, None, None])


def _cubic(d):
  """Weights of the pixels at -1, 0, 1 and 2, read at d in [0, 1)."""
  e = 1 - d
  return -d * e * e, 1 - d * d * (2 - d), 1 - e * e * (2 - e), -e * d * d


def _look_up(x, operation, strength):
  """Replaces values by a table of 256 for each channel."""
  levels, flat = jnp.arange(256.0)[None], x.reshape(len(x), -1).astype(jnp.int32)
  low, high = jnp.min(flat, axis=1, keepdims=True), jnp.max(flat, axis=1, keepdims=True)
  scale = 255 / jnp.maximum(high - low, 1)
  stretched = jnp.where(high > low, _whole(levels * scale - low * scale), levels)

  counts = jax.vmap(lambda values: jnp.bincount(values, length=256))(flat)
  step = (flat.shape[1] - jnp.take_along_axis(counts, high, axis=1)) // 255  # without those of the highest value
  before = jnp.cumsum(counts, axis=1) - counts
  equal = jnp.where(step > 0, jnp.minimum((step // 2 + before) // jnp.maximum(step, 1), 255), levels)

  block = 2.0 ** (4 + jnp.floor(4 * strength))  # 4 bits are kept at strength 0, none at 1
  threshold = 256 - jnp.floor(256 * strength)
  more = jnp.minimum(jnp.floor(110 * strength), 128)
  same = jnp.zeros((len(x), 1))
  tables = [
    stretched,
    equal,
    255 - levels + same,
    jnp.floor(levels / block) * block + same,
    jnp.where(levels < threshold, levels, 255 - levels) + same,
    jnp.where(levels < 128, jnp.minimum(levels + more, 255), levels) + same,
  ]
  table = jnp.stack(tables)[jnp.clip(operation, 0, len(TABLES) - 1)]
  return jnp.take_along_axis(table, flat, axis=1).reshape(x.shape)


def _blend(x, operation, factor):
  """factor x + (1 - factor) times black, the mean grey, the grey image or the smoothed image."""
  gray = _luma(x)
  plain = jnp.floor(jnp.mean(gray) + 0.5)
  others = [jnp.zeros_like(x), jnp.full_like(x, plain), jnp.broadcast_to(gray, x.shape), _smooth(x)]
  other = jnp.stack(others)[jnp.clip(operation, 0, len(BLENDS) - 1)]
  return _whole(other + factor * (x - other))


def _luma(x):
  """Pillow's grey value [1, H, W], rounded."""
  if len(x) == 1:
    return x
  r, g, b = x.astype(jnp.int32)
  return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16).astype(x.dtype)[None]


def _smooth(x):
  """Pillow's SMOOTH: the mean of 3x3 pixels, of which the middle one counts five times; edges stay as they are."""
  _, height, width = x.shape
  if min(height, width) < 3:
    return x
  around = sum(x[:, i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
  inner = jnp.floor((around + 4 * x[:, 1:-1, 1:-1]) / 13 + 0.5)
  return x.at[:, 1:-1, 1:-1].set(inner)


def _whole(x):
  """Cut to 0 to 255 and down to whole numbers, as Pillow's conversion to 8 bits; a hair below one is that one."""
  return jnp.floor(jnp.clip(x, 0, 255) + 1e-4)
