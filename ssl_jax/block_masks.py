"""Which patches of which crops DINOv2 masks, drawn on the device from each example's key.

Blocks as in BEiT (Bao et al., 2021, arXiv:2106.08254): data/masking.py and data/collate.py of facebookresearch/dinov2,
in distribution. Which crops get a mask, and of what size, is decided over the global batch, so that it does not depend
on the number of devices. MAE's random masks are in methods/mae.py.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax import random_streams

LEAST, TRIES = 4, 10  # patches of a block; rectangles drawn for it before the mask is left as it is


def draw_masks(
  keys: jax.Array, grid: tuple[int, int], *, share: float, ratios: Sequence[float], axis_name: str | None = None
) -> jax.Array:
  """Masks for the two global crops of each example.

  Of the 2 B crops of the global batch, n = int(2 B share) are masked. With edges e_0 to e_n equally spaced from
  ratios[0] to ratios[1], one of them has int(N U(e_i, e_i+1)) of its N patches as its target for each i: which, and
  which crops have none, is the rank of one uniform a crop.

  Args:
    keys: typed keys [b], one per example.
    grid: rows and columns of patches.
    share, ratios: see above.
    axis_name: mapped axis over which the batch is split.

  Returns:
    bool [2, b, N].
  """
  rows, columns = grid

  def draw(key, crop):
    key = jax.random.fold_in(jax.random.fold_in(key, random_streams.BLOCKS), crop)
    size_key, block_key = jax.random.split(key)
    return jax.random.uniform(size_key, (2,)), block_key

  u, block_keys = jax.vmap(jax.vmap(draw, (0, None)), (None, 0))(keys, jnp.arange(2))
  rank, crops = global_rank(u[..., 0], axis_name)
  n = int(crops * share)
  ratio = ratios[0] + (ratios[1] - ratios[0]) * (rank + u[..., 1]) / max(n, 1)
  targets = jnp.where(rank < n, jnp.floor(rows * columns * ratio), 0).astype(jnp.int32)
  limit = rows // 2 * columns  # of one block
  masks = jax.vmap(jax.vmap(lambda key, target: block_mask(key, target, grid, limit)))(block_keys, targets)
  return masks.reshape(*masks.shape[:2], rows * columns)


def most_masked(crops: int, of: int, patches: int, *, share: float, ratios: Sequence[float]) -> int:
  """How many patches of `crops` crops out of `of` can be masked at most: a device may get those of the largest targets.

  For all crops on one device this is the official code's `upperbound`.
  """
  n = int(of * share)
  edges = [ratios[0] + (ratios[1] - ratios[0]) * (i + 1) / n for i in range(n)]
  # A target that float32 rounds up to an edge has room too.
  return sum(math.floor(patches * edge + 1e-3) for edge in edges[max(n - crops, 0) :])


def block_mask(key: jax.Array, target: jax.Array, grid: tuple[int, int], limit: int) -> jax.Array:
  """One mask of at most `target` patches, as the union of rectangles (`MaskingGenerator`).

  A rectangle has an area between `LEAST` and what is left, at most `limit`, and sides in a ratio from 0.3 to 1 / 0.3.
  The first of `TRIES` that fits into the grid and covers something new, but no more than what is left, is taken; where
  none does, the mask stays short of its target. Each trip of the loop covers a patch at least or is the last.

  Args:
    key: typed key.
    target: int scalar.
    grid: rows and columns of patches.
    limit: see above.

  Returns:
    bool [rows, columns].
  """
  height, width = grid
  rows, columns = jnp.arange(height)[None, :], jnp.arange(width)[None, :]

  def block(carry):
    mask, count, number, _ = carry
    left = jnp.minimum(target - count, limit)
    u = jax.random.uniform(jax.random.fold_in(key, number), (4, TRIES, 1))
    area = LEAST + (left - LEAST) * u[0]  # with fewer than LEAST left, between both all the same
    ratio = jnp.exp((2 * u[1] - 1) * math.log(1 / 0.3))
    h, w = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    top, start = jnp.floor(u[2] * (height - h + 1)), jnp.floor(u[3] * (width - w + 1))
    inside_rows, inside_columns = (rows >= top) & (rows < top + h), (columns >= start) & (columns < start + w)
    covered = inside_rows[:, :, None] & inside_columns[:, None, :]  # [TRIES, rows, columns]
    new = jnp.sum(covered & ~mask[None], axis=(1, 2))
    fits = (h < height)[:, 0] & (w < width)[:, 0] & (new > 0) & (new <= left)
    mask = mask | (covered[jnp.argmax(fits)] & jnp.any(fits))
    return mask, jnp.sum(mask), number + 1, jnp.any(fits)

  start = jnp.zeros(grid, bool), 0, 0, True
  start = jax.tree.map(jnp.asarray, start)
  return lax.while_loop(lambda carry: (carry[1] < target) & carry[3], block, start)[0]


def global_rank(u: jax.Array, axis_name: str | None) -> tuple[jax.Array, int]:
  """The rank of each of [v, b, ...] draws among those of all v B crops of the global batch, and v B.

  Where draws are equal, the earlier crop comes first: the ranks are a permutation on any number of devices.
  """
  everyone = u if axis_name is None else lax.all_gather(u, axis_name, axis=1, tiled=True)
  v, batch = everyone.shape[:2]
  order = jnp.argsort(everyone.reshape(v * batch, *u.shape[2:]), axis=0)
  rank = jnp.argsort(order, axis=0).reshape(everyone.shape)
  first = 0 if axis_name is None else lax.axis_index(axis_name) * u.shape[1]
  return lax.dynamic_slice_in_dim(rank, first, u.shape[1], axis=1), v * batch
