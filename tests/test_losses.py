"""NT-Xent against the official numbers, an independent formula, and itself on many devices."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from programs import equations

from ssl_jax.losses import barlow_twins_loss, byol_loss, info_nce, koleo_loss, nt_xent, simsiam_loss, vicreg_loss

GOLDEN = ("nt_xent_n8_t0.1", "nt_xent_n33_t0.07", "nt_xent_n64_t0.5")
BLOCKS = (1, 3, 1000)


def reference(z1, z2, temperature):
  """Eq. 1 of the paper in float64 NumPy, written without looking at ours: one sum of exponentials a view."""
  z = np.concatenate([z1, z2]).astype(np.float64)
  z /= np.linalg.norm(z, axis=1, keepdims=True)
  n = len(z1)
  total = 0.0
  for i in range(2 * n):
    similarity = z @ z[i] / temperature
    others = np.delete(similarity, i)
    top = others.max()
    total += top + math.log(np.exp(others - top).sum()) - similarity[(i + n) % (2 * n)]
  return total / (2 * n)


def draw(n, d, seed=0):
  """D(seed, n, d) of the project's list of cases."""
  rng = np.random.default_rng(seed)
  return rng.normal(size=(n, d)), rng.normal(size=(n, d))


loss_and_grads = jax.jit(
  jax.value_and_grad(nt_xent, argnums=(0, 1)), static_argnames=("temperature", "axis_name", "block_size")
)


def assert_near_largest(got, want, rtol):
  """Within `rtol` of the largest entry of `want`: the rounding of a sum is that of its largest term."""
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("name", GOLDEN)
def test_official_value_and_gradients_in_float32(golden, name, block_size):
  g = golden(name)
  loss, grads = loss_and_grads(g["z1"], g["z2"], temperature=float(g["temperature"]), block_size=block_size)
  assert loss.dtype == jnp.float32
  np.testing.assert_allclose(loss, g["loss"], rtol=1e-6)  # a few roundings of float32
  for got, want in zip(grads, (g["grad_z1"], g["grad_z2"]), strict=True):
    assert_near_largest(got, want, 1e-6)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("name", GOLDEN)
def test_official_value_and_gradients_in_float64(x64, golden, name, block_size):
  g = golden(name)
  z1, z2 = (jnp.asarray(g[key], jnp.float64) for key in ("z1", "z2"))
  loss, grads = loss_and_grads(z1, z2, temperature=float(g["temperature"]), block_size=block_size)
  assert loss.dtype == jnp.float64
  np.testing.assert_allclose(loss, g["loss"], rtol=1e-12)
  for got, want in zip(grads, (g["grad_z1"], g["grad_z2"]), strict=True):
    assert_near_largest(got, want, 1e-6)  # they are stored in float32


@pytest.mark.parametrize(("n", "d", "temperature"), [(2, 1, 1.0), (5, 3, 0.05), (17, 64, 10.0), (40, 7, 0.3)])
def test_is_the_papers_formula(n, d, temperature):
  z1, z2 = draw(n, d)
  got = jax.jit(functools.partial(nt_xent, temperature=temperature))(jnp.float32(z1), jnp.float32(z2))
  # float32 rounds a cosine to 1e-7; divided by the temperature it is the loss's error.
  np.testing.assert_allclose(got, reference(z1, z2, temperature), rtol=1e-6, atol=2e-7 / temperature)


@pytest.mark.parametrize("block_size", [None, 3])
def test_gradient_is_the_finite_difference(x64, block_size):
  z1, z2 = map(jnp.asarray, draw(4, 3))
  loss = functools.partial(nt_xent, block_size=block_size)
  check_grads(jax.jit(lambda a, b, t: loss(a, b, temperature=t)), (z1, z2, 0.5), order=1, modes=["rev"], rtol=1e-6)


@pytest.mark.parametrize("block_size", BLOCKS)
def test_blocks_change_neither_value_nor_gradient(x64, block_size):
  z1, z2 = map(jnp.asarray, draw(9, 5))
  want, want_grads = loss_and_grads(z1, z2)
  got, grads = loss_and_grads(z1, z2, block_size=block_size)
  np.testing.assert_allclose(got, want, rtol=1e-14)  # float64, another order of summation
  for a, b in zip(grads, want_grads, strict=True):
    assert_near_largest(a, b, 1e-14)


