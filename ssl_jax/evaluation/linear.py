"""Multinomial logistic regression on frozen features, with an L2 penalty: a sweep of penalties in one program."""

import functools
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike

from ssl_jax.evaluation.knn import check_finite

_STEPS, _ROUNDS = 100, 20  # steps of L-BFGS in the same coordinates, and how often these are renewed
_TOLERANCE = {8: 1e-8, 4: 1e-6}  # of the objective, by the bytes of a number: where the solver stops
_TOLD = 100  # times that: a gap that a user is warned of
_CHOICE = 1e-4  # of the objective, where penalties are compared by the answers: more digits change next to none of them
_PATIENCE = 8  # penalties in a row that are worse than the best, after which larger C are not tried
# Bytes of the features' rows that are made wide and centred at once. 4 MiB stay in a CPU's cache; for accelerators
# 256 MiB, since blocks follow one after the other and small ones leave them idle (chosen by size, not measured).
_BLOCK, _BLOCK_OF_ACCELERATORS = 4 << 20, 256 << 20


class LogisticRegression(NamedTuple):
  """Solutions for P penalties; the classes' logits are features @ coef[p].T + intercept[p].

  Attributes:
    coef: [P, K, d].
    intercept: [P, K], of mean zero over the classes.
    objective: [P].
    gap: [P], how far each objective is above its minimum at most, as a share of it: the duality gap, in which the
      part of an intercept that is not quite at its own minimum is estimated.
  """

  coef: np.ndarray
  intercept: np.ndarray
  objective: np.ndarray
  gap: np.ndarray


def logistic_regression(
  features: ArrayLike, labels: ArrayLike, *, C: ArrayLike, num_classes: int | None = None
) -> LogisticRegression:
  r"""Fits L2-penalised multinomial logistic regression by L-BFGS, for all penalties in one program on the device.

  .. math:: \min_{W, b} \; \sum_i -\log \operatorname{softmax}(W x_i + b)_{y_i} + \frac{1}{2 C} \lVert W \rVert^2

  The intercept is not penalised. Features are taken as they are; inside, the solver works on the centred ones in
  coordinates in which the problem is about round, which does not change the answer, so that their scales cost nothing.

  Args:
    features: float [N, d].
    labels: int [N], in [0, num_classes).
    C: positive, a number or [P]: the inverse penalty, scikit-learn's C.
    num_classes: None: the largest label + 1.

  Returns:
    LogisticRegression: float64 on CPUs and GPUs; elsewhere computed in float32, where objectives are good to about 1e-5
    and coefficients to 1e-2 of the largest. A number C gives P = 1, and two classes too are two rows of coef. Where a
    `gap` is above 1e-6 (float32: 1e-4), after 2,000 steps, a warning says so.

  Raises:
    TypeError: features that are not floating point, labels that are not integers, C that is not a number.
    ValueError: shapes that do not fit or are empty, labels out of range or of fewer than two classes, features that are
      not finite, C that is not positive.

  Reference: scikit-learn's `LogisticRegression`, whose objective is C times this one; DINOv2's eval/log_regression.py.
  """
  x, y, penalties = np.asarray(features), np.asarray(labels), np.atleast_1d(np.asarray(C))
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(f"features must be floating point, got {x.dtype}.")
  if x.ndim != 2 or 0 in x.shape:
    raise ValueError(f"features must be [N, d] and not empty, got {list(x.shape)}.")
  if y.shape != x.shape[:1]:
    raise ValueError(f"labels must be [{len(x)}], one a row of features, got {list(y.shape)}.")
  if not np.issubdtype(y.dtype, np.integer):
    raise TypeError(f"labels must be integers, got {y.dtype}.")
  num_classes = int(y.max()) + 1 if num_classes is None else num_classes
  if num_classes < 2:
    raise ValueError(f"num_classes must be at least 2, got {num_classes}.")
  if y.min() < 0 or y.max() >= num_classes:
    raise ValueError(f"labels must be in [0, {num_classes}), got {y.min()} to {y.max()}.")
  if y.min() == y.max():  # the intercepts would grow for ever
    raise ValueError(f"labels must be of at least two classes, all are {y.min()}.")
  if penalties.dtype.kind not in "iuf":
    raise TypeError(f"C must be a number or an array of numbers, got {C!r}.")
  if penalties.ndim != 1 or not penalties.size or not (np.isfinite(penalties) & (penalties > 0)).all():
    raise ValueError(f"C must be positive and finite, a number or [P], got {C!r}.")
  check_finite(features=x)

  order = np.argsort(penalties)
  with jax.enable_x64(_is_wide()):
    x, mean, block = _prepared(x)
    found = _solve(x, mean, jnp.asarray(y), jnp.asarray(penalties[order], mean.dtype), num_classes, block)
    coef, intercept, objective, gap = (np.asarray(part)[np.argsort(order)] for part in found)
  intercept = intercept - coef @ mean
  solution = LogisticRegression(coef, intercept - intercept.mean(axis=1, keepdims=True), objective, gap)
  if (missed := solution.gap > _TOLD * _TOLERANCE[mean.itemsize]).any():
    those = ", ".join(f"{c:g}" for c in np.sort(penalties[missed]))
    warnings.warn(
      f"logistic regression with C = {those} did not reach its minimum in {_STEPS * _ROUNDS} steps: the objective may "
      f"be {100 * solution.gap.max():.2g} % above it.",
      stacklevel=2,
    )
  return solution


