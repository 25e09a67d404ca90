"""sigreg, lejepa_loss and koleo_loss: official numbers, the papers' formulas in NumPy, blocks and what they cost."""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import equations
from test_losses import assert_near_largest

from ssl_jax.losses import koleo_loss, lejepa_loss, sigreg

jit_sigreg = jax.jit(sigreg, static_argnames=("t_max", "knots", "block_size"))
jit_lejepa = jax.jit(lejepa_loss, static_argnames=("global_views", "t_max", "knots"))
jit_koleo = jax.jit(koleo_loss, static_argnames="block_size")
KNOTS = {"t3": {}, "t5": dict(t_max=5.0, knots=9)}  # of the official code, and of the paper


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)


def tolerance(dtype):
  return 1e-5 if dtype == jnp.float32 else 1e-6  # inputs and gradients are stored in float32


def unit(x, axis=-1):
  return x / np.linalg.norm(x, axis=axis, keepdims=True)


def epps_pulley(x, t_max, points):
  """N times the integral of |E exp(itx) - phi|^2 phi over [-t_max, t_max], by as many trapezoids."""
  t = np.linspace(-t_max, t_max, points)
  phi = np.exp(-t * t / 2)
  distance = np.abs(np.exp(1j * np.outer(t, x)).mean(axis=1) - phi) ** 2
  return len(x) * np.trapezoid(distance * phi, t)


def waves(v, n, d, k):
  """The views and directions of the project's check numbers."""
  v, n, d = np.ogrid[:v, :n, :d]
  views = np.sin(0.3 * v + 0.7 * n + 1.1 * d + 0.05 * n * d)
  directions = np.cos(0.9 * np.outer(1 + np.arange(views.shape[2]), 1 + np.arange(k)))
  return views, unit(directions, axis=0)


# ---- sigreg


@pytest.mark.parametrize("block_size", [None, 5])
@pytest.mark.parametrize("kind", KNOTS)
def test_sigreg_is_the_official_one(golden, dtype, kind, block_size):
  g = golden("lejepa")
  z, directions = (jnp.asarray(g[key], dtype) for key in ("z", "A"))
  loss = functools.partial(sigreg, directions=directions, block_size=block_size, **KNOTS[kind])
  value, grad = jax.jit(jax.value_and_grad(loss))(z)
  assert value.dtype == dtype
  np.testing.assert_allclose(value, g[f"epps_pulley_{kind}/sigreg"], rtol=tolerance(dtype))
  assert_near_largest(grad, g[f"epps_pulley_{kind}/grad_z"], tolerance(dtype))


@pytest.mark.parametrize(
  ("n", "d", "k", "t_max", "knots"), [(1, 1, 1, 3.0, 17), (7, 3, 5, 4.0, 2), (50, 8, 3, 1.0, 30)]
)
def test_sigreg_is_the_papers_integral(x64, n, d, k, t_max, knots):
  rng = np.random.default_rng(0)
  z, directions = 3 * rng.normal(size=(n, d)), rng.normal(size=(d, k))  # whose columns are used as they are
  want = np.mean([epps_pulley(z @ a, t_max, 2 * knots - 1) for a in directions.T])
  np.testing.assert_allclose(jit_sigreg(z, directions, t_max=t_max, knots=knots), want, rtol=1e-12)


def test_sigreg_of_known_samples(x64):
  one = np.ones((1, 1))
  x = np.sin(0.7 * np.arange(64))
  quantiles = [statistics.NormalDist().inv_cdf((i + 0.5) / 64) for i in range(64)]
  for sample, want in ((x, 2.137358), (quantiles, 8.342417e-4), (np.zeros(64), 64 * 0.4020476)):
    # The official code's knots are float32, which shows where the statistic is small.
    np.testing.assert_allclose(jit_sigreg(np.reshape(sample, (64, 1)), one), want, rtol=1e-5)
  np.testing.assert_allclose(jit_sigreg(np.zeros((64, 1)), one, **KNOTS["t5"]), 64 * 0.4089207, rtol=1e-6)


def test_sigreg_of_a_gaussian_does_not_depend_on_the_batch():
  rng = np.random.default_rng(0)
  directions = jnp.float32(unit(rng.normal(size=(32, 256)), axis=0))
  for n in (64, 1024):
    value = jit_sigreg(jnp.float32(rng.normal(size=(n, 32))), directions)
    assert 0.85 < value < 1.25  # 1.05 on average; slices of one batch share its samples


def test_directions_take_no_gradient():
  z, directions = jnp.ones((3, 2)), jnp.eye(2)
  grads = jax.jit(jax.grad(sigreg, argnums=(0, 1)))(z, directions)
  assert np.any(grads[0]) and not np.any(grads[1])