@pytest.mark.parametrize(("n", "bound"), [(1024, 16), (16_384, 64), (32_768, 128)])
def test_large_batches_need_memory_that_grows_with_the_batch_not_its_square(optimised, n, bound):
  z = jax.ShapeDtypeStruct((n, 128), jnp.float32)
  memory = loss_and_grads.lower(z, z).compile().memory_analysis()
  assert memory.temp_size_in_bytes < bound * 2**20  # the matrix of 2N x 2N would be 16, 4,096 and 16,384 MiB


@pytest.mark.slow
def test_second_derivatives_in_blocks_are_right_and_forward_mode_alone_is_an_error(x64):
  z1, z2, direction = (jnp.asarray(x) for x in (*draw(5, 3), draw(5, 3, 1)[0]))

  def slope(block_size):
    first = jax.grad(lambda a, t: nt_xent(a, z2, temperature=t, block_size=block_size), argnums=(0, 1))
    return lambda a, t: jnp.vdot(first(a, t)[0], direction) + first(a, t)[1]

  got, want = (jax.jit(jax.grad(slope(block), argnums=(0, 1)))(z1, 0.3) for block in (2, 5 * 2))
  assert_near_largest(got[0], want[0], 1e-12)
  np.testing.assert_allclose(got[1], want[1], rtol=1e-12)
  got, want = (jax.jit(jax.hessian(functools.partial(nt_xent, block_size=block)))(z1, z2) for block in (2, 5 * 2))
  assert_near_largest(got, want, 1e-12)
  with pytest.raises(TypeError, match="forward-mode"):
    jax.jvp(lambda a: nt_xent(a, z2, block_size=2), (z1,), (z1,))


def test_blocks_multiply_in_full_precision_in_both_directions_and_any_temperature_is_exact():
  z = jnp.ones((8, 4))
  program = jax.make_jaxpr(jax.grad(lambda a: nt_xent(a, z, block_size=2)))(z)  # a CPU has no other precision
  products = [e.params["precision"] for e in equations(program.jaxpr) if e.primitive.name == "dot_general"]
  assert len(products) > 2 and set(products) == {(lax.Precision.HIGHEST,) * 2}
  a, b = map(jnp.float32, draw(8, 16))
  narrow = jnp.bfloat16(0.07)
  np.testing.assert_allclose(nt_xent(a, b, temperature=narrow), nt_xent(a, b, temperature=float(narrow)), rtol=1e-6)


# One loss, five ways of running it. Each takes (function of one device, whole a, whole b) and returns what every device
# returns, stacked. `per_device` below draws its rows out of the whole arrays, so that these are replicated parameters.


def by_vmap(function, a, b, n, mesh):
  del mesh
  return jax.jit(jax.vmap(lambda _: function(a, b), axis_name="batch"))(jnp.arange(n))


def by_pmap(function, a, b, n, mesh):
  del mesh
  return jax.pmap(lambda _: function(a, b), axis_name="batch", devices=jax.devices()[:n])(jnp.arange(n))


def by_shard_map(function, a, b, n, mesh):
  def mapped(a, b):
    return jax.tree.map(lambda x: x[None], function(a, b))

  return jax.jit(
    jax.shard_map(mapped, mesh=mesh(n), in_specs=P(), out_specs=P("batch"), check_vma=False),
  )(a, b)


MAPPED = {"vmap": by_vmap, "pmap": by_pmap, "shard_map": by_shard_map}


def rows_of_this_device(x):
  n = x.shape[0] // lax.axis_size("batch")
  return lax.dynamic_slice_in_dim(x, lax.axis_index("batch") * n, n)


def mapped_value_and_grad(a, b, **kwargs):
  """What every device gets: the loss, and the mean over devices of the gradients of the whole a and b."""

  def loss(a, b):
    return nt_xent(rows_of_this_device(a), rows_of_this_device(b), **kwargs)

  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(a, b)
  return value, lax.pmean(grads, "batch")


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("way", MAPPED)
def test_every_way_and_number_of_devices_gives_the_global_loss_and_gradient(mesh, way, devices):
  a, b = map(jnp.float32, draw(8, 16))
  want, want_grads = loss_and_grads(a, b, temperature=0.2)
  np.testing.assert_allclose(want, 3.236981, atol=2e-6)  # float64 NumPy; 2.201623 is without the others' negatives
  np.testing.assert_allclose(np.linalg.norm(want_grads[0]), 0.465961, atol=2e-6)  # 0.236213: no gradient to negatives

  function = functools.partial(mapped_value_and_grad, temperature=0.2, axis_name="batch")
  values, grads = MAPPED[way](function, a, b, devices, mesh)
  assert values.shape == (devices,)
  assert len(set(np.asarray(values).tolist())) == 1, "the value differs between devices"
  np.testing.assert_allclose(values, want, rtol=1e-6)  # float32, another order of summation
  for got, whole in zip(grads, want_grads, strict=True):
    for device in range(devices):
      assert_near_largest(got[device], whole, 2e-6)


