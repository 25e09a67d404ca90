"""distillation_loss, ibot_loss and sinkhorn_knopp: official numbers, the papers' formulas in NumPy, padding."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_losses import assert_near_largest

from ssl_jax.losses import dino_loss, distillation_loss, ibot_loss, sinkhorn_knopp

sinkhorn = jax.jit(sinkhorn_knopp, static_argnames="iterations")


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)


def tolerance(dtype):
  return 1e-5 if dtype == jnp.float32 else 1e-6  # inputs and gradients are stored in float32


def softmax(x):
  x = np.exp(x - x.max(axis=-1, keepdims=True))
  return x / x.sum(axis=-1, keepdims=True)


def patch_weights(mask):
  """1 / (number of crops times masked patches of the crop), for each masked patch in row-major order."""
  crop, _ = np.nonzero(mask)
  return 1 / (len(mask) * mask.sum(axis=1)[crop])


# ---- distillation_loss


def test_distillation_loss_is_the_official_one(golden, dtype):
  g, loss = golden("dinov2_losses"), jax.jit(jax.value_and_grad(distillation_loss))
  for call in ("centering0", "centering1", "sinkhorn0", "sinkhorn1"):
    student, targets = (g[f"dino/student{call[-1]}"], g[f"dino/{call}/teacher_probs"])
    value, grad = loss(jnp.asarray(student, dtype), jnp.asarray(targets, dtype))
    assert value.dtype == dtype
    np.testing.assert_allclose(value, g[f"dino/{call}/loss"], rtol=tolerance(dtype))
    assert_near_largest(grad, g[f"dino/{call}/grad_student"], tolerance(dtype))


def test_distillation_loss_of_known_logits():
  v, b, k = np.ogrid[:10, :3, :5]
  student, targets = np.sin(v + 2 * b + 3 * k), softmax(np.cos(v + b + k)[:2] / 0.07)
  loss = jax.jit(distillation_loss)
  both = loss(jnp.float32(student), jnp.float32(targets))
  np.testing.assert_allclose(both, 7.799503, rtol=1e-6)
  crossed = loss(jnp.float32(student[:2]), jnp.float32(targets))  # the two global views: 2 of 18 pairs
  np.testing.assert_allclose(crossed * 2 / 18, 0.620058, rtol=1e-6)


@pytest.mark.parametrize(("views", "teachers"), [(2, 1), (3, 3), (5, 2)])
def test_distillation_loss_is_the_sum_over_pairs_and_dinos_after_centring(x64, views, teachers):
  rng = np.random.default_rng(1)
  s, t, c = rng.normal(size=(views, 3, 7)), rng.normal(size=(teachers, 3, 7)), rng.normal(size=7)
  q, log_p = softmax((t - c) / 0.3), np.log(softmax(s / 0.2))
  want = np.mean([-(q[i] * log_p[v]).sum(-1).mean() for i in range(teachers) for v in range(views) if v != i])
  got = jax.jit(distillation_loss)(s, q, student_temperature=0.2)
  np.testing.assert_allclose(got, want, rtol=1e-12)
  got = jax.jit(dino_loss)(s, t, c, student_temperature=0.2, teacher_temperature=0.3)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_targets_and_weights_take_no_gradient():
  rng = np.random.default_rng(0)
  s, t = (jnp.float32(rng.normal(size=(2, 3, 5))) for _ in range(2))
  grads = jax.jit(jax.grad(distillation_loss, argnums=(0, 1)))(s, t)
  assert np.any(grads[0]) and not np.any(grads[1])
  grads = jax.jit(jax.grad(ibot_loss, argnums=(0, 1, 2)))(s[0], t[0], jnp.ones(3))
  assert np.any(grads[0]) and not np.any(grads[1]) and not np.any(grads[2])
  assert not np.any(jax.jit(jax.grad(lambda x: jnp.sum(sinkhorn_knopp(x, temperature=0.1) * t[0])))(s[0]))


# ---- ibot_loss


def test_ibot_loss_is_the_official_one(golden, dtype):
  g, loss = golden("dinov2_losses"), jax.jit(jax.value_and_grad(ibot_loss))
  for call in ("centering0", "centering1", "sinkhorn0", "sinkhorn1"):
    student, targets = (g[f"ibot/student{call[-1]}"], g[f"ibot/{call}/teacher_probs"])
    weights = patch_weights(g[f"ibot/mask{call[-1]}"])
    n = len(weights)
    # Padded to one size, with what happens to be there.
    student, targets = (np.concatenate([x, x])[:50] for x in (student, targets))
    weights = np.pad(weights, (0, 50 - n))
    value, grad = loss(*(jnp.asarray(x, dtype) for x in (student, targets, weights)))
    assert value.dtype == dtype
    np.testing.assert_allclose(value, g[f"ibot/{call}/loss"], rtol=tolerance(dtype))
    assert_near_largest(grad[:n], g[f"ibot/{call}/grad_student"], tolerance(dtype))
    assert not np.any(grad[n:])


def test_ibot_loss_of_known_logits():
  b, n, k = np.ogrid[:4, :6, :5]
  student, targets = np.sin(b + n + 2 * k), softmax(np.cos(2 * b + n + k) / 0.07)
  mask = np.zeros((4, 6), bool)
  mask[0, :2] = mask[2, 1:4] = True
  got = jax.jit(ibot_loss)(*(jnp.float32(x) for x in (student[mask], targets[mask], patch_weights(mask))))
  np.testing.assert_allclose(got, 5.397104, rtol=1e-6)  # divided by the four crops already


@pytest.mark.parametrize(("u", "k", "tau"), [(1, 2, 1.0), (9, 30, 0.05)])
def test_ibot_loss_is_the_weighted_sum_of_cross_entropies(x64, u, k, tau):
  rng = np.random.default_rng(0)
  student, targets, weights = rng.normal(size=(u, k)), softmax(rng.normal(size=(u, k))), rng.uniform(size=u)
  want = -np.sum(weights[:, None] * targets * np.log(softmax(student / tau)))
  got = jax.jit(ibot_loss)(student, targets, weights, student_temperature=tau)
  np.testing.assert_allclose(got, want, rtol=1e-12)


# ---- sinkhorn_knopp


def reference(logits, temperature, iterations):
  """The listing of the paper's appendix, without a care for overflow."""
  q = np.exp(np.float64(logits) / temperature).T
  q /= q.sum()
  for _ in range(iterations):
    q /= q.sum(axis=1, keepdims=True) * q.shape[0]
    q /= q.sum(axis=0, keepdims=True) * q.shape[1]
  return (q * q.shape[1]).T


