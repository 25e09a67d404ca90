"""Contrastive losses: tell the positive apart from every other example of the (global) batch.

Both are softplus(log-sum-exp of the negatives' similarities - the positive's), which stays accurate where the positive
dominates. For small batches the whole similarity matrix is computed and JAX differentiates it. For large ones it is
computed in blocks of rows that are not stored, with the gradient written here (`jax.custom_vjp`).
"""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import (
  at_once,
  by_rows,
  check_block_size,
  check_input,
  check_pair,
  check_temperature,
  unit,
)


def nt_xent(
  z1: jax.Array,
  z2: jax.Array,
  *,
  temperature: float | jax.Array = 0.1,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Normalised temperature-scaled cross-entropy between two views of a batch (SimCLR).

  With the 2N views :math:`z` scaled to unit norm inside, and :math:`p(i)` the other view of the image of view i:

  .. math:: L = \frac{1}{2N} \sum_i -\log
      \frac{\exp(\langle z_i, z_{p(i)} \rangle / \tau)}{\sum_{j \neq i} \exp(\langle z_i, z_j \rangle / \tau)}

  Args:
    z1: float [N, d], projections of the first views. Any norm from 1e-6 to 1e19 is scaled to one; a zero vector stays
      zero, and a larger norm gives NaN.
    z2: float [N, d], projections of the second views: row i is the positive of row i of `z1`.
    temperature: tau > 0, a Python number or a traced scalar.
    axis_name: mapped axis over which the batch is split; the negatives are then those of the global batch. None:
      the batch that is passed, on one device or as a sharded array under `jax.jit`.
    block_size: how many rows of the [2N, 2N] similarities exist at once. They are recomputed in the backward pass, so
      that memory is O(N d + N block_size). None: all rows of small batches, and of larger ones as many as have 2^20
      similarities on a CPU and 2^24 elsewhere.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0: the mean over the 2N views of the global batch, the same on
    every device. Uniform similarities give log(2N - 1). The official code reports and optimises twice this.

  Second derivatives work, `jax.hessian` too. In blocks the value has no forward mode: `jax.jvp` raises an error.

  Gradients: for `jax.pmap`, `jax.vmap` and `jax.shard_map(check_vma=False)`, `lax.pmean` of the per-device gradients is
  the gradient of the returned value. Under shard_map's default `check_vma=True` JAX has summed the gradient of
  replicated parameters already: take it as it is. If you made them varying (`lax.pcast(..., to="varying")`), sum the
  per-device gradients with `lax.psum`.

  Raises:
    TypeError: an input is not floating point, the temperature is not a number, or `block_size` is not an integer.
    ValueError: shapes differ, are not [N, d] or have an empty axis, the global batch has fewer than two images, the
      temperature is not positive and finite, or `block_size` is below one.

  Reference: Chen et al., 2020, arXiv:2002.05709, eq. 1; `add_contrastive_loss` in objective.py of
  google-research/simclr, which also propagates gradients to the negatives of other devices.
  """
  check_pair("z1", z1, "z2", z2)
  check_temperature("temperature", temperature)
  check_block_size(block_size)
  n_global = z1.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
  if n_global < 2:
    raise ValueError(f"nt_xent needs a batch of at least two images for its negatives, got {n_global}.")
  z1, z2 = unit(z1), unit(z2)
  scale = jnp.asarray(temperature, z1.dtype) ** -0.5
  z1, z2 = z1 * scale, z2 * scale  # their products are similarities / temperature
  negatives = _other_views if at_once(2 * z1.shape[0], 2 * n_global, block_size) else _other_views_in_blocks
  with jax.default_matmul_precision("highest"):
    positive = jnp.sum(z1 * z2, axis=-1)  # of both views of an image
    loss = jnp.mean(jax.nn.softplus(negatives(z1, z2, axis_name, block_size) - positive[None]))
  return loss if axis_name is None else lax.pmean(loss, axis_name)


def info_nce(
  query: jax.Array,
  key: jax.Array,
  queue: jax.Array | None = None,
  *,
  temperature: float | jax.Array = 0.07,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Cross-entropy of each query's own key against a queue of old keys, or the other keys of the batch (MoCo).

  With q and k scaled to unit norm inside, and the negatives n:

  .. math:: L = \frac{1}{N} \sum_i -\log \frac{\exp(\langle q_i, k_i \rangle / \tau)}
      {\exp(\langle q_i, k_i \rangle / \tau) + \sum_j \exp(\langle q_i, n_j \rangle / \tau)}

  Args:
    query: float [N, d]. Any norm from 1e-6 to 1e19 is scaled to one; a zero vector stays zero, and a larger norm gives
      NaN.
    key: float [N, d], scaled like `query`: row i is the positive of row i of `query`. Takes no gradient.
    queue: float [K, d], the negatives, rows of unit norm that are not normalised again, the same on every device. Takes
      no gradient. None: the negatives of a query are the other keys of the (global) batch.
    temperature: tau > 0, a Python number or a traced scalar.
    axis_name: mapped axis over which the batch is split.
    block_size: how many queries' similarities exist at once. None: all of small batches, and of larger ones as many as
      have 2^20 similarities on a CPU and 2^24 elsewhere.

  Returns:
    float32 scalar (float64 for float64 inputs), the mean over the global batch, the same on every device. Uniform
    similarities give log(K + 1), or log N without a queue. MoCo v3 multiplies by twice the temperature in its method.

  Gradients over a mapped axis, and second derivatives: as for `nt_xent`.

  Raises:
    TypeError, ValueError: as for `nt_xent`; also a queue that is not [K, d] with K >= 1.

  Reference: He et al., 2020, arXiv:1911.05722, eq. 1, builder.py of facebookresearch/moco; without a queue Chen et al.,
  2021, arXiv:2104.02057, algorithm 1, builder.py of facebookresearch/moco-v3.
  """
  check_pair("query", query, "key", key)
  check_temperature("temperature", temperature)
  check_block_size(block_size)
  query = unit(query)
  query = query / jnp.asarray(temperature, query.dtype)  # products with keys are similarities / temperature
  key = lax.stop_gradient(unit(key))
  if queue is not None:
    check_input("queue", queue)
    if queue.ndim != 2 or queue.shape[0] < 1 or queue.shape[1] != query.shape[1]:
      raise ValueError(f"queue must have shape [K, {query.shape[1]}], got {queue.shape}.")
    candidates = lax.stop_gradient(queue).astype(query.dtype)
  else:
    candidates = key if axis_name is None else lax.all_gather(key, axis_name, tiled=True)
    if candidates.shape[0] < 2:
      raise ValueError("info_nce without a queue needs a batch of at least two images for its negatives, got 1.")

  own = jnp.full(query.shape[0], -1)  # index of each query's own key among the candidates; -1: not among them
  if queue is None:
    own = _places(query.shape[0], axis_name)
  negatives = _other_keys if at_once(query.shape[0], candidates.shape[0], block_size) else _other_keys_in_blocks
  with jax.default_matmul_precision("highest"):
    positive = jnp.sum(query * key, axis=-1)
    loss = jnp.mean(jax.nn.softplus(negatives(query, candidates, own, block_size) - positive))
  return loss if axis_name is None else lax.pmean(loss, axis_name)


def _places(n, axis_name):
  """The indices of this device's images in the global batch, [n]."""
  return jnp.arange(n) + (0 if axis_name is None else lax.axis_index(axis_name) * n)


# NT-Xent.


def _other_views(z1, z2, axis_name, block_size):
  """Log of the sum of exp(z @ other) for both views of each image, [2, n], over all views of all other images."""
  return _other_views_forward(z1, z2, axis_name, block_size)[0]


def _other_views_forward(z1, z2, axis_name, block_size):
  views = _all_views(jnp.stack([z1, z2]), axis_name)

  def log_sum_exp(row):
    return jax.nn.logsumexp(_similarity_to_others(*row, views))

  rows = _own_views(views, axis_name), jnp.tile(_places(z1.shape[0], axis_name), 2)
  total = by_rows(log_sum_exp, rows, len(views), block_size).reshape(2, -1)
  return total, (views, total)


def _other_views_backward(axis_name, block_size, saved, g):
  views, total = saved
  # Similarities are symmetric: the gradient that other rows contribute to a view follows from that view's own row and
  # their log-sum-exps. So the devices exchange two numbers per view, and no gradients.
  all_total, all_g = _all_views(total, axis_name), _all_views(g, axis_name)

  def gradient(row):
    z, image, own_total, own_g = row
    s = _similarity_to_others(z, image, views)
    return (own_g * jnp.exp(s - own_total) + all_g * jnp.exp(s - all_total)) @ views

  rows = _own_views(views, axis_name), jnp.tile(_places(total.shape[1], axis_name), 2)
  with jax.default_matmul_precision("highest"):  # The backward pass is traced outside of the loss's own context.
    out = by_rows(gradient, (*rows, total.reshape(-1), g.reshape(-1)), len(views), block_size)
  return out[: total.shape[1]], out[total.shape[1] :]


_other_views_in_blocks = jax.custom_vjp(_other_views, nondiff_argnums=(2, 3))
_other_views_in_blocks.defvjp(_other_views_forward, _other_views_backward)


def _all_views(x, axis_name):
  """[2, n, ...] of each device -> [2N, ...]: all first views, then all second ones."""
  if axis_name is not None:
    x = lax.all_gather(x, axis_name, axis=1, tiled=True)
  return x.reshape(-1, *x.shape[2:])


def _own_views(views, axis_name):
  """This device's part of what `_all_views` gathered, [2n, d]."""
  if axis_name is None:
    return views
  n = views.shape[0] // 2 // lax.axis_size(axis_name)
  both = views.reshape(2, -1, views.shape[-1])
  return lax.dynamic_slice_in_dim(both, lax.axis_index(axis_name) * n, n, axis=1).reshape(2 * n, -1)


def _similarity_to_others(z, image, views):
  # A view is masked by its index, not by its value: a duplicate image in the batch stays a negative.
  return jnp.where(jnp.arange(len(views)) % (len(views) // 2) == image, -jnp.inf, views @ z)


# InfoNCE. The keys take no gradient, so a query's gradient is a weighted mean of keys: the forward pass computes it.


def _other_keys(query, keys, own, block_size):
  """Log of the sum of exp(query @ key), [n], over all keys but the one with index `own` [n]."""

  def log_sum_exp(row):
    return jax.nn.logsumexp(_similarity_to_other_keys(row, keys))

  return by_rows(log_sum_exp, (query, own), len(keys), block_size)


def _other_keys_forward(query, keys, own, block_size):
  def log_sum_exp_and_gradient(row):
    s = _similarity_to_other_keys(row, keys)
    total = jax.nn.logsumexp(s)
    return total, jnp.exp(s - total) @ keys

  return by_rows(log_sum_exp_and_gradient, (query, own), len(keys), block_size)


def _other_keys_backward(block_size, gradient, g):
  del block_size
  return g[:, None] * gradient, None, None


_other_keys_in_blocks = jax.custom_vjp(_other_keys, nondiff_argnums=(3,))
_other_keys_in_blocks.defvjp(_other_keys_forward, _other_keys_backward)


def _similarity_to_other_keys(row, keys):
  query, own = row
  return jnp.where(jnp.arange(len(keys)) == own, -jnp.inf, keys @ query)