@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.parametrize("devices", [2, 4])
def test_a_sharded_global_array_under_plain_jit_gives_the_global_loss_and_gradient(mesh, devices, block_size):
  a, b = map(np.float32, draw(8, 16))
  sharded = [jax.device_put(x, NamedSharding(mesh(devices), P("batch"))) for x in (a, b)]
  got, grads = loss_and_grads(*sharded, temperature=0.2, block_size=block_size)
  want, want_grads = loss_and_grads(a, b, temperature=0.2)
  np.testing.assert_allclose(got, want, rtol=1e-6)  # float32, another order of summation
  for x, y in zip(grads, want_grads, strict=True):
    assert_near_largest(x, y, 2e-6)


@pytest.mark.parametrize("block_size", [1, 3])
def test_blocks_and_devices_together_give_the_global_loss_and_gradient(x64, mesh, block_size):
  a, b = map(jnp.asarray, draw(8, 16))
  want, want_grads = loss_and_grads(a, b, temperature=0.2)
  function = functools.partial(mapped_value_and_grad, temperature=0.2, axis_name="batch", block_size=block_size)
  values, grads = by_shard_map(function, a, b, 4, mesh)
  np.testing.assert_allclose(values, np.full(4, want), rtol=1e-13)  # float64, another order of summation
  for got, whole in zip(grads, want_grads, strict=True):
    assert_near_largest(got[0], whole, 1e-13)


def test_without_an_axis_name_each_device_has_the_loss_of_its_own_rows(mesh):
  a, b = draw(8, 16)
  function = functools.partial(mapped_value_and_grad, temperature=0.2)
  values, _ = by_shard_map(function, jnp.float32(a), jnp.float32(b), 2, mesh)
  np.testing.assert_allclose(values, [reference(a[i : i + 4], b[i : i + 4], 0.2) for i in (0, 4)], rtol=1e-6)
  np.testing.assert_allclose(np.mean(values), 2.201623, atol=2e-6)  # float64 NumPy


@pytest.mark.parametrize(
  ("varying", "combine", "factor"),
  [
    (False, lambda grads: grads, 1),
    (False, lambda grads: lax.pmean(grads, "batch"), 1),
    (True, lambda grads: lax.psum(grads, "batch"), 1),
    (True, lambda grads: lax.pmean(grads, "batch"), 1 / 4),
  ],
  ids=["replicated", "replicated, pmean", "varying, psum", "varying, pmean is too small"],
)
@pytest.mark.parametrize("block_size", [None, 3])
def test_gradients_under_shard_maps_own_check_vma(mesh, varying, combine, factor, block_size):
  x = jnp.float32(np.stack(draw(8, 5)))
  w = jnp.float32(np.random.default_rng(1).normal(size=(5, 6)))

  def loss(w, x, axis_name):
    return nt_xent(x[0] @ w, x[1] @ w, temperature=0.2, axis_name=axis_name, block_size=block_size)

  def one_device(w, x):
    if varying:
      w = lax.pcast(w, "batch", to="varying")
    return combine(jax.grad(loss)(w, x, "batch"))

  specs = dict(mesh=mesh(4), in_specs=(P(), P(None, "batch")), out_specs=P(), check_vma=True)
  got = jax.jit(jax.shard_map(one_device, **specs))(w, x)
  want = jax.jit(jax.grad(functools.partial(loss, axis_name=None)))(w, x)
  assert_near_largest(got, factor * want, 1e-5)  # float32 through one more matrix product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_zero_vectors_count_as_similarity_zero(dtype):
  a, b = draw(8, 16)
  a[3] = 0
  a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
  loss, grads = loss_and_grads(a, b, temperature=0.2)
  norms = [np.linalg.norm(np.float64(x), axis=1, keepdims=True) for x in (a, b)]
  z1, z2 = (np.float64(x) / np.where(norm == 0, 1, norm) for x, norm in zip((a, b), norms, strict=True))
  z = np.concatenate([z1, z2])
  similarity = z @ z.T / 0.2
  np.fill_diagonal(similarity, -np.inf)
  positives = np.sum(z1 * z2, axis=1) / 0.2
  want = np.mean(np.log(np.exp(similarity).sum(axis=1)) - np.tile(positives, 2))
  np.testing.assert_allclose(loss, want, rtol=1e-6, atol=1e-6)  # float32 on the rounded inputs
  if dtype == jnp.float32:
    np.testing.assert_allclose(loss, 2.992298, atol=2e-6)  # float64 NumPy
  assert all(np.isfinite(np.float32(g)).all() for g in grads)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_all_zero_is_the_chance_level_with_a_finite_gradient(dtype):
  zero = jnp.zeros((8, 16), dtype)
  loss, grads = loss_and_grads(zero, zero, temperature=0.2)
  np.testing.assert_allclose(loss, math.log(15), rtol=1e-6)
  assert all(np.isfinite(np.float32(g)).all() for g in grads)


