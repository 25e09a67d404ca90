"""How embeddings are distributed: as an isotropic Gaussian (SIGReg, in LeJEPA) or far apart (KoLeo, in DINOv2)."""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import (
  by_rows,
  check_block_size,
  check_input,
  check_temperature,
  check_whole,
  unit,
  wide,
)


def sigreg(
  z: jax.Array,
  directions: jax.Array,
  *,
  t_max: float = 3.0,
  knots: int = 17,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Sketched isotropic Gaussian regularisation: the Epps-Pulley statistic against N(0, 1), averaged over slices.

  With :math:`x_n = \langle z_n, a \rangle` for a direction a, and :math:`\varphi(t) = e^{-t^2 / 2}`:

  .. math:: L = \frac{1}{K} \sum_a N \int_{-t_{max}}^{t_{max}}
      \Bigl| \frac{1}{N} \sum_n e^{i t x_n} - \varphi(t) \Bigr|^2 \varphi(t) \, dt

  by the trapezoidal rule. The integrand is even: `knots` points on [0, t_max] do, of which the inner ones count twice.

  Args:
    z: float [N, d], embeddings of one view, not normalised.
    directions: float [d, K], columns of unit norm, used as given: the same on every device and best drawn anew in every
      step. Takes no gradient.
    t_max: > 0, where the integral ends.
    knots: at least 2, on [0, t_max]. The official code's 17 are the default; the paper's 17 on [-5, 5] are `t_max=5.0`
      and `knots=9`. Values of different knots cannot be compared.
    axis_name: mapped axis over which the batch is split; N is then that of the global batch.
    block_size: how many slices exist at once. They are recomputed in the backward pass, so that memory is
      O(N (d + block_size knots)). None: all of small problems, and of larger ones as many as have 2^20 numbers on a CPU
      and 2^24 elsewhere.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0, the same on every device: about 1.05 for standard normal
    embeddings whatever N is; 0.402 N where all are zero.

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError: an input is not floating point, `t_max` is not a number, or `knots` or `block_size` is not an integer.
    ValueError: shapes do not fit or have an empty axis, `t_max` is not positive and finite, there are fewer than two
      knots, or `block_size` is below one.

  Reference: Balestriero and LeCun, 2025, arXiv:2511.08544; univariate/epps_pulley.py and multivariate/slicing.py of
  rbalestr-lab/lejepa.
  """
  check_input("z", z)
  if z.ndim != 2:
    raise ValueError(f"z must have shape [N, d], got {z.shape}.")
  return _mean_statistic(z[None], directions, t_max, knots, axis_name, block_size)


def lejepa_loss(
  views: jax.Array,
  directions: jax.Array,
  *,
  global_views: int,
  weight: float | jax.Array = 0.05,
  t_max: float = 3.0,
  knots: int = 17,
  axis_name: str | None = None,
  block_size: int | None = None,
) -> jax.Array:
  r"""Distance of all views of an image from the mean of its global views, and SIGReg of each view (LeJEPA).

  With :math:`\mu_n` the mean of the first G views of image n, through which the gradient flows too:

  .. math:: L = (1 - w) \frac{1}{V N d} \sum_{vn} \lVert z_{vn} - \mu_n \rVert^2 + w \frac{1}{V} \sum_v SIGReg(z_v)

  Args:
    views: float [V, N, d], projections, not normalised; the global views come first.
    directions: float [d, K], see `sigreg`.
    global_views: G, from 1 to V.
    weight: w, in [0, 1]. The paper's equation sums over d where its code takes the mean, to which its weights belong.
    t_max, knots, axis_name, block_size: see `sigreg`; a block's numbers are those of all views.

  Returns:
    float32 scalar (float64 for float64 inputs), >= 0, the same on every device.

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError, ValueError: as for `sigreg`; also `global_views` that are not a whole number from 1 to V.

  Reference: Balestriero and LeCun, 2025, arXiv:2511.08544, and the listing in MINIMAL.md of rbalestr-lab/lejepa, where
  all views are global.
  """
  check_input("views", views)
  if views.ndim != 3:
    raise ValueError(f"views must have shape [V, N, d], got {views.shape}.")
  check_whole("global_views", global_views, 1)
  if global_views > views.shape[0]:
    raise ValueError(f"global_views must be at most the number of views, {views.shape[0]}, got {global_views}.")
  gaussian = _mean_statistic(views, directions, t_max, knots, axis_name, block_size)
  z = wide(views)
  invariance = jnp.mean(jnp.square(z - jnp.mean(z[:global_views], axis=0, keepdims=True)))
  if axis_name is not None:
    invariance = lax.pmean(invariance, axis_name)
  return (1 - weight) * invariance + weight * gaussian


def koleo_loss(x: jax.Array, *, axis_name: str | None = None, block_size: int | None = None) -> jax.Array:
  r"""Minus the mean log distance of each unit vector to its nearest neighbour (Kozachenko-Leonenko entropy).

  With x scaled to unit norm inside, j(i) the row other than i with the largest cosine, and eps = 1e-8:

  .. math:: L = - \frac{1}{N} \sum_i \log ( \lVert x_i - x_{j(i)} + \epsilon \rVert + \epsilon )

  The gradient flows to both vectors of a pair.

  Args:
    x: float [N, d], embeddings of one crop of each image: with both crops of an image in one batch they would be each
      other's neighbours. Any norm from 1e-6 to 1e19 is scaled to one; a zero vector stays zero,
      and a larger norm gives NaN.
    axis_name: mapped axis over which the batch is split; neighbours are then looked for in the global batch. The
      official DINOv2 looks among those of the same device: leave it out for that, and average the devices' losses.
    block_size: how many rows of the [N, N] cosines exist at once. None: all of small batches, and of larger ones as
      many as have 2^20 cosines on a CPU and 2^24 elsewhere.

  Returns:
    float32 scalar (float64 for float64 inputs), the same on every device: from -log 2, reached by two opposite vectors,
    up. Equal rows give up to 17.7 and a gradient of up to 1e8, which float16 cannot hold. DINOv2 sums it over the two
    global crops and weights it with 0.1.

  Gradients over a mapped axis: as for `nt_xent`.

  Raises:
    TypeError: x is not floating point, or `block_size` is not an integer.
    ValueError: x is not [N, d] or has an empty axis, the global batch has fewer than two images, or `block_size` is
      below one.

  Reference: Sablayrolles et al., 2019, arXiv:1806.03198, and Oquab et al., 2023, arXiv:2304.07193, section 4;
  loss/koleo_loss.py of facebookresearch/dinov2.
  """
  check_input("x", x)
  if x.ndim != 2:
    raise ValueError(f"x must have shape [N, d], got {x.shape}.")
  check_block_size(block_size)
  x = unit(x)
  others = x if axis_name is None else lax.all_gather(x, axis_name, tiled=True)
  first = 0 if axis_name is None else lax.axis_index(axis_name) * x.shape[0]
  if others.shape[0] < 2:
    raise ValueError("koleo_loss needs a batch of at least two images for its neighbours, got 1.")
  nearest = _nearest_others(x, others, first, block_size)
  distance = jnp.sqrt(jnp.sum(jnp.square(x - others[nearest] + 1e-8), axis=-1))
  loss = -jnp.mean(jnp.log(distance + 1e-8))
  return loss if axis_name is None else lax.pmean(loss, axis_name)


def _mean_statistic(views, directions, t_max, knots, axis_name, block_size):
  """Epps-Pulley of [V, N, d], averaged over views and slices."""
  check_input("directions", directions)
  if directions.ndim != 2 or directions.shape[0] != views.shape[-1]:
    raise ValueError(f"directions must have shape [{views.shape[-1]}, K], got {directions.shape}.")
  check_temperature("t_max", t_max)
  check_whole("knots", knots, 2)
  check_block_size(block_size)
  z = wide(views)
  n = z.shape[1] * (1 if axis_name is None else lax.axis_size(axis_name))
  t = jnp.asarray(t_max, z.dtype) * jnp.linspace(0, 1, knots, dtype=z.dtype)
  normal = jnp.exp(-jnp.square(t) / 2)
  trapezoids = jnp.full(knots, 2, z.dtype).at[jnp.array([0, -1])].set(1) * t[1]

  @jax.checkpoint  # Else the backward pass would keep the angles of all slices.
  def characteristic(direction):
    """Real and imaginary part of the mean of exp(i t x), [2, V, knots]."""
    angles = (z @ direction)[..., None] * t[None, None]  # [V, N, knots]
    return jnp.stack([jnp.mean(jnp.cos(angles), axis=1), jnp.mean(jnp.sin(angles), axis=1)])

  slices = lax.stop_gradient(directions).astype(z.dtype).T
  with jax.default_matmul_precision("highest"):
    parts = by_rows(characteristic, slices, z.shape[0] * z.shape[1] * knots, block_size)  # [K, 2, V, knots]
  if axis_name is not None:
    parts = lax.pmean(parts, axis_name)
  distance = jnp.square(parts[:, 0] - normal[None, None]) + jnp.square(parts[:, 1])
  return n * jnp.mean(jnp.sum(distance * (trapezoids * normal)[None, None], axis=-1))


def _nearest_others(x, others, first, block_size):
  """For each row of x, which is row `first`, first + 1, ... of `others`, the index of the nearest other row, [n]."""
  x, others = lax.stop_gradient((x, others))

  def nearest(row):
    vector, place = row
    return jnp.argmax(jnp.where(jnp.arange(others.shape[0]) == place, -jnp.inf, others @ vector))

  with jax.default_matmul_precision("highest"):
    return by_rows(nearest, (x, first + jnp.arange(x.shape[0])), len(others), block_size)
