"""info_nce, byol_loss, mae_loss, dino_loss: official numbers, the papers' formulas in NumPy, known cases."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssl_jax.losses import byol_loss, dino_center, dino_loss, info_nce, mae_loss, nt_xent, patchify, unpatchify


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
  with jax.enable_x64(request.param == "float64"):
    yield jnp.dtype(request.param)


def close(got, want, dtype, stored="float64"):
  # 1e-12 where the file holds float64 from the inputs as stored; its MAE numbers are float32's own.
  np.testing.assert_allclose(got, want, rtol=1e-6 if dtype == jnp.float32 or stored == "float32" else 1e-12)


def gradients_close(got, want):
  assert np.max(np.abs(got - want)) < 1e-6 * np.max(np.abs(want))  # stored in float32


def draw(seed, n, d):
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)), rng.normal(size=(n, d))


def unit(x):
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


# ---- info_nce


@pytest.mark.parametrize("block_size", [None, 3, 100])
def test_info_nce_with_a_queue_is_the_official_mocos(golden, dtype, block_size):
  g = {k: jnp.asarray(v, dtype) for k, v in golden("moco_queue").items()}

  def loss(q):
    return info_nce(q, g["k"], g["queue"], temperature=0.07, block_size=block_size)

  value, grad = jax.jit(jax.value_and_grad(loss))(g["q"])
  np.testing.assert_allclose(value, golden("moco_queue")["loss"], rtol=1e-6 if dtype == jnp.float32 else 1e-9)
  gradients_close(grad, g["grad_q"])  # (the queue is stored in float32: 1e-9, not 1e-12)


@pytest.mark.parametrize("block_size", [None, 3])
def test_info_nce_without_a_queue_is_the_official_moco_v3s(golden, dtype, block_size):
  g = {k: jnp.asarray(v, dtype) for k, v in golden("moco_v3").items()}

  def loss(q1, q2):
    one = info_nce(q1, g["k2"], temperature=0.2, block_size=block_size)
    return 2 * 0.2 * (one + info_nce(q2, g["k1"], temperature=0.2, block_size=block_size))

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(g["q1"], g["q2"])
  close(value, golden("moco_v3")["loss"], dtype)
  for got, name in zip(grads, ("grad_q1", "grad_q2"), strict=True):
    gradients_close(got, g[name])


@pytest.mark.parametrize("with_queue", [True, False])
def test_info_nce_in_blocks_is_the_whole_one_with_its_derivatives(with_queue):
  with jax.enable_x64(True):
    q, k = map(jnp.asarray, draw(0, 7, 3))
    queue = jnp.asarray(unit(draw(1, 11, 3)[0])) if with_queue else None

    def derivatives(block_size):
      def loss(q, t):
        return info_nce(q, k, queue, temperature=t, block_size=block_size)

      first = jax.grad(loss, argnums=(0, 1))
      second = jax.grad(lambda q, t: jnp.vdot(first(q, t)[0], k) + first(q, t)[1], argnums=(0, 1))
      return jax.jit(lambda q, t: (loss(q, t), first(q, t), second(q, t)))(q, 0.3)

    for got, want in zip(jax.tree.leaves(derivatives(2)), jax.tree.leaves(derivatives(7)), strict=True):
      np.testing.assert_allclose(got, want, rtol=1e-11, atol=1e-13)
    with pytest.raises(TypeError, match="forward-mode"):
      jax.jvp(lambda q: info_nce(q, k, queue, block_size=2), (q,), (q,))


def test_info_nce_is_the_papers_formula(dtype):
  q, k = draw(1, 5, 3)
  queue = unit(draw(2, 9, 3)[0])
  own, others = np.sum(unit(q) * unit(k), -1) / 0.3, unit(q) @ queue.T / 0.3
  with_queue = np.mean(np.log(np.exp(own) + np.exp(others).sum(-1)) - own)
  among = unit(q) @ unit(k).T / 0.3
  without = np.mean(np.log(np.exp(among).sum(-1)) - own)
  q, k, queue = (jnp.asarray(x, dtype) for x in (q, k, queue))
  rtol = 1e-5 if dtype == jnp.float32 else 1e-12
  np.testing.assert_allclose(info_nce(q, k, queue, temperature=0.3), with_queue, rtol=rtol)
  np.testing.assert_allclose(info_nce(q, k, temperature=0.3), without, rtol=rtol)


def test_keys_and_queue_take_no_gradient():
  q, k = map(jnp.float32, draw(0, 4, 3))
  grads = jax.grad(lambda q, k, queue: info_nce(q, k, queue), argnums=(0, 1, 2))(q, k, k)
  assert np.any(grads[0]) and not np.any(grads[1]) and not np.any(grads[2])
  assert not np.any(jax.grad(lambda k: info_nce(q, k))(k))


@pytest.mark.parametrize("queue", [True, False])
@pytest.mark.parametrize("devices", [2, 4])
def test_on_many_devices_the_keys_of_all_are_the_negatives(mesh, devices, queue):
  q, k = map(jnp.float32, draw(0, 8, 16))
  rows = jnp.float32(unit(draw(3, 6, 16)[0])) if queue else None

  def step(q, k):
    loss = lambda q: info_nce(q, k, rows, temperature=0.2, axis_name="batch")  # noqa: E731
    value, grad = jax.value_and_grad(loss)(q)
    return value, grad / devices  # each device's share of the pmean

  spec = jax.P("batch")
  mapped = jax.shard_map(step, mesh=mesh(devices), in_specs=(spec, spec), out_specs=(jax.P(), spec), check_vma=False)
  value, grad = jax.jit(mapped)(q, k)
  want, want_grad = jax.value_and_grad(lambda q: info_nce(q, k, rows, temperature=0.2))(q)
  np.testing.assert_allclose(value, want, rtol=1e-6)
  np.testing.assert_allclose(grad, want_grad, atol=1e-6)


def test_moco_v3s_loss_of_constant_features():
  same = jnp.ones((8, 16))
  total = 2 * (2 * 0.2 * info_nce(same, same, temperature=0.2))
  np.testing.assert_allclose(total, 1.663553, atol=2e-6)


def test_info_nce_of_one_image_needs_a_queue():
  one = jnp.ones((1, 4))
  with pytest.raises(ValueError, match="at least two images"):
    info_nce(one, one)
  assert np.isfinite(info_nce(one, one, jnp.eye(4)))


@pytest.mark.parametrize("temperature", [-1, 0, math.nan, math.inf, "0.1"])
def test_every_loss_refuses_a_temperature_that_is_none(temperature):
  x, logits = jnp.ones((2, 4)), jnp.ones((2, 3, 4))
  for call in (
    lambda: info_nce(x, x, temperature=temperature),
    lambda: dino_loss(logits, logits, x[0], teacher_temperature=temperature),
    lambda: dino_loss(logits, logits, x[0], student_temperature=temperature, teacher_temperature=0.04),
  ):
    with pytest.raises((ValueError, TypeError), match="temperature"):
      call()


def test_shapes_and_types_are_checked():
  x, logits = jnp.ones((2, 4)), jnp.ones((2, 3, 4))
  patches, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3))
  for error, call in (
    (ValueError, lambda: info_nce(x, x[:1])),
    (ValueError, lambda: info_nce(x, x, jnp.ones((3, 5)))),
    (ValueError, lambda: info_nce(x, x, jnp.ones((0, 4)))),
    (TypeError, lambda: info_nce(x.astype(int), x)),
    (ValueError, lambda: byol_loss(x, x[:1])),
    (TypeError, lambda: byol_loss(x.astype(int), x)),
    (ValueError, lambda: byol_loss(x[:0], x[:0])),
    (ValueError, lambda: mae_loss(patches, patches, mask[:1])),
    (TypeError, lambda: mae_loss(patches.astype(int), patches, mask)),
    (ValueError, lambda: mae_loss(patches[..., :1], patches[..., :1], mask)),
    (ValueError, lambda: dino_loss(logits[:1], logits, x[0], teacher_temperature=0.04)),
    (ValueError, lambda: dino_loss(logits[:1], logits[:1], x[0], teacher_temperature=0.04)),
    (ValueError, lambda: dino_loss(logits, logits, jnp.ones(5), teacher_temperature=0.04)),
    (ValueError, lambda: dino_center(x[0], x)),
    (ValueError, lambda: patchify(jnp.ones((1, 6, 6, 3)), 4)),
    (ValueError, lambda: unpatchify(jnp.ones((1, 3, 12)), 2)),
  ):
    with pytest.raises(error):
      call()


# ---- byol_loss


def test_byol_loss_is_the_official_one(golden, dtype):
  g = {k: jnp.asarray(v, dtype) for k, v in golden("byol").items()}

  def loss(p1, p2):
    return byol_loss(p1, g["target_projection2"]) + byol_loss(p2, g["target_projection1"])

  value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(g["online_prediction1"], g["online_prediction2"])
  close(value, golden("byol")["loss"], dtype)
  gradients_close(grads[0], g["grad1"])
  gradients_close(grads[1], g["grad2"])


def test_byol_loss_of_known_directions():
  a, b = map(jnp.float32, draw(0, 8, 16))
  np.testing.assert_allclose(byol_loss(a, b), 1.986127, atol=2e-6)
  e = jnp.eye(4)
  np.testing.assert_allclose([byol_loss(a, a), byol_loss(a, -a), byol_loss(e, e[::-1])], [0, 4, 2], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_byol_loss_of_zero_vectors_is_finite_with_its_gradient(dtype):
  zero, a = jnp.zeros((2, 4), dtype), jnp.ones((2, 4), dtype)
  for p, z in ((zero, a), (a, zero), (zero, zero)):
    value, grad = jax.value_and_grad(byol_loss)(p, z)
    assert np.isfinite(value) and value.dtype == jnp.float32 and np.isfinite(np.float32(grad)).all()


def test_only_the_prediction_takes_a_gradient():
  a, b = map(jnp.float32, draw(0, 4, 3))
  grads = jax.grad(byol_loss, argnums=(0, 1))(a, b)
  assert np.any(grads[0]) and not np.any(grads[1])


# ---- mae_loss


@pytest.mark.parametrize("normalize", [True, False])
def test_mae_loss_is_the_official_one(golden, dtype, normalize):
  g = golden("mae")
  pred, patches, mask = (jnp.asarray(g[k], dtype) for k in ("pred", "patches", "mask"))
  got = mae_loss(pred, patches, mask, normalize_target=normalize)
  close(got, g[f"loss_norm_pix_{normalize}"], dtype, stored="float32")


def test_patchify_is_the_official_order_and_unpatchify_its_inverse(golden):
  g = golden("mae")
  np.testing.assert_array_equal(patchify(jnp.asarray(g["images"]), 8), g["patches"])
  np.testing.assert_array_equal(unpatchify(jnp.asarray(g["patches"]), 8), g["images"])
  wide = jnp.arange(2 * 4 * 6.0).reshape(1, 4, 6, 2)
  np.testing.assert_array_equal(patchify(wide, 2)[0, 1].reshape(2, 2, 2), wide[0, :2, 2:4])


def test_only_removed_patches_count_and_the_variance_is_unbiased():
  target = np.random.default_rng(0).uniform(size=(1, 16, 48))
  mask = jnp.asarray([[1.0] * 12 + [0.0] * 4])
  zero, target = jnp.zeros((1, 16, 48)), jnp.float32(target)
  np.testing.assert_allclose(mae_loss(zero, target, mask), 0.979155, atol=2e-6)
  np.testing.assert_allclose(mae_loss(zero, target, mask, normalize_target=False), 0.357673, atol=2e-6)
  visible = jax.grad(lambda p: mae_loss(p, target, mask))(zero)[0, 12:]
  assert not np.any(visible)


def test_every_removed_patch_counts_alike_however_many_an_image_has():
  rng = np.random.default_rng(0)
  (prediction, target), mask = rng.normal(size=(2, 3, 8, 5)), rng.uniform(size=(3, 8)) < [[0.2], [0.5], [0.9]]
  want = np.square(prediction - target).mean(-1)[mask].mean()
  got = mae_loss(jnp.float32(prediction), jnp.float32(target), jnp.asarray(mask), normalize_target=False)
  np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_constant_patch_is_a_zero_target():
  flat = jnp.full((1, 2, 12), 0.3)
  value, grad = jax.value_and_grad(lambda p: mae_loss(p, flat, jnp.ones((1, 2))))(jnp.zeros((1, 2, 12)))
  np.testing.assert_allclose(value, 0, atol=1e-6)
  assert np.isfinite(grad).all()
  assert mae_loss(flat, flat, jnp.zeros((1, 2))) == 0  # nothing removed


# ---- dino_loss


@pytest.mark.parametrize("name", ["dino_crops2", "dino_crops10"])
def test_dino_loss_and_centre_are_the_official_ones(golden, dtype, name):
  g = golden(name)
  batch, k = int(g["batch"]), g["student0"].shape[1]
  for i in range(3):
    student = jnp.asarray(g[f"student{i}"], dtype).reshape(-1, batch, k)
    teacher = jnp.asarray(g[f"teacher{i}"], dtype).reshape(2, batch, k)
    center = jnp.asarray(g[f"center_before{i}"][0], dtype)
    temperature = float(g["teacher_temp_schedule"][int(g[f"epoch{i}"])])
    value, grad = jax.value_and_grad(
      lambda s, t=teacher, c=center, tau=temperature: dino_loss(s, t, c, teacher_temperature=tau)
    )(student)
    close(value, g[f"loss{i}"], dtype)
    gradients_close(grad.reshape(-1, k), g[f"grad{i}"])
    after = dino_center(center, teacher, momentum=float(g["center_momentum"]))
    np.testing.assert_allclose(after, g[f"center_after{i}"][0], atol=1e-7 if dtype == jnp.float32 else 1e-15)


def test_dino_loss_centres_before_it_sharpens():
  teacher, student = jnp.array([[[2.0, 1, 0], [0, 1, 2]]]), jnp.array([[[1.0, 0, 0], [0, 0, 1]]])

  def loss(center):
    both = jnp.concatenate([jnp.zeros_like(student), student])  # view 1 is the teacher's and does not count
    return dino_loss(both, teacher, jnp.array(center), teacher_temperature=0.04)

  for center in ([0.0, 0, 0], [5.0, 5, 5]):
    np.testing.assert_allclose(loss(center), 9.07959e-5, atol=2e-6)
  np.testing.assert_allclose(loss([1.0, 0, 0]), (5.000091 + 9.07959e-5) / 2, atol=2e-6)


def test_a_uniform_student_pays_log_k():
  value = dino_loss(jnp.zeros((4, 3, 1024)), jnp.ones((2, 3, 1024)), jnp.zeros(1024), teacher_temperature=0.04)
  np.testing.assert_allclose(value, math.log(1024), rtol=1e-6)


def test_teacher_and_centre_take_no_gradient():
  rng = np.random.default_rng(0)
  s, t, c = (jnp.float32(rng.normal(size=shape)) for shape in ((3, 2, 5), (2, 2, 5), (5,)))
  grads = jax.grad(lambda *x: dino_loss(*x, teacher_temperature=0.1), argnums=(0, 1, 2))(s, t, c)
  assert np.any(grads[0]) and not np.any(grads[1]) and not np.any(grads[2])


def test_the_centre_is_the_mean_over_all_devices(mesh):
  teacher = jnp.float32(np.random.default_rng(0).normal(size=(2, 8, 5)))
  center = jnp.ones(5)
  spec = jax.P(None, "batch")
  mapped = jax.shard_map(
    lambda t: dino_center(center, t, axis_name="batch"),
    mesh=mesh(4), in_specs=spec, out_specs=jax.P(), check_vma=False,
  )  # fmt: skip
  np.testing.assert_allclose(jax.jit(mapped)(teacher), dino_center(center, teacher), rtol=1e-6)


def test_second_views_of_the_teacher_only_change_what_is_theirs():
  """The one-pass form is the double sum over pairs, written out."""
  rng = np.random.default_rng(1)
  s, t, c = rng.normal(size=(5, 3, 7)), rng.normal(size=(2, 3, 7)), rng.normal(size=7)

  def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)

  q, log_p = softmax((t - c) / 0.3), np.log(softmax(s / 0.1))
  want = np.mean([-(q[i] * log_p[v]).sum(-1).mean() for i in range(2) for v in range(5) if v != i])
  got = dino_loss(jnp.float32(s), jnp.float32(t), jnp.float32(c), teacher_temperature=0.3)
  np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize(
  "call",
  [
    lambda: nt_xent(jnp.ones((4, 0)), jnp.ones((4, 0))),
    lambda: info_nce(jnp.ones((0, 8)), jnp.ones((0, 8)), jnp.ones((16, 8))),
    lambda: info_nce(jnp.ones((4, 8)), jnp.ones((4, 8)), jnp.ones((0, 8))),
    lambda: byol_loss(jnp.ones((0, 8)), jnp.ones((0, 8))),
    lambda: mae_loss(jnp.ones((2, 4, 0)), jnp.ones((2, 4, 0)), jnp.ones((2, 4)), normalize_target=False),
    lambda: mae_loss(jnp.ones((2, 0, 4)), jnp.ones((2, 0, 4)), jnp.ones((2, 0))),
    lambda: dino_loss(jnp.ones((2, 0, 8)), jnp.ones((2, 0, 8)), jnp.ones(8), teacher_temperature=0.04),
    lambda: dino_center(jnp.ones(8), jnp.ones((2, 0, 8))),
  ],
)
def test_an_empty_axis_is_refused_by_its_number_and_is_no_nan(call):
  with pytest.raises(ValueError, match=r"must not be empty: axis \d of its shape \(.*\) has no entries"):
    call()