@pytest.mark.parametrize("loss", [nt_xent, info_nce, byol_loss, simsiam_loss, barlow_twins_loss, koleo_loss])
def test_a_norm_whose_square_overflows_is_nan_and_no_good_loss(loss):
  a, b = (jnp.float32(x) for x in draw(6, 4))
  others = () if loss is koleo_loss else (b,)
  assert np.isnan(loss(1e20 * a, *others)) and np.isfinite(loss(1e18 * a, *others))


def test_what_is_no_array_is_told_and_float64_of_numpy_is_narrowed_in_silence():
  a, b = draw(6, 4)
  with pytest.raises(TypeError, match="z1 must be an array, got a list"):
    nt_xent(a.tolist(), b.tolist())
  assert a.dtype == np.float64 and vicreg_loss(a, b).dtype == jnp.float32  # a warning is an error


# In float32 the loss is the difference of two numbers near 1 / temperature, each rounded to 1e-7 of itself.
@pytest.mark.parametrize(
  ("temperature", "want", "atol"), [(0.5, 0.594438, 1e-6), (0.1, 2.72362e-4, 1e-6), (0.01, 0, 0)]
)
def test_low_temperatures_do_not_overflow(temperature, want, atol):
  eye = jnp.eye(4)
  loss, grads = loss_and_grads(eye, eye, temperature=temperature)
  np.testing.assert_allclose(loss, want, rtol=0, atol=atol or 1e-30)
  assert all(np.isfinite(g).all() for g in grads)


def test_duplicate_images_stay_negatives_and_oneself_does_not_count():
  z = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
  got = jax.jit(functools.partial(nt_xent, temperature=0.5))(z, z)
  np.testing.assert_allclose(got, 0.820576, atol=2e-6)  # float64 NumPy; 1.201588 with oneself among the negatives


def test_norms_of_the_inputs_do_not_matter():
  a, b = draw(8, 16)
  loss, grads = loss_and_grads(jnp.float32(1000 * a), jnp.float32(1e-5 * b), temperature=0.2)
  np.testing.assert_allclose(loss, 3.236981, atol=5e-6)  # float64 NumPy
  assert all(np.isfinite(g).all() for g in grads)


