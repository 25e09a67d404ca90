"""Weighted k-nearest-neighbour classification of frozen features (Wu et al., 2018, arXiv:1805.01978, section 3.4).

As in eval_knn.py of facebookresearch/dino: cosine similarity, each of the k neighbours votes with exp(similarity / T).
"""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

_QUERY_BLOCK = 1024
# Bank rows compared at once. 4 MiB of similarities stay in a CPU's cache. Programs for accelerators take 64 MiB, since
# chunks follow one after the other and small ones leave them idle: on an H200 these are the fastest.
_CHUNK, _CHUNK_OF_ACCELERATORS = 2**10, 2**14
_GROUP = 32  # rows of a large chunk that are compared by their best one before any is sorted


def knn_predict(
  bank: ArrayLike,
  bank_labels: ArrayLike,
  queries: ArrayLike,
  *,
  k: int = 20,
  temperature: float = 0.07,
  num_classes: int | None = None,
  chunk_size: int | None = None,
  exclude: ArrayLike | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  """Scores each query by the weighted votes of its k nearest bank rows.

  Args:
    bank: float [B, d] features, normalised inside; a zero row has similarity 0 with everything.
    bank_labels: int [B], in [0, num_classes).
    queries: float [Q, d].
    k: number of neighbours; more than there are is all of them, with a warning.
    temperature: T > 0 of the votes exp(similarity / T).
    num_classes: None: the largest label + 1 (not under `jax.jit`).
    chunk_size: bank rows compared at once; None: 1024 on a CPU and 16,384 elsewhere. Similarities never take
      more than [1024, chunk_size + k].
    exclude: int [Q], a bank row that does not count for this query: itself, where the bank is evaluated on itself.
    axis_name: mapped axis over which the bank is split into equal parts, in order; needs `num_classes`. Every device
      gets the scores of all queries. Rows with a negative label, which fill a part up, do not vote.

  Returns:
    float32 [Q, C]: each class's share of the votes; rows sum to 1, or to 0 where all of the bank is excluded. Equal
    similarities go to the lower bank row; of equal scores take the smaller class, as `jnp.argmax` and `lax.top_k` do.

  Raises:
    ValueError: shapes that do not fit, k out of range; and, where they are not traced: a temperature or labels out of
      range, features that are not finite.
  """
  bank, bank_labels, queries = (x if isinstance(x, jax.Array) else np.asarray(x) for x in (bank, bank_labels, queries))
  if bank.ndim != 2 or queries.ndim != 2 or bank.shape[1] != queries.shape[1]:
    raise ValueError(f"bank and queries must be [B, d] and [Q, d], got {bank.shape} and {queries.shape}.")
  if bank_labels.shape != bank.shape[:1]:
    raise ValueError(f"bank_labels must be [{bank.shape[0]}], one a bank row, got {bank_labels.shape}.")
  if k < 1 or bank.shape[0] < 1 or queries.shape[0] < 1:
    raise ValueError(
      f"k, bank and queries must hold one, got k={k}, a bank of {bank.shape[0]} rows and {queries.shape[0]} queries."
    )
  if not isinstance(temperature, jax.core.Tracer) and not temperature > 0:
    raise ValueError(f"temperature must be positive, got {temperature}.")
  if exclude is not None and np.shape(exclude) != queries.shape[:1]:
    raise ValueError(f"exclude must be [{queries.shape[0]}], one bank row a query, got {np.shape(exclude)}.")
  check_finite(bank=bank, queries=queries)
  rows = bank.shape[0] * (1 if axis_name is None else lax.axis_size(axis_name))
  if k > rows:
    warnings.warn(f"k={k} is more than the bank's {rows} rows; all of them vote.", stacklevel=2)
    k = rows
  if not np.issubdtype(bank_labels.dtype, np.integer):
    raise TypeError(f"bank_labels must be integers, got {bank_labels.dtype}.")
  if num_classes is None:
    num_classes = int(np.max(np.asarray(bank_labels))) + 1
  if not isinstance(bank_labels, jax.core.Tracer):
    lowest, highest = int(np.min(np.asarray(bank_labels))), int(np.max(np.asarray(bank_labels)))
    if highest < 0:
      raise ValueError("no row of the bank has a class: all bank_labels are negative.")
    if lowest < 0 or highest >= num_classes:
      raise ValueError(f"bank_labels must be in [0, {num_classes}), got {lowest} to {highest}.")
  if exclude is None:
    exclude = jnp.full(queries.shape[:1], -1)
  return _predict(bank, bank_labels, queries, exclude, temperature, k, num_classes, chunk_size, axis_name)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8))
