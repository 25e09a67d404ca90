"""SimCLR against six steps of a PyTorch reference, and its microbatches against the whole batch."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from einops import rearrange
from flax import traverse_util
from named_weights import named_images, named_weight

from ssl_jax import build, convert, optim
from ssl_jax.losses import nt_xent
from ssl_jax.methods.base import OneNetworkState
from ssl_jax.methods.simclr import simclr
from ssl_jax.models import resnet
from ssl_jax.models.heads import Network, SimCLRProjector
from ssl_jax.models.norm import BatchNorm

value_and_grad = functools.partial(jax.value_and_grad, has_aux=True)


def init(method, views):
  return jax.jit(method.init)(jax.random.key(0), (views[:, :1],))


def shapes_of(method, size=32):
  return jax.eval_shape(lambda: method.init(jax.random.key(0), (jnp.zeros((2, 1, size, size, 3)),)))


def assert_near_largest(got, want, rtol):
  np.testing.assert_allclose(got, want, rtol=0, atol=rtol * np.abs(want).max())


# The golden trajectory.


@pytest.mark.parametrize(
  ("dtype", "steps", "loss_rtol"),
  [
    # What the file was run in. test_trajectories takes the same kind of steps on tiny networks.
    pytest.param("float64", 6, 1e-5, marks=pytest.mark.slow),
    # Steps enlarge its rounding: PyTorch's own differs by up to 1e-4 after six.
    pytest.param("float32", 3, 1e-3, marks=pytest.mark.slow),
  ],
)
def test_lars_steps_and_the_features_after_six_are_the_pytorch_references(optimised, golden, dtype, steps, loss_rtol):
  g = golden("simclr_trajectory")
  with jax.enable_x64(dtype == "float64"):
    encoder = resnet.resnet18(dtype=jnp.dtype(dtype))
    projector = SimCLRProjector(hidden=64, features=32, dtype=jnp.dtype(dtype))
    method = simclr(encoder, projector, temperature=0.5)
    params, state = shapes_of(method)
    shapes = {"params": params, "batch_stats": state.batch_stats}
    empty = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), shapes)
    weights = {name: named_weight(f"simclr/{name}", x.shape) for name, x in convert.to_torch(empty).items()}
    variables = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), convert.from_torch(weights, shapes))
    params, state = variables["params"], OneNetworkState(variables["batch_stats"])
    optimizer = optim.lars(
      lambda i: 0.01 * jnp.minimum(1, i / 2), lambda p: optim.decayed(p, (".*/bias", ".*/scale")), weight_decay=1e-2
    )

    @jax.jit
    def step(params, state, opt_state, views, i):
      (_, aux), grads = value_and_grad(method.loss)(params, state, views, None, i)
      updates, opt_state = optimizer.update(grads, opt_state, params)
      params = optax.apply_updates(params, updates)
      return params, method.update(params, state, aux, i), opt_state, aux.metrics["loss"]

    opt_state = jax.jit(optimizer.init)(params)
    losses = []
    for i in range(steps):
      views = np.stack([named_images(f"simclr/view{v}_{i}", (16, 64, 64, 3)) for v in (1, 2)]).astype(dtype)
      params, state, opt_state, loss = step(params, state, opt_state, (views,), i)
      assert loss.dtype == dtype
      losses.append(float(loss))

    @jax.jit
    def probe(params, state, images):
      features = encoder.apply(method.encoder(params, state), images, train=False)
      variables = {"params": params["projector"], "batch_stats": state.batch_stats["projector"]}
      return features, projector.apply(variables, features, train=False)

    if steps == 6:
      got = probe(params, state, named_images("simclr/probe", (4, 64, 64, 3)).astype(dtype))
      for value, key in zip(got, ("encoder_probe", "projection_probe"), strict=True):
        assert_near_largest(value, g[key], 1e-5)
  np.testing.assert_allclose(losses, g["losses"][:steps], rtol=loss_rtol)


# The loss.


class Encoder(nn.Module):
  """A convolution, batch norm where `norm` says so, the mean over the map. All float64 under x64."""

  norm: bool = True
  features: int = 5

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(self.features, (3, 3), use_bias=False, param_dtype=images.dtype, name="conv")(images)
    if self.norm:
      x = BatchNorm(dtype=images.dtype, name="bn")(x, train)
    return jnp.mean(jnp.tanh(x), axis=(1, 2))


class Projector(nn.Module):
  norm: bool = True

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(4, use_bias=False, param_dtype=x.dtype, name="linear1")(x)
    return BatchNorm(dtype=x.dtype, name="bn1")(x, train) if self.norm else x


def draw_views(batch=8, dtype=np.float64, seed=0):
  return np.random.default_rng(seed).normal(size=(2, batch, 6, 6, 3)).astype(dtype)


def run(method, params, state, views):
  """((loss, aux), gradient)."""
  return jax.jit(lambda p: value_and_grad(method.loss)(p, state, (views,), None, 0))(params)


def test_both_views_go_through_one_forward_and_the_loss_is_twice_nt_xent(x64):
  method, views = simclr(Encoder(), Projector(), temperature=0.3), draw_views()
  params, state = init(method, views)
  (loss, aux), _ = run(method, params, state, views)

  rows = views.reshape(16, 6, 6, 3)  # batch norm sees all 2N
  variables = {"params": params, "batch_stats": state.batch_stats}
  z, changed = Network(Encoder(), Projector()).apply(variables, rows, train=True, mutable=["batch_stats"])
  np.testing.assert_allclose(aux.metrics["loss"], nt_xent(z[:8], z[8:], temperature=0.3), rtol=1e-12)
  np.testing.assert_allclose(loss, 2 * aux.metrics["loss"], rtol=1e-15)
  np.testing.assert_allclose(aux.monitored.embedding, np.stack([z[:8], z[8:]], axis=1), rtol=0, atol=1e-12)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12), aux.averages, changed["batch_stats"])

  moved = method.update(params, state, aux, 0)
  jax.tree.map(np.testing.assert_array_equal, moved.batch_stats, aux.averages)
  for path, leaf in traverse_util.flatten_dict(moved.batch_stats).items():
    assert np.abs(leaf - traverse_util.flatten_dict(state.batch_stats)[path]).max() > 1e-4, path


def test_which_view_an_image_is_in_changes_nothing(x64):
  method, views = simclr(Encoder(), Projector()), draw_views()
  params, state = init(method, views)
  mixed = views.copy()
  mixed[:, ::2] = mixed[::-1, ::2]  # every other image has its views exchanged
  (loss, aux), grads = run(method, params, state, views)
  (mixed_loss, mixed_aux), mixed_grads = run(method, params, state, mixed)
  np.testing.assert_allclose(mixed_loss, loss, rtol=1e-12)  # float64, another order of summation
  jax.tree.map(functools.partial(assert_near_largest, rtol=1e-11), mixed_grads, grads)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), mixed_aux.averages, aux.averages)


def test_every_parameter_takes_a_gradient_and_the_state_takes_none(x64):
  method, views = simclr(Encoder(), Projector()), draw_views()
  params, state = init(method, views)
  grad, state_grad = jax.jit(jax.grad(lambda p, s: method.loss(p, s, (views,), None, 0)[0], argnums=(0, 1)))(
    params, state
  )
  assert all(np.abs(leaf).max() > 1e-6 for leaf in jax.tree.leaves(grad))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(state_grad))


def test_the_chance_level_is_that_of_equal_embeddings():
  assert simclr(Encoder(), Projector()).chance(4096) == pytest.approx(math.log(8191), rel=1e-12)
  assert not simclr(Encoder(), Projector()).separable


def test_the_encoders_variables_fit_the_encoder_alone(x64):
  method, views = simclr(Encoder(), Projector()), draw_views()
  params, state = init(method, views)
  variables = method.encoder(params, state)
  got = Encoder().apply(variables, views[0], train=False)
  own = Encoder().init(jax.random.key(1), views[0], train=True)
  assert jax.tree.map(jnp.shape, variables) == jax.tree.map(jnp.shape, dict(own))
  assert got.shape == (8, 5)
  without = simclr(Encoder(norm=False), Projector(norm=False))
  params, state = init(without, views)
  Encoder(norm=False).apply(without.encoder(params, state), views[0], train=False)


# Microbatches.


@pytest.mark.parametrize("microbatch", [1, 2, 8])
def test_microbatches_without_batch_norm_are_the_whole_batch(x64, microbatch):
  views = draw_views()
  modules = Encoder(norm=False), Projector(norm=False)
  whole, parts = simclr(*modules), simclr(*modules, microbatch=microbatch)
  params, state = init(whole, views)
  (loss, aux), grads = run(whole, params, state, views)
  (got, got_aux), got_grads = run(parts, params, state, views)
  np.testing.assert_allclose(got, loss, rtol=1e-13)  # float64, another order of summation
  jax.tree.map(functools.partial(assert_near_largest, rtol=1e-12), got_grads, grads)
  np.testing.assert_allclose(got_aux.monitored.embedding, aux.monitored.embedding, rtol=0, atol=1e-13)
  assert got_aux.averages == aux.averages == {}


@pytest.mark.parametrize("microbatch", [2, 4])
def test_microbatches_normalise_within_a_chunk_and_average_the_running_statistics(x64, microbatch):
  views = draw_views()
  method = simclr(Encoder(), Projector(), microbatch=microbatch)
  params, state = init(method, views)
  network = Network(Encoder(), Projector())

  def ghost_loss(params):
    """Each chunk of images, both views together, is normalised apart; the loss is of all of them."""
    z1, z2, stats = [], [], []
    for first in range(0, 8, microbatch):
      images = rearrange(views[:, first : first + microbatch], "v m h w c -> (v m) h w c")
      variables = {"params": params, "batch_stats": state.batch_stats}
      z, changed = network.apply(variables, images, train=True, mutable=["batch_stats"])
      z1.append(z[:microbatch])
      z2.append(z[microbatch:])
      stats.append(changed["batch_stats"])
    mean = jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *stats)
    return 2 * nt_xent(jnp.concatenate(z1), jnp.concatenate(z2)), mean

  (want, want_stats), want_grads = jax.jit(value_and_grad(ghost_loss))(params)
  (got, aux), grads = run(method, params, state, views)
  np.testing.assert_allclose(got, want, rtol=1e-12)  # float64, another order of summation
  jax.tree.map(functools.partial(assert_near_largest, rtol=1e-11), grads, want_grads)
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14), aux.averages, want_stats)
  (whole, _), _ = run(simclr(Encoder(), Projector()), params, state, views)
  assert abs(whole - want) > 1e-3  # ghost batch norm is another function than the whole batch's


@pytest.mark.parametrize("devices", [2, 4])
def test_a_microbatch_counts_the_images_of_the_global_batch(x64, devices):
  views = draw_views()
  sizes = []

  class Spy(Encoder):
    @nn.compact
    def __call__(self, images, *, train):
      sizes.append(images.shape[0])
      return super().__call__(images, train=train)

  method = simclr(Spy(norm=False), Projector(norm=False), axis_name="batch", microbatch=4)
  whole = simclr(Encoder(norm=False), Projector(norm=False))
  params, state = init(whole, views)
  sizes.clear()
  split = rearrange(views, "v (n b) h w c -> n v b h w c", n=devices)

  def one_device(views):
    (loss, _), grads = value_and_grad(method.loss)(params, state, (views,), None, 0)
    return loss, jax.lax.pmean(grads, "batch")

  losses, grads = jax.jit(jax.vmap(one_device, axis_name="batch"))(split)
  assert set(sizes) == {2 * 4 // devices}  # both views of this device's share of four images
  (want, _), want_grads = run(whole, params, state, views)
  np.testing.assert_allclose(losses, np.full(devices, want), rtol=1e-12)  # float64, another order of summation
  jax.tree.map(lambda got, w: assert_near_largest(got[0], w, 1e-11), grads, want_grads)


def test_a_microbatch_bounds_the_memory_of_the_step():
  encoder = resnet.ResNet(stages=(1, 1), width=0.25, stem="small")

  def temporaries(microbatch):
    method = simclr(encoder, SimCLRProjector(features=8), microbatch=microbatch)
    params, state = shapes_of(method)
    views = jax.ShapeDtypeStruct((2, 32, 32, 32, 3), jnp.float32)
    grad = jax.jit(lambda p, s, v: value_and_grad(method.loss)(p, s, (v,), None, 0))
    return grad.lower(params, state, views).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(4) < temporaries(None) / 2


# What a recipe builds.


@pytest.fixture(scope="module")
def config():
  return ml_collections.ConfigDict(
    dict(
      dtype="float32",
      seed=0,
      data=dict(channels=3),
      views=2 * (dict(size=32),),
      microbatch=None,
      batch_size=8,
      encoder=dict(name="resnet", stages=(1, 1), width=0.5, stem="small"),
      method=dict(name="simclr", temperature=0.2, projector=dict(layers=2, hidden=64, features=32)),
    )
  )


@pytest.fixture(scope="module")
def created(config):
  method, _ = build.method_of(config, 10, 5)
  params, _ = init(method, draw_views(1, np.float32))
  return {"/".join(path): np.asarray(leaf) for path, leaf in traverse_util.flatten_dict(params).items()}


def test_kernels_start_truncated_normal_with_variance_one_over_fan_in(created):
  kernels = {name: leaf for name, leaf in created.items() if name.startswith("encoder") and leaf.ndim == 4}
  assert len(kernels) == 7  # the stem, two blocks of two, a projection in each
  for name, kernel in kernels.items():
    scaled = kernel * math.sqrt(math.prod(kernel.shape[:3]))
    # 4.5 standard deviations of an estimate from this many numbers
    assert scaled.std() == pytest.approx(1, abs=4.5 / math.sqrt(2 * scaled.size)), name
    assert abs(scaled.mean()) < 4.5 / math.sqrt(scaled.size), name
    assert np.abs(scaled).max() <= 2 / 0.8796 + 1e-3, name  # cut at two of the uncut normal's deviations
    assert np.abs(scaled).max() > 2, name


def test_last_norms_of_blocks_start_at_zero_and_all_others_at_one(created):
  for name, leaf in created.items():
    if name.endswith("scale"):
      assert np.all(leaf == (0 if "encoder/layer" in name and "/bn2/" in name else 1)), name
    if name.endswith("bias"):
      assert not leaf.any(), name


def test_the_projector_starts_normal_with_deviation_a_hundredth_and_its_last_norm_has_no_offset(created):
  for name in ("projector/linear1/kernel", "projector/linear2/kernel"):
    kernel = created[name]
    assert kernel.std() == pytest.approx(0.01, rel=4.5 / math.sqrt(2 * kernel.size)), name
    assert np.abs(kernel).max() > 0.03, name  # not truncated
  assert "projector/bn1/bias" in created
  assert "projector/bn2/bias" not in created


def test_a_recipes_encoder_is_the_one_that_is_trained(config, created):
  _, encoder = build.method_of(config, 10, 5)
  params = jax.eval_shape(lambda: encoder.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)), train=True))["params"]
  names = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(params).items()}
  prefix = "encoder/"
  assert names == {name.removeprefix(prefix): x.shape for name, x in created.items() if name.startswith(prefix)}
  assert "layer1_0/downsample_conv/kernel" in names  # the official shortcut