def test_value_and_gradient_are_symmetric_in_the_views():
  a, b = map(jnp.float32, draw(6, 4))
  loss, (grad_a, grad_b) = loss_and_grads(a, b)
  swapped, (swapped_b, swapped_a) = loss_and_grads(b, a)
  np.testing.assert_allclose(loss, swapped, rtol=1e-6)  # float32, another order of summation
  assert_near_largest(swapped_a, grad_a, 2e-6)
  assert_near_largest(swapped_b, grad_b, 2e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_narrow_inputs_are_computed_in_float32(dtype):
  a, b = (jnp.asarray(x, dtype) for x in draw(8, 16))
  loss, grads = loss_and_grads(a, b, temperature=0.2)
  assert loss.dtype == jnp.float32
  assert [g.dtype for g in grads] == [dtype, dtype]
  np.testing.assert_allclose(loss, reference(np.float64(a), np.float64(b), 0.2), rtol=1e-6)  # of the rounded inputs


@pytest.mark.parametrize("axis_name", [None, "batch"])
def test_a_batch_of_one_is_refused(axis_name):
  z = jnp.ones((1, 1, 4))
  with pytest.raises(ValueError, match=r"batch of at least two images .*got 1"):
    jax.vmap(functools.partial(nt_xent, axis_name=axis_name), axis_name="batch")(z, z)


def test_a_batch_of_one_a_device_is_fine():
  a, b = draw(4, 3)
  loss = functools.partial(nt_xent, axis_name="batch")
  got = jax.jit(jax.vmap(loss, axis_name="batch"))(jnp.float32(a[:, None]), jnp.float32(b[:, None]))
  np.testing.assert_allclose(got, np.full(4, reference(a, b, 0.1)), rtol=2e-6)  # float32


@pytest.mark.parametrize(
  ("temperature", "error", "shown"),
  [
    (-1, ValueError, "-1"),
    (0, ValueError, "0"),
    (0.0, ValueError, "0.0"),
    (math.nan, ValueError, "nan"),
    (math.inf, ValueError, "inf"),
    (np.float32(-0.5), ValueError, "-0.5"),
    (jnp.float32(-0.5), ValueError, "-0.5"),
    ("0.1", TypeError, "'0.1'"),
    (True, TypeError, "True"),
    (np.array([0.1]), TypeError, "0.1"),
  ],
  ids=repr,
)
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_bad_temperatures_are_refused_with_their_value(temperature, error, shown, wrap):
  z = np.ones((4, 3), np.float32)
  with pytest.raises(error, match=f"temperature must be.*{shown}"):
    wrap(lambda a, b: nt_xent(a, b, temperature=temperature))(z, z)


@pytest.mark.parametrize(
  "temperature",
  [1, 0.2, np.float64(0.2), np.array(0.2), jnp.float32(0.2)],
  ids=repr,
)
def test_numbers_of_every_kind_are_temperatures(temperature):
  a, b = draw(4, 3)
  a, b = np.float32(a), np.float32(b)
  got = jax.jit(lambda: nt_xent(a, b, temperature=temperature))()
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, reference(a, b, float(temperature)), rtol=2e-6)  # float32


def test_the_temperature_may_be_traced_and_takes_a_gradient():
  a, b = draw(4, 3)
  value, grad = jax.jit(jax.value_and_grad(lambda t: nt_xent(jnp.float32(a), jnp.float32(b), temperature=t)))(0.2)
  np.testing.assert_allclose(value, reference(a, b, 0.2), rtol=2e-6)  # float32
  slope = (reference(a, b, 0.2 + 1e-6) - reference(a, b, 0.2 - 1e-6)) / 2e-6
  np.testing.assert_allclose(grad, slope, rtol=1e-5)  # float32


@pytest.mark.parametrize(
  ("z1", "z2", "error", "shown"),
  [
    (np.ones((4, 3), np.float32), np.ones((4, 2), np.float32), ValueError, r"\(4, 3\) and \(4, 2\)"),
    (np.ones((4, 3), np.float32), np.ones((5, 3), np.float32), ValueError, r"\(4, 3\) and \(5, 3\)"),
    (np.ones(4, np.float32), np.ones(4, np.float32), ValueError, r"z1 .*\(4,\)"),
    (np.ones((2, 4, 3), np.float32), np.ones((2, 4, 3), np.float32), ValueError, r"z1 .*\(2, 4, 3\)"),
    (np.ones((4, 3), np.int32), np.ones((4, 3), np.float32), TypeError, "z1 .*int32"),
    (np.ones((4, 3), np.float32), np.ones((4, 3), np.uint8), TypeError, "z2 .*uint8"),
    (np.ones((4, 3), np.complex64), np.ones((4, 3), np.float32), TypeError, "z1 .*complex64"),
  ],
)
def test_wrong_shapes_and_dtypes_are_named(z1, z2, error, shown):
  with pytest.raises(error, match=shown):
    nt_xent(z1, z2)


@pytest.mark.parametrize("loss", [nt_xent, info_nce])
@pytest.mark.parametrize(
  ("block_size", "error"), [(0, ValueError), (-3, ValueError), (2.0, TypeError), (True, TypeError), ("2", TypeError)]
)
def test_a_block_is_a_whole_number_of_rows(loss, block_size, error):
  with pytest.raises(error, match=f"block_size .*{block_size}"):
    loss(jnp.ones((4, 3)), jnp.ones((4, 3)), block_size=block_size)


def test_a_block_may_be_of_numpys_integers():
  z1, z2 = (jnp.float32(x) for x in draw(4, 3))
  np.testing.assert_allclose(nt_xent(z1, z2, block_size=np.int32(2)), nt_xent(z1, z2), rtol=1e-6)