# ---- lejepa_loss


@pytest.mark.parametrize("kind", KNOTS)
def test_lejepa_loss_is_the_official_one(golden, dtype, kind):
  g = golden("lejepa")
  views, directions = (jnp.asarray(g[key], dtype) for key in ("views", "A"))
  loss = functools.partial(lejepa_loss, directions=directions, global_views=2, weight=0.05, **KNOTS[kind])
  value, grad = jax.jit(jax.value_and_grad(loss))(views)
  np.testing.assert_allclose(value, g[f"paper_{kind}_mean/loss"], rtol=tolerance(dtype))
  assert_near_largest(grad, g[f"paper_{kind}_mean/grad"], tolerance(dtype))


def test_lejepa_loss_with_all_views_global_is_the_minimal_listings(golden, dtype):
  g = golden("lejepa")
  views, directions = (jnp.asarray(g[key], dtype) for key in ("views", "A"))
  loss = jax.jit(jax.value_and_grad(functools.partial(lejepa_loss, directions=directions, global_views=4)))
  value, grad = loss(views[:4])
  np.testing.assert_allclose(value, g["minimal/loss"], rtol=tolerance(dtype))
  assert_near_largest(grad, g["minimal/grad"], tolerance(dtype))


def test_lejepa_loss_is_its_parts_and_each_view_is_a_sample_of_its_own(x64):
  views, directions = waves(4, 8, 5, 6)
  each = [jit_sigreg(view, directions) for view in views]
  np.testing.assert_allclose(each, [1.1591192, 1.1134340, 1.0623909, 1.0241444], atol=1e-7)
  np.testing.assert_allclose(jit_sigreg(views.reshape(32, 5), directions), 4.3261840, atol=1e-7)  # what it is not
  loss = functools.partial(jit_lejepa, views, directions, global_views=2)
  np.testing.assert_allclose([loss(weight=0.05), loss(weight=0.0)], [0.1434204, 0.0936124], atol=1e-7)
  np.testing.assert_allclose(loss(weight=1.0), np.mean(each), rtol=1e-12)
  np.testing.assert_allclose(loss(**KNOTS["t5"]), 0.1443972, atol=1e-7)


# ---- koleo_loss


@pytest.mark.parametrize("block_size", [None, 5])
def test_koleo_loss_is_the_official_one(golden, dtype, block_size):
  g = golden("dinov2_losses")

  def loss(x):
    return koleo_loss(x[0], block_size=block_size) + koleo_loss(x[1], block_size=block_size)

  value, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(g["koleo/x"], dtype))
  np.testing.assert_allclose(value, g["koleo/loss"], rtol=tolerance(dtype))
  assert_near_largest(grad, g["koleo/grad"], tolerance(dtype))
  twins = jit_koleo(jnp.asarray(g["koleo/twin_x"], dtype), block_size=block_size)
  np.testing.assert_allclose(twins, g["koleo/twin_loss"], rtol=tolerance(dtype))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (9, 3), (40, 16)])
def test_koleo_loss_is_the_papers_formula(x64, n, d):
  x = np.random.default_rng(0).normal(size=(n, d))
  z = unit(x)
  distances = np.linalg.norm(z[:, None] - z[None] + 2 * np.eye(n)[..., None], axis=-1)  # not to oneself
  np.testing.assert_allclose(
    jit_koleo(x), -np.mean(np.log(distances.min(axis=1) + 1e-8)), rtol=0, atol=1e-6
  )  # both eps


def test_koleo_loss_of_known_rows():
  rows = np.cos(0.9 * np.outer(1 + np.arange(8), 1 + np.arange(4)))
  np.testing.assert_allclose(jit_koleo(jnp.float32(rows)), 2.600831, atol=2e-6)
  opposite = jnp.array([[1.0, 0.0], [-1.0, 0.0]])
  np.testing.assert_allclose(jit_koleo(opposite), -np.log(2), rtol=1e-6)  # whose neighbour is not itself


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_koleo_loss_of_equal_and_of_zero_rows_is_finite_with_its_gradient(dtype):
  for x in (jnp.ones((4, 3), dtype), jnp.zeros((4, 3), dtype)):
    value, grad = jax.jit(jax.value_and_grad(koleo_loss))(x)
    assert np.isfinite(value) and np.isfinite(np.float32(grad)).all()


@pytest.mark.parametrize("loss", [jit_sigreg, jit_koleo], ids=["sigreg", "koleo"])
def test_narrow_inputs_are_computed_in_float32(loss):
  z, directions = (jnp.asarray(x, jnp.bfloat16) for x in waves(1, 8, 5, 6))
  others = (directions,) if loss is jit_sigreg else ()
  value, grad = jax.jit(jax.value_and_grad(loss))(z[0], *others)
  assert value.dtype == jnp.float32 and grad.dtype == jnp.bfloat16
  wide = loss(*(jnp.float32(x) for x in (z[0], *others)))  # of the rounded inputs
  np.testing.assert_allclose(value, wide, rtol=1e-6)


