"""Microbatches of every method: the gradient of the whole batch, and how batch norm changes it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ssl_jax import augment, parallel, training
from ssl_jax.methods import barlow_twins, byol, dino, dinov2, lejepa, mae, moco, moco_v3, simclr, simsiam, vicreg
from ssl_jax.methods.base import AXIS, constant_momentum
from ssl_jax.models import heads, norm, vit
from ssl_jax.models.mae import MAEDecoder

TWO = 2 * (augment.View(size=12, jitter=(0.4, 0.4, 0.0, 0.0)),)
VIEWS = {
  "simclr": TWO,
  "moco": TWO,
  "moco_v3": TWO,
  "byol": TWO,
  "simsiam": TWO,
  "vicreg": TWO,
  "barlow_twins": TWO,
  "mae": (augment.View(size=12),),
  "dino": (*TWO, *(2 * (augment.View(size=8, scale=(0.1, 0.4)),))),
  "dinov2": (*TWO, *(2 * (augment.View(size=8, scale=(0.1, 0.4)),))),
  "lejepa": (*TWO, *(2 * (augment.View(size=8, scale=(0.1, 0.4)),))),
}
SLOW = ("mae", "dinov2", "byol", "lejepa", "simsiam", "vicreg", "barlow_twins")
IMAGES = np.random.default_rng(0).integers(0, 256, (8, 14, 14, 1), dtype=np.uint8)


class Encoder(heads.nn.Module):
  """A linear layer on the mean of the columns, with batch norm or without: any image size."""

  batch_norm: bool = False
  group: int | None = None

  @heads.nn.compact
  def __call__(self, x, *, train):
    # A bias before batch norm has no gradient but rounding.
    x = heads.nn.Dense(6, use_bias=self.group is None)(jnp.mean(x, axis=(1, 3))[:, :8])
    if self.batch_norm:
      x = norm.BatchNorm(AXIS, self.group)(x, train)
    return jnp.tanh(x)


class Head(heads.nn.Module):
  @heads.nn.compact
  def __call__(self, x, *, train):
    return heads.nn.Dense(5)(x)


def make(name, microbatch, batch_norm=False, group=None):
  encoder, momentum = Encoder(batch_norm, group), constant_momentum(0.9)
  over = dict(axis_name=AXIS)
  head, predictor = (
    heads.Projector(hidden=6, features=5, bn_group_size=group, **over) if group else Head() for _ in range(2)
  )
  if name == "simclr":
    return simclr.simclr(encoder, head, temperature=0.5, microbatch=microbatch, **over)
  if name == "moco":
    return moco.moco(encoder, Head(), queue_size=12, temperature=0.5, momentum=momentum, **over)
  if name == "moco_v3":
    parts = encoder, Head(), Head()
    return moco_v3.moco_v3(*parts, temperature=0.5, momentum=momentum, microbatch=microbatch, **over)
  if name == "vicreg":
    return vicreg.vicreg(encoder, Head(), invariance=1.0, variance=1.0, microbatch=microbatch, **over)
  if name == "barlow_twins":
    return barlow_twins.barlow_twins(encoder, Head(), loss_scale=0.01, microbatch=microbatch, **over)
  if name == "lejepa":
    return lejepa.lejepa(encoder, Head(), slices=8, microbatch=microbatch, **over)
  if name == "simsiam":
    return simsiam.simsiam(encoder, Head(), Head())
  if name == "byol":
    return byol.byol(encoder, head, predictor, target_momentum=momentum)
  if name == "mae":
    tiny = vit.ViT(patch_size=4, dim=8, depth=1, heads=2, image_size=12, positions="column_first")
    return mae.mae(tiny, MAEDecoder(16, dim=8, depth=1, heads=2))
  head = heads.DINOHead(hidden=8, bottleneck=4, prototypes=9)
  if name == "dinov2":
    tiny = vit.ViT(patch_size=2, dim=8, depth=1, heads=2, image_size=12, mask_token=True, drop_path=0.4)
    settings = dict(teacher_temperature=optax.constant_schedule(0.04), teacher_momentum=momentum)
    settings |= dict(koleo_weight=0.0)  # class tokens whose path is dropped are equal, which KoLeo cannot take
    return dinov2.dinov2(tiny, head, microbatch=microbatch, **settings, **over)
  return dino.dino(encoder, head, teacher_temperature=optax.constant_schedule(0.04), teacher_momentum=momentum)


def one_step(name, devices, microbatch, batch_norm=False, group=None):
  """(state after a step of gradient descent, metrics)."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), (AXIS,))
  method, optimizer = make(name, microbatch, batch_norm, group), optax.sgd(1.0)
  with_axis = jax.vmap(lambda _: training.make_init(method, optimizer, VIEWS[name], 1, 0)(), axis_name=AXIS)
  state = jax.device_put(jax.tree.map(lambda x: x[0], jax.jit(with_axis)(jnp.arange(1))), parallel.replicated(mesh))
  step = training.compile_step(training.make_step(method, optimizer, VIEWS[name], 0, microbatch), state, mesh)
  return jax.device_get(step(state, parallel.put_batch(mesh, {"image": IMAGES})))


