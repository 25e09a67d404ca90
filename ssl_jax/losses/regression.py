"""Regression losses: match a prediction to a target that takes no gradient."""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import check_input, unit


def byol_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
  r"""Squared distance of two L2-normalised vectors (BYOL), one direction.

  .. math:: L = \frac{1}{N} \sum_i \lVert \bar p_i - \bar z_i \rVert^2
      = \frac{1}{N} \sum_i 2 - 2 \langle \bar p_i, \bar z_i \rangle

  Args:
    prediction: float [..., d], the online network's prediction. Any norm from 1e-6 to 1e19 is scaled to one; a zero
      vector stays zero, and a larger norm gives NaN.
    target: float [..., d], the target network's projection of the other view. Takes no gradient.

  Returns:
    float32 scalar (float64 for float64 inputs) in [0, 4], the mean over all leading axes: 0 for equal directions, 2 for
    orthogonal, 4 for opposite ones. BYOL's loss is the sum of two calls, prediction 1 with target 2 and the reverse.

  Raises:
    TypeError: an input is not floating point.
    ValueError: the shapes differ or are empty.

  Reference: Grill et al., 2020, arXiv:2006.07733, eq. 2; `regression_loss` in byol/utils/helpers.py of
  deepmind-research.
  """
  _check_shapes(prediction, target)
  distance = jnp.sum(jnp.square(unit(prediction) - unit(lax.stop_gradient(target))), axis=-1)
  return jnp.mean(distance)


def simsiam_loss(prediction: jax.Array, target: jax.Array) -> jax.Array:
  r"""Negative cosine similarity (SimSiam), one direction.

  .. math:: L = - \frac{1}{N} \sum_i \langle \bar p_i, \bar z_i \rangle

  Args:
    prediction: float [..., d], the predictor's output. Any norm from 1e-6 to 1e19 is scaled to one; a zero vector stays
      zero, and a larger norm gives NaN.
    target: float [..., d], the projection of the other view by the same network. Takes no gradient.

  Returns:
    float32 scalar (float64 for float64 inputs) in [-1, 1], the mean over all leading axes: -1 for equal directions, 0
    for orthogonal ones. SimSiam's loss is half the sum of two calls, prediction 1 with target 2 and the reverse.

  Raises:
    TypeError: an input is not floating point.
    ValueError: the shapes differ or are empty.

  Reference: Chen and He, 2021, arXiv:2011.10566, eq. 1 and 2; main_simsiam.py of facebookresearch/simsiam.
  """
  _check_shapes(prediction, target)
  return -jnp.mean(jnp.sum(unit(prediction) * unit(lax.stop_gradient(target)), axis=-1))


def _check_shapes(prediction, target):
  for name, x in (("prediction", prediction), ("target", target)):
    check_input(name, x)
  if prediction.shape != target.shape:
    raise ValueError(f"prediction and target must have one shape [..., d], got {prediction.shape} and {target.shape}.")