def test_sinkhorn_is_the_official_one(golden, dtype):
  g = golden("dinov2_losses")
  for i, temperature in enumerate(g["teacher_temps"]):
    for kind in ("dino", "ibot"):  # both crops are one problem, and the masked patches of all crops
      logits, want = jnp.asarray(g[f"{kind}/teacher{i}"], dtype), g[f"{kind}/sinkhorn{i}/teacher_probs"]
      got = sinkhorn(logits.reshape(-1, 96), temperature=temperature)
      assert got.dtype == dtype
      assert_near_largest(got, want.reshape(-1, 96), tolerance(dtype))


def test_sinkhorn_of_known_logits():
  i, j = np.ogrid[:4, :6]
  logits = jnp.float32(np.sin(1.3 * i + 0.7 * j + 0.2 * i * j))
  got = sinkhorn(logits, temperature=0.07)
  np.testing.assert_allclose(got[0], [2e-6, 0.143559, 0.781208, 0.056242, 0.018990, 0], atol=1e-6)
  np.testing.assert_allclose(got.sum(0), [0.550994, 0.593347, 0.781240, 1.018745, 0.540499, 0.515176], atol=2e-6)
  want = [0.047109, 0.213076, 0.400541, 0.173705, 0.129005, 0.036566]
  np.testing.assert_allclose(sinkhorn(logits, temperature=0.5)[0], want, atol=1e-6)


@pytest.mark.parametrize(("n", "k", "iterations"), [(1, 3, 1), (8, 5, 3), (20, 4, 7)])
def test_sinkhorn_is_the_papers_listing(x64, n, k, iterations):
  logits = np.random.default_rng(0).normal(size=(n, k))
  got = sinkhorn(logits, temperature=0.2, iterations=iterations)
  np.testing.assert_allclose(got, reference(logits, 0.2, iterations), rtol=1e-11)


def test_padding_is_in_no_sum_of_sinkhorn(x64):
  logits = np.random.default_rng(0).normal(size=(12, 5))
  real = np.arange(12) % 3 != 1
  # Weights as ibot_loss takes them; and the largest logits are padding.
  got = sinkhorn(logits + 9 * ~real[:, None], temperature=0.1, weights=np.where(real, np.linspace(0.1, 0.9, 12), 0))
  np.testing.assert_allclose(got[real], reference(logits[real], 0.1, 3), rtol=1e-11)
  assert not np.any(got[~real])
  assert not np.any(sinkhorn(logits, temperature=0.1, weights=np.zeros(12)))  # a batch without a masked patch


