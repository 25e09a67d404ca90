"""The losses of a global batch on one device and on many: the same value everywhere, and the right gradient."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_losses import MAPPED, assert_near_largest, draw, rows_of_this_device

from ssl_jax.losses import barlow_twins_loss, koleo_loss, lejepa_loss, sigreg, sinkhorn_knopp, vicreg_loss

DIRECTIONS = np.random.default_rng(3).normal(size=(5, 7))


# Each takes two views [n, 5] and the axis; where a loss takes one, the other has no gradient.
def lejepa(a, b, axis_name):
  return lejepa_loss(jnp.stack([a, b]), DIRECTIONS, global_views=1, axis_name=axis_name, block_size=3)


def koleo(a, b, axis_name):
  del b
  return koleo_loss(a, axis_name=axis_name, block_size=1)


def vicreg(a, b, axis_name):
  return vicreg_loss(a, b, axis_name=axis_name)


def barlow_twins(a, b, axis_name):
  return barlow_twins_loss(a, b, axis_name=axis_name)


def sigreg_alone(a, b, axis_name):
  del b
  return sigreg(a, DIRECTIONS, axis_name=axis_name)


def koleo_at_once(a, b, axis_name):
  del b
  return koleo_loss(a, axis_name=axis_name)


def slow(*losses):
  return [pytest.param(loss, marks=pytest.mark.slow) for loss in losses]


LOSSES = [lejepa, koleo, vicreg, barlow_twins]
ALL = [*LOSSES, *slow(sigreg_alone, koleo_at_once)]
WAYS = [("pmap", 2)]
MORE_WAYS = [("vmap", 2), ("vmap", 4), ("pmap", 4), ("shard_map", 2), ("shard_map", 4)]


def views():
  a, b = draw(8, 5)
  return jnp.asarray(a), jnp.asarray(0.7 * a + 0.5 * b + 1)


@pytest.mark.parametrize("ways", [WAYS, pytest.param(MORE_WAYS, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("loss", ALL)
def test_every_way_of_mapping_gives_the_global_loss_and_gradient(x64, mesh, loss, ways):
  whole = jax.jit(jax.value_and_grad(functools.partial(loss, axis_name=None), argnums=(0, 1)))
  want, want_grads = whole(*views())

  def on_a_device(a, b):
    """The loss, and the mean over devices of the gradients of the whole a and b."""
    rows = lambda a, b: loss(rows_of_this_device(a), rows_of_this_device(b), "batch")  # noqa: E731
    value, grads = jax.value_and_grad(rows, argnums=(0, 1))(a, b)
    return value, lax.pmean(grads, "batch")

  results = [MAPPED[way](on_a_device, *views(), n, mesh) for way, n in ways]
  sharded = [jax.device_put(x, NamedSharding(mesh(4), P("batch"))) for x in views()]
  value, grads = whole(*sharded)
  results.append((value[None], tuple(grad[None] for grad in grads)))
  for values, grads in results:
    assert len(set(np.asarray(values).tolist())) == 1, "the value differs between devices"
    np.testing.assert_allclose(values, np.full(len(values), want), rtol=1e-12)  # float64, another order of summation
    for got, grad in zip(grads, want_grads, strict=True):
      for device in range(len(values)):
        np.testing.assert_allclose(got[device], grad, rtol=0, atol=1e-12 * max(1, np.abs(want_grads[0]).max()))


@pytest.mark.parametrize("loss", [lejepa, koleo, *slow(vicreg, barlow_twins, sigreg_alone, koleo_at_once)])
def test_gradients_of_replicated_parameters_are_whole_under_shard_maps_own_check_vma(x64, mesh, loss):
  w = jnp.asarray(np.random.default_rng(1).normal(size=(5, 5)))

  def of_parameters(w, a, b, axis_name):
    return loss(a @ w, b @ w, axis_name)

  def on_a_device(w, a, b):
    return jax.grad(of_parameters)(w, a, b, "batch")  # JAX has summed it already

  specs = dict(mesh=mesh(4), in_specs=(P(), P("batch"), P("batch")), out_specs=P(), check_vma=True)
  got = jax.jit(jax.shard_map(on_a_device, **specs))(w, *views())
  want = jax.jit(jax.grad(functools.partial(of_parameters, axis_name=None)))(w, *views())
  assert_near_largest(got, want, 1e-12)


@pytest.mark.parametrize("check_vma", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_sinkhorn_balances_the_prototypes_over_all_devices(x64, mesh, check_vma):
  logits = jnp.asarray(np.random.default_rng(0).normal(size=(12, 5)))
  real = jnp.arange(12) < 8  # on the last device all is padding
  whole = jax.jit(sinkhorn_knopp)(logits, temperature=0.1, weights=real)
  mapped = jax.shard_map(
    lambda logits, real: sinkhorn_knopp(logits, temperature=0.1, weights=real, axis_name="batch"),
    mesh=mesh(4), in_specs=P("batch"), out_specs=P("batch"), check_vma=check_vma,
  )  # fmt: skip
  np.testing.assert_allclose(jax.jit(mapped)(logits, real), whole, rtol=1e-12, atol=1e-15)
  lanes = jax.vmap(functools.partial(sinkhorn_knopp, temperature=0.1, axis_name="batch"), axis_name="batch")
  without_padding = jax.jit(lanes)(logits.reshape(3, 4, 5))
  np.testing.assert_allclose(
    without_padding.reshape(12, 5), jax.jit(sinkhorn_knopp)(logits, temperature=0.1), rtol=1e-12
  )


@pytest.mark.parametrize("loss", [koleo_loss, lambda z, **kw: vicreg_loss(z, z, **kw)], ids=["koleo", "vicreg"])
def test_a_batch_of_one_a_device_is_fine(x64, loss):
  z = views()[0]
  got = jax.jit(jax.vmap(functools.partial(loss, axis_name="batch"), axis_name="batch"))(z[:, None])
  np.testing.assert_allclose(got, np.full(8, jax.jit(loss)(z)), rtol=1e-12)