def choose_penalty(
  features: np.ndarray, labels: np.ndarray, held: np.ndarray, penalties: Sequence[float], num_classes: int
) -> tuple[float, int]:
  """The C whose classifier of the other rows gives the held-out ones most right answers; of equals the smallest.

  They are tried in ascending order, until eight in a row were worse than the best before them: the largest take nearly
  all of the time, as their minima lie far out.

  Args:
    features: float [N, d].
    labels: int [N], in [0, num_classes); those of the rows that are not held out have to be two classes at least.
    held: bool [N], which rows are held out: some, and not all.
    penalties: positive.
    num_classes: as above.

  Returns:
    (C, how many were tried).
  """
  check_finite(features=features)
  ordered = np.sort(np.asarray(penalties))
  with jax.enable_x64(_is_wide()):
    x, mean, block = _prepared(features[~held])
    others = features[held].astype(mean.dtype) - mean
    given = x, mean, jnp.asarray(labels[~held]), jnp.asarray(others), jnp.asarray(labels[held])
    correct = np.asarray(_count_correct(*given, jnp.asarray(ordered, mean.dtype), num_classes, block))
  return float(ordered[np.argmax(correct)]), int(np.sum(correct >= 0))


def _is_wide():
  return jax.default_backend() in ("cpu", "gpu")  # TPUs have no float64 of their own


