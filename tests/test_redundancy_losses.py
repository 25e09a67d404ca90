"""vicreg_loss, barlow_twins_loss and simsiam_loss: official numbers, the papers' formulas in NumPy, known cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from programs import equations
from test_losses import assert_near_largest, draw

from ssl_jax.losses import barlow_twins_loss, simsiam_loss, vicreg_loss


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)


def tolerance(dtype):
  return 1e-5 if dtype == jnp.float32 else 1e-6  # inputs and gradients are stored in float32


def vicreg(a, b, weights=(25, 25, 1), eps=1e-4):
  """The three terms of the official code in float64 NumPy."""
  d = a.shape[1]
  covariances = [np.cov(z, rowvar=False).reshape(d, d) for z in (a, b)]
  spread = [np.maximum(0, 1 - np.sqrt(np.diag(c) + eps)).mean() / 2 for c in covariances]
  redundant = [(c[~np.eye(d, dtype=bool)] ** 2).sum() / d for c in covariances]
  return np.dot(weights, [np.mean((a - b) ** 2), sum(spread), sum(redundant)])


def barlow_twins(a, b, off_diagonal=0.0051, eps=1e-5):
  a, b = ((z - z.mean(0)) / np.sqrt(z.var(0) + eps) for z in (a, b))
  c = sum(np.outer(x, y) for x, y in zip(a, b, strict=True)) / len(a)
  return sum((1 - c[i, j]) ** 2 if i == j else off_diagonal * c[i, j] ** 2 for i, j in np.ndindex(c.shape))


LOSSES = [(vicreg_loss, vicreg), (barlow_twins_loss, barlow_twins)]
IDS = ["vicreg", "barlow_twins"]


@pytest.mark.parametrize(("loss", "name"), [(vicreg_loss, "vicreg"), (barlow_twins_loss, "barlow_twins")], ids=IDS)
def test_value_and_gradients_are_the_official_ones(golden, dtype, loss, name):
  g = golden(name)
  z1, z2 = (jnp.asarray(g[key], dtype) for key in ("z1", "z2"))
  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(z1, z2)
  assert value.dtype == dtype
  np.testing.assert_allclose(value, g["loss"], rtol=tolerance(dtype))
  for grad, key in zip(grads, ("grad_z1", "grad_z2"), strict=True):
    assert_near_largest(grad, g[key], tolerance(dtype))


@pytest.mark.parametrize(("n", "d"), [(2, 1), (5, 9), (40, 3)])
@pytest.mark.parametrize(("loss", "reference"), LOSSES, ids=IDS)
def test_value_is_the_papers_formula(x64, loss, reference, n, d):
  a, b = draw(n, d)
  a, b = a * np.linspace(0.2, 2, d) + 3, a + 0.5 * b  # deviations on both sides of one, and a mean
  np.testing.assert_allclose(jax.jit(loss)(a, b), reference(a, b), rtol=1e-11)


def test_the_weights_and_epsilons_are_the_formulas(x64):
  a, b = draw(6, 4)
  got = jax.jit(vicreg_loss)(a, b, invariance=2.0, variance=3.0, covariance=5.0, eps=0.1)
  np.testing.assert_allclose(got, vicreg(a, b, (2, 3, 5), 0.1), rtol=1e-12)
  got = jax.jit(barlow_twins_loss)(a, b, off_diagonal=0.5, eps=0.1)
  np.testing.assert_allclose(got, barlow_twins(a, b, 0.5, 0.1), rtol=1e-12)


@pytest.mark.parametrize(("loss", "want"), [(vicreg_loss, 25 * 0.99), (barlow_twins_loss, 7.0)], ids=IDS)
def test_one_point_has_its_known_value_and_a_finite_gradient(loss, want):
  same = jnp.full((5, 7), 0.3)
  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(same, same)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  assert all(np.isfinite(grad).all() for grad in grads)


def test_a_large_mean_does_not_drown_the_variance():
  a, b = draw(64, 5)
  for loss, reference in LOSSES:
    np.testing.assert_allclose(jax.jit(loss)(jnp.float32(a + 100), jnp.float32(b + 100)), reference(a, b), rtol=1e-4)


@pytest.mark.parametrize(("loss", "reference"), LOSSES, ids=IDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_computed_in_float32(loss, reference, dtype):
  a, b = (jnp.asarray(x, dtype) for x in draw(8, 6))
  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(a, b)
  assert value.dtype == jnp.float32 and [grad.dtype for grad in grads] == [dtype, dtype]
  np.testing.assert_allclose(value, reference(np.float64(a), np.float64(b)), rtol=1e-5)


@pytest.mark.parametrize(("loss", "products"), [(vicreg_loss, 6), (barlow_twins_loss, 3)], ids=IDS)
def test_products_are_in_full_precision_in_both_directions(loss, products):
  z = jnp.ones((8, 4))
  program = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(z, z)  # a CPU has no other precision
  found = [e.params["precision"] for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
  assert len(found) == products and set(found) == {(lax.Precision.HIGHEST,) * 2}


def test_simsiam_loss_is_the_official_one(golden, dtype):
  g = {key: jnp.asarray(golden("simsiam")[key], dtype) for key in ("p1", "p2", "z1", "z2", "grad_p1", "grad_p2")}

  def loss(p1, p2):
    return (simsiam_loss(p1, g["z2"]) + simsiam_loss(p2, g["z1"])) / 2

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(g["p1"], g["p2"])
  assert value.dtype == dtype
  np.testing.assert_allclose(value, golden("simsiam")["loss"], rtol=tolerance(dtype))
  for grad, key in zip(grads, ("grad_p1", "grad_p2"), strict=True):
    assert_near_largest(grad, g[key], tolerance(dtype))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_simsiam_loss_is_minus_the_mean_cosine_and_the_target_takes_no_gradient(dtype):
  p, z = (jnp.asarray(x, dtype) for x in draw(6, 5))
  value, grads = jax.jit(jax.value_and_grad(simsiam_loss, argnums=(0, 1)))(p.reshape(2, 3, 5), z.reshape(2, 3, 5))
  a, b = np.float64(p), np.float64(z)
  want = -np.mean(np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1))
  assert value.dtype == jnp.float32 and grads[0].dtype == dtype
  np.testing.assert_allclose(value, want, rtol=1e-6, atol=1e-7)
  assert np.any(grads[0]) and not np.any(grads[1])
  value, grad = jax.jit(jax.value_and_grad(simsiam_loss))(jnp.zeros_like(p), z)
  assert value == 0 and np.isfinite(np.float32(grad)).all()


@pytest.mark.parametrize(
  ("call", "error", "shown"),
  [
    (lambda z: vicreg_loss(z, z[:2]), ValueError, r"z1 and z2 must have one shape, got \(3, 4\) and \(2, 4\)"),
    (lambda z: vicreg_loss(z[0], z[0]), ValueError, r"z1 must have shape \[N, d\], got \(4,\)"),
    (lambda z: vicreg_loss(z[:1], z[:1]), ValueError, "vicreg_loss needs a batch of at least two images .*got 1"),
    (lambda z: vicreg_loss(z[:, :0], z[:, :0]), ValueError, "z1 must not be empty: axis 1"),
    (lambda z: barlow_twins_loss(z[:1], z[:1]), ValueError, "barlow_twins_loss needs a batch of at least two .*got 1"),
    (lambda z: barlow_twins_loss(z, z.astype(int)), TypeError, "z2 must be floating point, got int32"),
    (lambda z: barlow_twins_loss(z[:0], z[:0]), ValueError, "z1 must not be empty: axis 0"),
    (lambda z: simsiam_loss(z, z[:2]), ValueError, r"must have one shape \[..., d\], got \(3, 4\) and \(2, 4\)"),
    (lambda z: simsiam_loss(z[:0], z[:0]), ValueError, "prediction must not be empty: axis 0"),
    (lambda z: simsiam_loss(z, z.astype(int)), TypeError, "target must be floating point, got int32"),
  ],
)
def test_what_is_wrong_is_named(call, error, shown):
  with pytest.raises(error, match=shown):
    call(jnp.ones((3, 4)))