def _predict(bank, bank_labels, queries, exclude, temperature, k, num_classes, chunk_size, axis_name=None):
  rows, asked = bank.shape[0], queries.shape[0]
  block = min(_QUERY_BLOCK, asked)
  place = 0 if axis_name is None else lax.axis_index(axis_name) * rows  # of this part of the bank in the whole

  def nearest_rows(block_queries, block_exclude, chunk):
    """(similarity, row) [block, k] of each query's nearest bank rows."""
    chunk = min(chunk, rows)
    starts = jnp.arange(0, rows, chunk)

    def nearer(best, start):
      # The last chunk is moved back to fit; what it repeats is masked.
      first = jnp.minimum(start, rows - chunk)
      index = first + jnp.arange(chunk)[None]
      part = _unit(lax.dynamic_slice_in_dim(bank, first, chunk))  # here, and not a second bank
      similarity = jnp.matmul(block_queries, part.T, precision=lax.Precision.HIGHEST)
      skip = (index < start) | (lax.dynamic_slice_in_dim(bank_labels, first, chunk)[None] < 0)
      similarity = jnp.where(skip | (place + index == block_exclude[:, None]), -jnp.inf, similarity)
      similarity, row_of = _candidates(similarity, k)
      # What was found before comes first: top_k keeps the lower row where similarities are equal.
      values, at = lax.top_k(jnp.concatenate([best[0], similarity], axis=1), k)
      found_before = jnp.take_along_axis(best[1], jnp.minimum(at, k - 1), axis=1)
      return (values, jnp.where(at < k, found_before, first + row_of(at - k))), None

    nothing = jnp.full((block, k), -jnp.inf), jnp.zeros((block, k), starts.dtype)
    return lax.scan(nearer, nothing, starts)[0]

  def one_block(scores, start):
    at_once = jnp.minimum(start, asked - block)  # The last block is moved back to fit, and written twice where it is.
    block_queries = _unit(lax.dynamic_slice_in_dim(queries, at_once, block))
    block_exclude = lax.dynamic_slice_in_dim(exclude, at_once, block)
    if chunk_size:
      similarity, neighbours = nearest_rows(block_queries, block_exclude, chunk_size)
    else:
      on_cpu, elsewhere = (functools.partial(nearest_rows, chunk=size) for size in (_CHUNK, _CHUNK_OF_ACCELERATORS))
      similarity, neighbours = lax.platform_dependent(block_queries, block_exclude, cpu=on_cpu, default=elsewhere)
    labels = bank_labels[neighbours]
    if axis_name is not None:  # the nearest of each part, in the order of the parts, then of all
      everyone = [lax.all_gather(x, axis_name, axis=1, tiled=True) for x in (similarity, labels)]
      similarity, at = lax.top_k(everyone[0], k)
      labels = jnp.take_along_axis(everyone[1], at, axis=1)
    # Only ratios of votes count: the nearest one's is 1, so that no temperature overflows.
    nearest = jnp.maximum(similarity[:, :1], -1.0)  # -inf where every row of the bank is excluded
    votes = jnp.exp((similarity - nearest) / temperature)
    votes = votes / jnp.maximum(jnp.sum(votes, axis=1, keepdims=True), 1e-30)
    shares = jnp.zeros((block, num_classes)).at[jnp.arange(block)[:, None], labels].add(votes)
    return lax.dynamic_update_slice_in_dim(scores, shares, at_once, 0), None

  # Written in place: all blocks' scores, stacked and cut to size, would be a second array of them.
  return lax.scan(one_block, jnp.zeros((asked, num_classes)), jnp.arange(0, asked, block))[0]


def _candidates(values, k):
  """Fewer columns of [q, n] with each row's k largest values, in their order, and what gives the columns of theirs.

  The k largest are in the k groups of `_GROUP` columns with the largest maxima, the first of equal ones: sorting the
  maxima and then those groups, 1,152 numbers for the 20 of 16,384, is much less than sorting all.
  """
  n = values.shape[1] // _GROUP
  if n < 4 * k or values.shape[1] % _GROUP:
    return values, lambda columns: columns
  groups = values.reshape(-1, n, _GROUP)
  chosen = jnp.sort(lax.top_k(jnp.max(groups, axis=-1), k)[1], axis=1)

  def column_of(columns):
    group = jnp.take_along_axis(chosen, jnp.maximum(columns, 0) // _GROUP, axis=1)
    return group * _GROUP + columns % _GROUP

  return jnp.take_along_axis(groups, chosen[..., None], axis=1).reshape(len(values), -1), column_of


def check_finite(**features: ArrayLike) -> None:
  """Raises ValueError, with the argument's name, for arrays [n, d] that are not traced and hold NaN or infinity."""
  for name, x in features.items():
    if not isinstance(x, jax.core.Tracer):
      rows = np.asarray(x)  # NaN is the least and the largest of a row that has it; no array of the bank's size is made
      finite = np.isfinite(rows.min(axis=1)) & np.isfinite(rows.max(axis=1))
      if not finite.all():
        raise ValueError(f"{name}: {np.sum(~finite)} of {len(finite)} rows hold NaN or infinity.")


def accuracy(scores: ArrayLike, labels: ArrayLike, *, k: int) -> dict[str, float]:
  """Accuracy in percent of scores [Q, C] against labels [Q].

  "top1"; "top5", of the first min(5, k, C) classes; and "balanced", the mean over classes of each one's top-1, which is
  100 / C for answering the most frequent class always, however frequent it is.
  """
  scores = jnp.asarray(scores)
  if not len(scores):
    raise ValueError("there are no queries to be scored.")
  _, order = lax.top_k(scores, min(5, scores.shape[1]))
  labels = np.asarray(labels)
  hits = np.asarray(order) == labels[:, None]
  counts = {"top1": hits[:, 0].sum(), "top5": hits[:, : min(5, k)].any(axis=1).sum()}
  shares = {name: float(100 * count / len(hits)) for name, count in counts.items()}
  return shares | {"balanced": float(100 * np.mean([hits[labels == c, 0].mean() for c in np.unique(labels)]))}


def _unit(x):
  x = x.astype(jnp.float32)
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))