def assert_alike(got, want):
  for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
    scale = max(float(np.max(np.abs(y))), 1e-2)  # what is zero but for rounding, as a bias before batch norm
    np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("devices, microbatch", [(2, 4), pytest.param(1, 2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in VIEWS])
def test_without_batch_norm_a_step_by_microbatches_is_the_step_of_the_whole_batch(name, devices, microbatch):
  # float32 sums in another order
  assert_alike(one_step(name, devices, microbatch), one_step(name, 1, None))


@pytest.mark.parametrize("name", ["simclr", pytest.param("byol", marks=pytest.mark.slow)])
def test_with_batch_norm_in_groups_a_step_by_microbatches_is_the_step_of_the_whole_batch(name):
  assert_alike(one_step(name, 1, 4, True, group=4), one_step(name, 1, None, True, group=4))


@pytest.mark.parametrize("name", [pytest.param("byol", marks=pytest.mark.slow), "moco_v3"])
def test_with_batch_norm_a_chunk_is_normalised_apart_and_running_statistics_are_averaged(name):
  whole, half = one_step(name, 1, None, True)[0], one_step(name, 1, 4, True)[0]
  for network in ("batch_stats", "target_batch_stats" if name == "byol" else "momentum_batch_stats"):
    stats = [getattr(state.state, network)["encoder"]["BatchNorm_0"] for state in (whole, half)]
    np.testing.assert_allclose(stats[1]["mean"], stats[0]["mean"], rtol=1e-5, atol=1e-6)  # a mean of means
    assert np.max(np.abs(stats[1]["var"] - stats[0]["var"])) > 1e-6  # but no mean of variances
  kernels = [state.params["encoder"]["Dense_0"]["kernel"] for state in (whole, half)]
  assert np.max(np.abs(kernels[0] - kernels[1])) > 1e-4


def test_the_gradient_of_separable_chunks_is_the_mean_of_the_chunks_gradients():
  method = make("byol", None, batch_norm=True)
  views = (4 * jax.random.normal(jax.random.key(1), (2, 8, 12, 12, 1)),)

  def gradient(params, state, views):
    (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, views, None, 0)
    return grads, aux

  def both(_):
    params, state = method.init(jax.random.key(0), views)

    def chunk(images, positions):
      del images
      return gradient(params, state, (views[0][:, positions],))

    got = parallel.accumulate(chunk, 4, AXIS)(jnp.zeros((8, 1)), jnp.arange(8))
    halves = [chunk(None, jnp.arange(4) + first) for first in (0, 4)]
    return got, halves

  (grads, aux), halves = jax.tree.map(lambda x: x[0], jax.jit(jax.vmap(both, axis_name=AXIS))(jnp.arange(1)))
  (grads1, aux1), (grads2, aux2) = halves
  mean = lambda a, b: jax.tree.map(lambda x, y: (x + y) / 2, a, b)  # noqa: E731
  assert_alike(grads, mean(grads1, grads2))
  assert_alike(aux.averages, mean(aux1.averages, aux2.averages))
  assert_alike(aux.metrics, mean(aux1.metrics, aux2.metrics))
  np.testing.assert_allclose(aux.monitored.embedding[4:], aux2.monitored.embedding, rtol=1e-5, atol=1e-6)


@pytest.mark.slow  # test_simclr has one
@pytest.mark.parametrize("name", ["mae", "moco_v3"])
def test_a_microbatch_bounds_the_memory_of_the_step(name):
  views = (augment.View(size=32),) * (1 if name == "mae" else 2)

  def temporaries(microbatch):
    encoder = vit.ViT(patch_size=4, dim=32, depth=2, heads=2, image_size=32, positions="column_first")
    method, optimizer = mae.mae(encoder, MAEDecoder(48, dim=32, depth=1, heads=2)), optax.sgd(1.0)
    if name == "moco_v3":
      method = moco_v3.moco_v3(
        encoder, Head(), Head(), temperature=1.0, momentum=constant_momentum(0.9), axis_name=AXIS, microbatch=microbatch
      )
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
    init = training.make_init(method, optimizer, views, 3, 0)
    state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
    step = training.compile_step(training.make_step(method, optimizer, views, 0, microbatch), state, mesh)
    batch = {"image": jax.ShapeDtypeStruct((64, 32, 32, 3), np.uint8, sharding=parallel.split(mesh))}
    return step.lower(state, batch).compile().memory_analysis().temp_size_in_bytes

  assert temporaries(4) < temporaries(None) / 3
