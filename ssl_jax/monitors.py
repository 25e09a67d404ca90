"""Collapse monitors: statistics of the embeddings that show representation collapse, and a warning about it."""

import math
from typing import Any

import jax
import jax.numpy as jnp

_ROWS = 256  # of the Gram matrix: enough to detect collapse, at negligible cost
# Below these a batch of embeddings counts as collapsed. Random ones have a standard deviation of about 1 and a rank of
# about min(rows, d); a healthy ViT may start at a rank of 1.6.
COLLAPSED_STD, COLLAPSED_RANK = 0.1, 1.1
UNIFORM_TEACHER, ONE_PROTOTYPE = 0.995, 0.1  # entropies as shares of log K


def measure(embedding: jax.Array, marginal: jax.Array | None = None) -> dict[str, jax.Array]:
  r"""Collapse monitors of one batch. Alignment and uniformity are those of Wang and Isola, 2020, arXiv:2005.10242.

  Args:
    embedding: float [n, v, d], one view or two of each example, of any norm.
    marginal: float [K], the batch's mean distribution over prototypes, for methods that have them.

  Returns:
    float32 scalars:

    - "feature_std": mean over dimensions of the standard deviation of the unit vectors, times sqrt(d): about 1 where
      they spread evenly, 0 where all are one point;
    - "effective_rank": (sum of eigenvalues)^2 / sum of their squares of the covariance of at most 256 rows, from their
      Gram matrix without an eigendecomposition: between 1 and min(d, rows - 1);
    - "alignment": mean squared distance of an example's two views, 0 to 4; absent for one view;
    - "uniformity": log of the mean of exp(-2 distance^2) over pairs of the same rows, 0 where all are one point;
    - "marginal_entropy": of `marginal`, as a share of log K: near 0 all images are assigned to one prototype, which
      neither the loss nor a k-NN shows; absent without `marginal`.
  """
  z = embedding.astype(jnp.float32)
  z = z * jax.lax.rsqrt(jnp.maximum(jnp.sum(z * z, axis=-1, keepdims=True), 1e-12))
  first = z[:, 0]
  rows = first[:_ROWS]
  n = rows.shape[0]
  centred = rows - jnp.mean(rows, axis=0, keepdims=True)
  with jax.default_matmul_precision("highest"):
    gram, covariance = rows @ rows.T, centred @ centred.T
  pairs = jnp.where(jnp.eye(n, dtype=bool), 0.0, jnp.exp(4.0 * gram - 4.0))  # |a - b|^2 = 2 - 2 <a, b>
  measured = {
    "feature_std": jnp.mean(jnp.std(first, axis=0)) * math.sqrt(z.shape[-1]),
    "effective_rank": jnp.square(jnp.trace(covariance)) / jnp.maximum(jnp.sum(jnp.square(covariance)), 1e-12),
    "uniformity": jnp.log(jnp.sum(pairs) / (n * (n - 1))) if n > 1 else jnp.float32(0),
  }
  if z.shape[1] > 1:
    measured["alignment"] = jnp.mean(jnp.sum(jnp.square(z[:, 0] - z[:, 1]), axis=-1))
  if marginal is not None:
    entropy = -jnp.sum(marginal * jnp.log(jnp.maximum(marginal, 1e-30)))
    measured["marginal_entropy"] = entropy / math.log(marginal.shape[0])
  return measured


def collapse_warning(row: dict[str, Any]) -> str | None:
  """A warning for the user if the monitors of a row of metrics show that the features have collapsed.

  Rows without "alignment" are of a method with one view, which trains for no invariance and so cannot collapse.
  """
  if "alignment" not in row:
    return None
  if row["feature_std"] < COLLAPSED_STD:
    return (
      f"the features have collapsed: at step {row['step']} all images have nearly the same embedding "
      f"(feature_std {row['feature_std']:.3f}, healthy is about 1)."
    )
  if row["effective_rank"] < COLLAPSED_RANK:
    return (
      f"the features have collapsed: at step {row['step']} the embeddings lie on a line "
      f"(effective_rank {row['effective_rank']:.2f}, healthy is many)."
    )
  if row.get("teacher_entropy", 0.0) > UNIFORM_TEACHER:
    return (
      f"the teacher is uniform at step {row['step']} (teacher_entropy {row['teacher_entropy']:.3f} of log K): it tells "
      "nothing. A lower teacher temperature helps."
    )
  if row.get("marginal_entropy", 1.0) < ONE_PROTOTYPE:
    return (
      f"the teacher has collapsed: at step {row['step']} nearly all images have the same few prototypes "
      f"(marginal_entropy {row['marginal_entropy']:.3f} of log K). The loss is small and means nothing."
    )
  return None
