"""The most similar of a million features, block by block: neighbours of some, and groups of those that are near copies.

Similarity is the cosine. Features are NumPy arrays that may lie on the disk; a block of queries and a chunk of the bank
are in memory at a time. Queries are split over the devices.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ssl_jax import parallel

QUERIES = 1024  # rows of a block: a multiple of the devices of a host
CHUNK, CHUNK_OF_ACCELERATORS = 2**10, 2**14  # rows of the bank; see `knn`


def nearest(
  bank: np.ndarray, queries: np.ndarray, k: int, mesh: Mesh, itself: np.ndarray | None = None
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
  """The k most similar rows of the bank for each query, as `QUERIES` of them are done.

  Args:
    bank: float [B, d].
    queries: float [Q, d].
    k: at most the number of rows that may be found.
    mesh: the devices.
    itself: int [Q], the row of the bank that each query is, which does not count; None: all rows do.

  Yields:
    (the first query, similarity float32 [q, k], row int64 [q, k]), the most similar first; of equals the lower row.
  """
  itself = np.full(len(queries), -1) if itself is None else itself
  k = min(k, len(bank) - int(itself.max() >= 0))
  chunk = _chunk(mesh)
  for first in range(0, len(queries), QUERIES):
    block = _padded(queries[first : first + QUERIES], QUERIES)
    out = _padded(itself[first : first + QUERIES].astype(np.int32), QUERIES, -1)
    block, out = parallel.put_split(mesh, (block, out))
    best = parallel.put_split(mesh, (np.full((QUERIES, k), -np.inf, np.float32), np.zeros((QUERIES, k), np.int32)))
    for start in range(0, len(bank), chunk):
      rows = _padded(bank[start : start + chunk], chunk)
      best = _nearer(best, block, rows, out, start, min(chunk, len(bank) - start))
    q = min(QUERIES, len(queries) - first)
    yield first, np.asarray(best[0])[:q], np.asarray(best[1])[:q].astype(np.int64)


def similar_groups(features: np.ndarray, least: float, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
  """Groups of rows in which each is at least as similar as `least` to another one.

  Args:
    features: float [n, d].
    least: the similarity.
    mesh: the devices.

  Returns:
    The lowest row of each row's group, int64 [n], itself where there is no other; and each row's highest similarity to
    another one, float32 [n], -inf where none reaches `least`.
  """
  n, chunk = len(features), _chunk(mesh)
  group, highest = np.arange(n), np.full(n, -np.inf, np.float32)
  for first in range(0, n, QUERIES):
    block = parallel.put_split(mesh, _padded(features[first : first + QUERIES], QUERIES))
    for start in range(first // chunk * chunk, n, chunk):  # a pair is looked at once, from its lower row
      similarity, reached = _similarities(block, _padded(features[start : start + chunk], chunk), least)
      if not reached:
        continue
      similarity = np.asarray(similarity)
      i, j = np.nonzero(similarity >= least)
      values, i, j = similarity[i, j], i + first, j + start
      pairs = (i < j) & (j < n)  # zeros that fill up are among them, where `least` is not positive
      values, i, j = values[pairs], i[pairs], j[pairs]
      np.maximum.at(highest, i, values)
      np.maximum.at(highest, j, values)
      _join(group, i, j)
  return _roots(group, np.arange(n)), highest


def _join(group, i, j):
  """Joins the groups of i[x] and j[x]: `group` leads each row to a lower one of its group, and the lowest to itself."""
  edges = np.stack([_roots(group, i), _roots(group, j)])
  nodes, at = np.unique(edges, return_inverse=True)
  a, b = at.reshape(edges.shape)
  graph = coo_matrix((np.ones(len(a), np.int8), (a, b)), (len(nodes), len(nodes)))
  _, part = connected_components(graph, directed=False)
  lowest = np.full(len(nodes), np.iinfo(np.int64).max)
  np.minimum.at(lowest, part, nodes)
  group[nodes] = lowest[part]


def _roots(group, rows):
  while np.any((above := group[rows]) != rows):
    rows = above
  return rows


@functools.partial(jax.jit, donate_argnums=0)
def _nearer(best, queries, rows, itself, start, count):
  """The nearest rows of those found before and of a chunk, whose first row is `start` and has `count` rows."""
  values, found = best
  k, place = values.shape[1], jnp.arange(len(rows), dtype=jnp.int32)[None]
  counts = (place < count) & (start + place != itself[:, None])
  similarity = jnp.where(counts, _cosine(queries, rows), -jnp.inf)
  # What was found before comes first: top_k keeps the lower row where similarities are equal.
  values, at = lax.top_k(jnp.concatenate([values, similarity], axis=1), k)
  before = jnp.take_along_axis(found, jnp.minimum(at, k - 1), axis=1)
  return values, jnp.where(at < k, before, start + at - k).astype(jnp.int32)


@jax.jit
def _similarities(queries, rows, least):
  similarity = _cosine(queries, rows)
  return similarity, jnp.any(similarity >= least)


def _cosine(queries, rows):
  return jnp.matmul(_unit(queries), _unit(rows).T, precision=lax.Precision.HIGHEST)


def _unit(x):
  return x * lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-24))


def _chunk(mesh):
  return CHUNK if mesh.devices.flat[0].platform == "cpu" else CHUNK_OF_ACCELERATORS


def _padded(x, rows, fill=0):
  """float32 or int32 rows of one number, so that one program serves all blocks."""
  x = np.asarray(x, np.int32 if x.dtype.kind == "i" else np.float32)
  return np.pad(x, ((0, rows - len(x)), *((0, 0),) * (x.ndim - 1)), constant_values=fill)
