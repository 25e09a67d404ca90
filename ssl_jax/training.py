"""The training step, top to bottom, and the state that it goes through.

A step is written as for `jax.pmap`: per-device code with a named axis. Since JAX 0.8 pmap is `jit(shard_map(...))`
inside, and JAX asks new code to write the latter; so does `compile_step`. A test runs the same step under pmap.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ssl_jax import augment, monitors, parallel
from ssl_jax.augment import View
from ssl_jax.methods.base import AXIS, Method, check_aux, check_update


class TrainState(NamedTuple):
  """Everything that the next step depends on, and so everything in a checkpoint."""

  step: jax.Array  # int32, how many steps are done
  params: Any
  state: Any  # the method's
  opt_state: Any


def make_init(
  method: Method,
  optimizer: optax.GradientTransformation,
  views: Sequence[View],
  channels: int,
  seed: int,
) -> Callable[[], TrainState]:
  """Returns `() -> TrainState`; views of one black image give the shapes."""
  shape = 1, views[0].size, views[0].size, channels

  def init():
    keys = augment.example_keys(seed, jnp.int32(0), jnp.arange(1))
    example = augment.make_views(keys, jnp.zeros(shape, jnp.uint8), views)
    params, state = method.init(jax.random.key(seed, impl="threefry2x32"), example)
    return TrainState(jnp.int32(0), params, state, optimizer.init(params))

  return init


class Step(NamedTuple):
  """A training step in two halves, between which gradients are averaged over the devices.

  Called, it is one device's whole step, (TrainState, batch) -> (TrainState, metrics), for `jax.pmap` and `jax.vmap`
  with the axis name `AXIS`. A batch is {"image": uint8 [b, H, W, C], or the crops of each resolution}, and for a method
  that takes labels also {"label": int32 [b]}.
  """

  gradient: Callable  # (TrainState, batch) -> (gradients, Aux) of this device's part of the batch
  update: Callable  # (TrainState, gradients, Aux), of the whole batch by now -> (TrainState, metrics)

  def __call__(self, train, batch):
    grads, aux = self.gradient(train, batch)
    return self.update(train, lax.pmean(grads, AXIS), parallel.combine(aux, AXIS))


def make_step(
  method: Method,
  optimizer: optax.GradientTransformation,
  views: Sequence[View],
  seed: int,
  microbatch: int | None = None,
) -> Step:
  """Returns the training step; `microbatch` is how many images of the global batch are encoded at once, None: all."""
  optimizer = optax.with_extra_args_support(optimizer)  # some optimizers take the loss

  def gradient(train, batch):
    step, params, state, _ = train
    b = jax.tree.leaves(batch["image"])[0].shape[0]
    positions = lax.axis_index(AXIS) * b + jnp.arange(b)

    def of_batch(batch, positions):
      keys = augment.example_keys(seed, step, positions)
      drawn = augment.make_views(keys, batch["image"], views)  # one [v, b, h, w, c] array a resolution
      labels = (batch["label"],) if method.takes_labels else ()
      (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, drawn, keys, step, *labels)
      check_aux(aux, len(positions))
      return grads, aux

    # Where the loss is not a mean over examples, the method itself encodes by microbatches.
    by_chunks = parallel.accumulate(of_batch, microbatch, AXIS) if method.separable else of_batch
    return by_chunks(batch, positions)

  def update(train, grads, aux):
    step, params, _, opt_state = train
    updates, opt_state = optimizer.update(grads, opt_state, params, value=aux.metrics["loss"])
    params = optax.apply_updates(params, updates)
    state = method.update(params, train.state, aux, step)
    check_update(state, train.state)

    row = aux.metrics | (monitors.measure(*aux.monitored) if aux.monitored else {})
    row |= {"grad_norm": optax.tree.norm(grads), "update_norm": optax.tree.norm(updates)}
    # If loss, gradient or update is not finite, a step changes nothing: optimizers can make NaN of a finite gradient.
    # The loop stops when it next looks at the metrics.
    finite = jnp.isfinite(row["loss"]) & jnp.isfinite(row["grad_norm"]) & jnp.isfinite(row["update_norm"])
    new = TrainState(step + 1, params, state, opt_state)
    return jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, train), row

  return Step(gradient, update)


def compile_step(step: Step, state: TrainState, mesh: Mesh) -> Any:
  """Compiles (TrainState, batch) -> (TrainState, metrics); the state that goes in is donated.

  The parameters and the method's state go whole to `gradient`, per-device code on the named axis. Gradients are
  averaged and, where the state is split over the devices (ZeRO), scattered as it is. `update` is code on global arrays,
  which XLA splits likewise: each device has a part of the optimizer state and of the teacher, and makes a part of the
  update. The numbers do not depend on the sharding, but for the order of sums.

  check_vma=False keeps pmap's rule for gradients: `lax.pmean` of the per-device gradients is the gradient of the mean
  loss. Under the default, JAX would have summed them already.

  Args:
    step: its two halves.
    state: the TrainState, or its shapes, with the shardings to keep: `parallel.replicated` or `parallel.sharded`.
    mesh: the devices.
  """
  shardings = jax.tree.map(lambda x: x.sharding, state)
  specs = jax.tree.map(lambda sharding: sharding.spec, shardings.params)

  def averaged_gradient(train, batch):
    grads, aux = step.gradient(train, batch)
    return jax.tree.map(parallel.mean_part, grads, specs), parallel.combine(aux, AXIS)

  mapped = jax.shard_map(averaged_gradient, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(specs, P()), check_vma=False)

  def train_step(train, batch):
    return step.update(train, *mapped(train._replace(opt_state=()), batch))

  return jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, parallel.replicated(mesh)))