def test_sinkhorn_neither_overflows_nor_underflows():
  logits = np.random.default_rng(0).normal(size=(6, 4)) * 30
  got = sinkhorn(jnp.float32(logits), temperature=0.04)  # exponents of up to 2,000
  np.testing.assert_allclose(got.sum(axis=1), np.ones(6), rtol=1e-6)
  got = sinkhorn(jnp.float32(logits / 30 + 1e4), temperature=1.0)
  np.testing.assert_allclose(got, reference(logits / 30, 1.0, 3), rtol=1e-2)  # the logits are rounded to 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
  rng = np.random.default_rng(0)
  s, t = (jnp.asarray(rng.normal(size=(3, 4, 6)), dtype) for _ in range(2))
  wide_s, wide_t = (np.float64(x) for x in (s, t))
  q = sinkhorn(t[0], temperature=0.1)
  assert q.dtype == jnp.float32
  np.testing.assert_allclose(q, reference(wide_t[0], 0.1, 3), rtol=1e-5)
  value, grad = jax.jit(jax.value_and_grad(distillation_loss))(s, t)
  log_p = np.log(softmax(wide_s / 0.1))
  want = np.mean([-(wide_t[i] * log_p[v]).sum(-1).mean() for i in range(3) for v in range(3) if v != i])
  assert value.dtype == jnp.float32 and grad.dtype == dtype
  np.testing.assert_allclose(value, want, rtol=1e-5, atol=1e-5)
  value = jax.jit(ibot_loss)(s[0], t[0], jnp.ones(4, dtype))
  assert value.dtype == jnp.float32
  np.testing.assert_allclose(value, -np.sum(wide_t[0] * log_p[0]), rtol=1e-5, atol=1e-5)


def test_the_mean_of_the_devices_ibot_losses_is_that_of_the_global_batch():
  rng = np.random.default_rng(0)
  mask = rng.uniform(size=(8, 6)) < 0.4
  student, targets = rng.normal(size=(*mask.shape, 5)), softmax(rng.normal(size=(*mask.shape, 5)))
  loss = lambda m, s, t: jax.jit(ibot_loss)(*map(jnp.float32, (s[m], t[m], patch_weights(m))))  # noqa: E731
  halves = [loss(mask[part], student[part], targets[part]) for part in (np.s_[:4], np.s_[4:])]
  np.testing.assert_allclose(np.mean(halves), loss(mask, student, targets), rtol=1e-6)


@pytest.mark.parametrize("temperature", [-1, 0, math.nan, math.inf, "0.1", True])
def test_a_temperature_that_is_none_is_refused(temperature):
  x = jnp.ones((2, 3, 4))
  for call in (
    lambda: distillation_loss(x, x, student_temperature=temperature),
    lambda: ibot_loss(x[0], x[0], jnp.ones(3), student_temperature=temperature),
    lambda: sinkhorn_knopp(x[0], temperature=temperature),
  ):
    with pytest.raises((ValueError, TypeError), match="temperature must be"):
      call()


@pytest.mark.parametrize(
  ("call", "error", "shown"),
  [
    (lambda x: distillation_loss(x, x[0]), ValueError, r"targets must have 3 axes, got shape \(3, 4\)"),
    (lambda x: distillation_loss(x, x[:, :2]), ValueError, r"got \(2, 3, 4\) and \(2, 2, 4\)"),
    (lambda x: distillation_loss(x[:1], x), ValueError, "needs 1 <= T <= V and V >= 2, got T = 2 teacher and V = 1"),
    (lambda x: distillation_loss(x[:1], x[:1]), ValueError, "got T = 1 teacher and V = 1"),
    (lambda x: distillation_loss(x.astype(int), x), TypeError, "student must be floating point, got int32"),
    (lambda x: distillation_loss(x[:, :0], x[:, :0]), ValueError, "student must not be empty: axis 1"),
    (lambda x: ibot_loss(x[0], x[0], x[0]), ValueError, r"weights must have 1 axes, got shape \(3, 4\)"),
    (lambda x: ibot_loss(x[0], x[0], x[0, 0]), ValueError, r"\[U, K\] and \[U\], got \(3, 4\), \(3, 4\) and \(4,\)"),
    (lambda x: ibot_loss(x[0], x[0], jnp.ones(3, bool)), TypeError, "weights must be floating point, got bool"),
    (lambda x: ibot_loss(x[0, :0], x[0, :0], jnp.ones(0)), ValueError, "student must not be empty: axis 0"),
    (lambda x: sinkhorn_knopp(x, temperature=1), ValueError, r"logits must have 2 axes, got shape \(2, 3, 4\)"),
    (lambda x: sinkhorn_knopp(x[0, :0], temperature=1), ValueError, "logits must not be empty: axis 0"),
    (lambda x: sinkhorn_knopp(x[0], temperature=1, iterations=0), ValueError, "iterations must be at least 1, got 0"),
    (lambda x: sinkhorn_knopp(x[0], temperature=1, iterations=3.0), TypeError, "iterations must be a whole number"),
    (
      lambda x: sinkhorn_knopp(x[0], temperature=1, weights=jnp.ones(4)),
      ValueError,
      r"weights must have shape \[3\], got \(4,\)",
    ),
  ],
)
def test_what_is_wrong_is_named(call, error, shown):
  with pytest.raises(error, match=shown):
    call(jnp.ones((2, 3, 4)))