def _prepared(x):
  """(features on the device, their mean in the type of the computation, how many rows are widened at once)."""
  mean = x.mean(axis=0, dtype=np.float64 if _is_wide() else np.float32)
  at_once = _BLOCK if jax.default_backend() == "cpu" else _BLOCK_OF_ACCELERATORS
  block = min(len(x), max(1, at_once // (mean.itemsize * len(mean))))
  x = x if x.dtype == np.float64 else x.astype(np.float32, copy=False)  # wide a block at a time, and never all
  return jnp.asarray(x), mean, block


@functools.partial(jax.jit, static_argnums=(4, 5))
def _solve(x, mean, y, penalties, num_classes, block):
  """(coef, intercept, objective, gap) of features x and their mean, for penalties in ascending order.

  One after the other, each from the last one's solution. Six at a time side by side (vmap) took three times as long on
  a CPU: they need from 2 to 1,000 steps, and each waits for the slowest of its six.
  """
  zeros, solve = _solver(x, mean, y, num_classes, block, _TOLERANCE[mean.dtype.itemsize])
  return lax.scan(solve, zeros, penalties)[1]


@functools.partial(jax.jit, static_argnums=(6, 7))
def _count_correct(x, mean, y, held_x, held_y, penalties, num_classes, block):
  """How many of the held-out rows, centred, are answered right with each of the ascending penalties; -1: not tried."""
  zeros, solve = _solver(x, mean, y, num_classes, block, _CHOICE)

  def tried(start, c):
    (w, b), _ = solve(start, c)
    answers = jnp.argmax(jnp.matmul(held_x, w, precision=lax.Precision.HIGHEST) + b[None], axis=1)
    return (w, b), jnp.sum(answers == held_y)

  def along(carry, c):
    start, most, behind = carry
    skipped = lambda start, c: (start, jnp.full_like(most, -1))  # noqa: E731
    start, correct = lax.cond(behind < _PATIENCE, tried, skipped, start, c)
    behind = jnp.where(correct >= most, 0, behind + 1)  # Ties go on: the smallest may all answer with one class.
    return (start, jnp.maximum(most, correct), behind), correct

  return lax.scan(along, (zeros, jnp.sum(held_y < 0) - 1, 0), penalties)[1]


def _solver(x, mean, y, num_classes, block, tolerance):
  """((w, b) to start from, (start, C) -> ((w, b), (coef, intercept, objective, gap))).

  Features are centred, and widened to the mean's type, a block of rows at a time.
  """
  (n, d), dtype = x.shape, mean.dtype
  matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

  def total(function):
    """The sum over blocks of function(centred features [block, d], wanted classes [block, K], 1 or 0 [block, 1])."""

    def add(sums, start):
      # The last block is moved back to fit; what it repeats is masked.
      first = jnp.minimum(start, n - block)
      counts = (first + jnp.arange(block) >= start)[:, None].astype(dtype)
      rows = counts * (lax.dynamic_slice_in_dim(x, first, block).astype(dtype) - mean[None])
      wanted = jax.nn.one_hot(lax.dynamic_slice_in_dim(y, first, block), num_classes, dtype=dtype)
      return jax.tree.map(jnp.add, sums, function(rows, wanted, counts)), None

    parts = (jax.ShapeDtypeStruct((block, k), dtype) for k in (d, num_classes, 1))
    nothing = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(function, *parts))
    return lax.scan(add, nothing, jnp.arange(0, n, block))[0]

  if n < d:  # The solution is a combination of the images' features: what is orthogonal to all of them stays 0.
    centred = x.astype(dtype) - mean[None]
    span, _ = jnp.linalg.qr(centred.T)  # [d, n]
    within = matmul(centred, span)
    curvature, axes = jnp.linalg.eigh(matmul(within.T, within))
    axes = matmul(span, axes)
  else:
    curvature, axes = jnp.linalg.eigh(total(lambda rows, *_: matmul(rows.T, rows)))
  curvature = jnp.maximum(curvature, 0)  # as it is but for rounding
  optimizer = optax.lbfgs(memory_size=20)

  def losses(w, b):
    """The sum of cross-entropies, whose gradient comes with it in one pass over the features."""
    at = lax.stop_gradient((w, b))

    def part(rows, wanted, counts):
      out = matmul(rows, at[0]) + at[1][None]
      level = jax.nn.logsumexp(out, axis=1, keepdims=True)
      residual = counts * (jnp.exp(out - level) - wanted)
      value = jnp.sum(counts * (level - jnp.sum(wanted * out, axis=1, keepdims=True)))
      return value, matmul(rows.T, residual), jnp.sum(residual, axis=0)

    value, by_w, by_b = total(part)
    return value + jnp.sum((w - at[0]) * by_w) + jnp.sum((b - at[1]) * by_b)  # the last two are 0, and differentiable

  def solve(start, c):
    def one_round(carry):
      w, b, _, _, i = carry

      # If every logit weighed the same in the Hessian, p (1 - p), it would be weight x.T @ x + 1 / C for each class:
      # the identity along the eigenvectors, in units of its square root. The weight falls by orders of magnitude on the
      # way to a large C, and so the coordinates are renewed, and L-BFGS begins anew, after some steps.
      def spread(rows, _, counts):
        p = jax.nn.softmax(matmul(rows, w) + b[None])
        return jnp.sum(counts * p * (1 - p))

      weight = total(spread) / (n * num_classes) + jnp.finfo(dtype).eps
      unit, unit_b = 1 / jnp.sqrt(weight * curvature + 1 / c), 1 / jnp.sqrt(weight * n)

      def unfold(z):
        return matmul(axes, unit[:, None] * z[:-1]), unit_b * z[-1]

      def objective(z):
        w, b = unfold(z)
        return losses(w, b) + jnp.sum(w * w) / (2 * c)

      def gap(value, gradient):
        # The duality gap, C / 2 |dL/dW|^2, where dL/db is zero; else an estimate of what b adds besides.
        by_w, by_b = jnp.sum(jnp.square(gradient[:-1] / unit[:, None])), jnp.sum(jnp.square(gradient[-1]))
        return (c / 2 * by_w + by_b) / value

      def step(carry):
        z, state, value, gradient, j = carry
        updates, state = optimizer.update(gradient, state, z, value=value, grad=gradient, value_fn=objective)
        value, gradient = (optax.tree.get(state, name) for name in ("value", "grad"))  # where the line search ended
        return optax.apply_updates(z, updates), state, value, gradient, j + 1

      def goes_on(carry):
        _, _, value, gradient, j = carry
        return (gap(value, gradient) > tolerance) & (j < _STEPS)

      z = jnp.concatenate([matmul(axes.T, w) / unit[:, None], b[None] / unit_b])
      start = z, optimizer.init(z), *jax.value_and_grad(objective)(z), 0
      z, _, value, gradient, _ = lax.while_loop(goes_on, step, start)
      return *unfold(z), value, gap(value, gradient), i + 1

    nothing = *start, *jnp.full(2, jnp.inf, dtype), 0
    w, b, value, gap, _ = lax.while_loop(
      lambda carry: (carry[3] > tolerance) & (carry[4] < _ROUNDS), one_round, nothing
    )
    return (w, b), (w.T, b, value, gap)

  return (jnp.zeros((d, num_classes), dtype), jnp.zeros(num_classes, dtype)), solve