# ---- blocks


def test_blocks_change_neither_value_nor_gradient(x64):
  rng = np.random.default_rng(0)
  views, directions = jnp.asarray(rng.normal(size=(2, 11, 5))), jnp.asarray(rng.normal(size=(5, 11)))
  for loss in (
    lambda views, size: lejepa_loss(views, directions, global_views=1, block_size=size),
    lambda views, size: koleo_loss(views[0], block_size=size),
  ):
    derivatives = jax.jit(jax.value_and_grad(loss), static_argnums=1)
    want, want_grad = derivatives(views, 11)
    value, grad = derivatives(views, np.int32(4))
    np.testing.assert_allclose(value, want, rtol=1e-13)  # float64, another order of summation
    assert_near_largest(grad, want_grad, 1e-13)


def test_memory_grows_with_a_block_and_not_with_all_slices_or_pairs(optimised):
  z, directions = jax.ShapeDtypeStruct((8192, 64), jnp.float32), jax.ShapeDtypeStruct((64, 1024), jnp.float32)

  def temporaries(loss, *shapes):
    return jax.jit(jax.value_and_grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes / 2**20

  assert temporaries(sigreg, z, directions) < 64  # MiB; the angles of all slices are 544
  assert temporaries(koleo_loss, z) < 64  # all cosines are 256


def test_products_are_in_full_precision_in_both_directions():
  z = jnp.ones((8, 4))
  for loss, count in (
    (lambda z: sigreg(z, jnp.ones((4, 6)), block_size=2), 2),
    (lambda z: koleo_loss(z, block_size=2), 1),
  ):
    program = jax.make_jaxpr(jax.grad(loss))(z)  # a CPU has no other precision
    products = [e.params["precision"] for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) >= count and set(products) == {(lax.Precision.HIGHEST,) * 2}


@pytest.mark.parametrize(
  ("call", "error", "shown"),
  [
    (lambda z, a: sigreg(z[0], a), ValueError, r"z must have shape \[N, d\], got \(4,\)"),
    (lambda z, a: sigreg(z, a[:3]), ValueError, r"directions must have shape \[4, K\], got \(3, 6\)"),
    (lambda z, a: sigreg(z.astype(int), a), TypeError, "z must be floating point, got int32"),
    (lambda z, a: sigreg(z, a.astype(int)), TypeError, "directions must be floating point, got int32"),
    (lambda z, a: sigreg(z[:0], a), ValueError, "z must not be empty: axis 0"),
    (lambda z, a: sigreg(z, a[:, :0]), ValueError, "directions must not be empty: axis 1"),
    (lambda z, a: sigreg(z, a, t_max=0), ValueError, "t_max must be positive and finite, got 0"),
    (lambda z, a: sigreg(z, a, t_max="3"), TypeError, "t_max must be a positive number, got '3'"),
    (lambda z, a: sigreg(z, a, knots=1), ValueError, "knots must be at least 2, got 1"),
    (lambda z, a: sigreg(z, a, knots=17.0), TypeError, "knots must be a whole number, got 17.0"),
    (lambda z, a: sigreg(z, a, block_size=0), ValueError, "block_size must be at least 1, got 0"),
    (lambda z, a: lejepa_loss(z, a, global_views=1), ValueError, r"views must have shape \[V, N, d\], got \(5, 4\)"),
    (lambda z, a: lejepa_loss(z[None], a, global_views=0), ValueError, "global_views must be at least 1, got 0"),
    (lambda z, a: lejepa_loss(z[None], a, global_views=2), ValueError, "global_views must be at most .*1, got 2"),
    (lambda z, a: lejepa_loss(z[None, :0], a, global_views=1), ValueError, "views must not be empty: axis 1"),
    (lambda z, a: koleo_loss(z[None]), ValueError, r"x must have shape \[N, d\], got \(1, 5, 4\)"),
    (lambda z, a: koleo_loss(z[:1]), ValueError, "at least two images for its neighbours, got 1"),
    (lambda z, a: koleo_loss(z[:, :0]), ValueError, "x must not be empty: axis 1"),
    (lambda z, a: koleo_loss(z.astype(int)), TypeError, "x must be floating point, got int32"),
    (lambda z, a: koleo_loss(z, block_size=True), TypeError, "block_size must be a whole number, got True"),
  ],
)
def test_what_is_wrong_is_named(call, error, shown):
  with pytest.raises(error, match=shown):
    call(jnp.ones((5, 4)), jnp.ones((4, 6)))
