"""Linear heads on frozen features as DINOv2 trains them: all inputs and learning rates at once, in one program.

As in eval/linear.py of facebookresearch/dinov2: softmax regression by SGD with momentum 0.9, no weight decay, a cosine
to 0 over all steps, weights from N(0, 0.01^2), the learning rate times batch / 256; a head for each learning rate and
each input: the class tokens of the last blocks, without and with the mean of the patches' tokens. It differs in two
things. The official code reads random crops and flips; this reads the images as evaluation sees them, whose features
are computed once. And the official code reports the head that is best on the very images that it is scored on; here a
held-out tenth of the training images chooses, and the chosen head is trained again on all of them.
"""

import functools
from collections.abc import Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from ssl_jax.errors import UserError
from ssl_jax.evaluation.probe import hold_out
from ssl_jax.evaluation.scores import Scored, scored

RATES = (*(m * 10.0**e for e in (-5, -4, -3, -2) for m in (1, 2, 5)), 0.1)
EPOCHS, BATCH = 10, 1_024
LEAST_STEPS = 1_000  # of a few thousand images ten epochs are no training
_MOMENTUM, _INIT_STD = 0.9, 0.01
_AT_ONCE = 64 << 20  # bytes of features on the device; steps that fit are one call


def inputs(blocks: Sequence[int], dim: int) -> dict[str, slice]:
  """What heads read of features as `features.reading` gives them by "cls+mean" of max(blocks) blocks of width `dim`."""
  most = max(blocks)
  found: dict[str, slice] = {}
  for n in sorted(set(blocks)):
    name = f"{n} block{'s' if n > 1 else ''}"
    found |= {name: slice((most - n) * dim, most * dim), f"{name} and mean": slice((most - n) * dim, (most + 1) * dim)}
  return found


def score(
  features: np.ndarray,
  labels: np.ndarray,
  test_features: np.ndarray,
  test_labels: np.ndarray,
  *,
  reads: Mapping[str, slice],
  rates: Sequence[float],
  steps: int | None,
  batch_size: int,
  rng: np.random.Generator,
) -> Scored:
  """The answers of the chosen head, trained again on all images; its input, and its learning rate as it was.

  Args:
    features, labels: float32 [N, d] and int [N], the training images'.
    test_features, test_labels: of the images that are scored.
    reads: the columns of the features that a head reads, by the input's name.
    rates: learning rates, which are multiplied by batch / 256.
    steps: of the training; None: 10 epochs, as the official code has of ImageNet, and at least 1,000 steps.
    batch_size: images of a step; at most all there are.
    rng: draws the held-out images, the heads' first weights and the batches.

  Raises:
    UserError: none of the heads ended at finite weights.
  """
  num_classes = int(labels.max()) + 1
  steps = steps or max(LEAST_STEPS, EPOCHS * len(features) // batch_size)
  fit = functools.partial(train, steps=steps, batch_size=batch_size, num_classes=num_classes, rng=rng)
  name, rate = next(iter(reads)), rates[0]
  if len(reads) * len(rates) > 1:
    held = hold_out(labels, rng)
    heads = fit(features[~held], labels[~held], reads=reads, rates=rates)
    right = {read: _count_right(heads[read], features[held][:, reads[read]], labels[held]) for read in reads}
    best = max(((read, r) for read in reads for r in range(len(rates))), key=lambda at: right[at[0]][at[1]])
    name, rate = best[0], rates[best[1]]  # of equals the first
  weight, bias = (x[0] for x in fit(features, labels, reads={name: reads[name]}, rates=(rate,))[name])
  if not np.isfinite(weight).all():
    raise UserError("the heads' training is not finite at any of the learning rates: give smaller ones by --rates.")
  logits = test_features[:, reads[name]] @ weight + bias
  scaled = rate * min(batch_size, len(features)) / 256
  return scored(logits, test_labels, {"input": name, "learning_rate": scaled})


def train(
  features: np.ndarray,
  labels: np.ndarray,
  *,
  reads: Mapping[str, slice],
  rates: Sequence[float],
  steps: int,
  batch_size: int,
  num_classes: int,
  rng: np.random.Generator,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """Trains a head for each of R rates on each input; arguments as of `score`.

  Returns:
    (weight [R, d', K], bias [R, K]) by the input's name. A head that diverges is not finite, and stops no other.
  """
  batch_size = min(batch_size, len(features))
  chunk = min(steps, max(1, _AT_ONCE // (4 * batch_size * features.shape[1])))
  heads = {}
  for name, columns in reads.items():
    d = features[:1, columns].shape[1]
    weight = _INIT_STD * rng.standard_normal((len(rates), d, num_classes), dtype=np.float32)
    heads[name] = weight, np.zeros((len(rates), num_classes), np.float32)
  scales = np.array([rate * batch_size / 256 for rate in rates], np.float32)
  state = heads, jax.tree.map(np.zeros_like, heads)
  spans = tuple((name, *columns.indices(features.shape[1])[:2]) for name, columns in reads.items())
  for first, at in zip(range(0, steps, chunk), _orders(len(features), batch_size, chunk, rng), strict=False):
    state = _steps(state, features[at], labels[at].astype(np.int32), first, scales, steps, spans)
  return jax.device_get(state[0])


def _orders(n: int, batch_size: int, chunk: int, rng: np.random.Generator) -> Iterator[np.ndarray]:
  """Yields int [chunk, batch_size]: one order of all n images after the other, cut into batches."""
  left = rng.permutation(n)
  while True:
    parts = [left]
    while sum(map(len, parts)) < chunk * batch_size:
      parts.append(rng.permutation(n))
    left = np.concatenate(parts)
    yield left[: chunk * batch_size].reshape(chunk, batch_size)
    left = left[chunk * batch_size :]


@functools.partial(jax.jit, static_argnames="spans", donate_argnums=0)
def _steps(state, features, labels, first, rates, steps, spans):
  """S steps of all heads: features [S, B, d]. Steps from `steps` on change nothing: they fill the last call up."""

  def loss(head, x, y):
    weight, bias = head
    return jnp.mean(optax.losses.softmax_cross_entropy_with_integer_labels(x @ weight + bias[None], y))

  gradient = jax.vmap(jax.grad(loss), (0, None, None))

  def step(state, batch):
    heads, momenta = state
    x, y, t = batch
    left = jnp.where(t < steps, 0.5 * (1 + jnp.cos(jnp.pi * t / steps)), 0.0)
    gradients = {name: gradient(heads[name], x[:, start:stop], y) for name, start, stop in spans}
    momenta = jax.tree.map(lambda m, g: _MOMENTUM * m + g, momenta, gradients)

    def move(p, m):
      return p - (left * rates).reshape(-1, *(1,) * (p.ndim - 1)) * m

    return (jax.tree.map(move, heads, momenta), momenta), None

  with jax.default_matmul_precision("highest"):
    return lax.scan(step, state, (features, labels, first + jnp.arange(len(features))))[0]


def _count_right(head, features, labels, block=4096):
  """int [R]: how many images each of R heads answers rightly; -1 where it is not finite."""
  weight, bias = head
  finite = np.isfinite(weight).all(axis=(1, 2)) & np.isfinite(bias).all(axis=1)
  right = np.where(finite, 0, -1)
  for i in range(0, len(features), block):
    logits = np.einsum("nd,rdk->rnk", features[i : i + block], weight[finite], optimize=True) + bias[finite, None]
    right[finite] += np.sum(np.argmax(logits, axis=2) == labels[i : i + block], axis=1)
  return right
