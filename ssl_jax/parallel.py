"""One program for one device or a pod of hosts.

A step is written as for `jax.pmap`: per-device code with a named axis. Since JAX 0.8 pmap is `jit(shard_map(...))`
inside, and JAX asks new code to write the latter; so does `compile_step`. A test runs the same step under pmap.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.methods.base import AXIS, Aux

SMALLEST_SPLIT = 2**14  # entries: a collective of its own would cost more than the memory of smaller arrays is worth


def make_mesh() -> Mesh:
  """All devices of all processes on one axis, a process's own side by side: it has a contiguous part of each batch."""
  return Mesh(np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id))), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of the state: whole on every device."""
  return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over the devices."""
  return NamedSharding(mesh, P(AXIS))


def put_split(mesh: Mesh, tree: Any) -> Any:
  """Arrays that every process has whole, as global arrays whose first axis is split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, split(mesh), lambda at: x[at]), tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
  """This process's part of a batch, arrays [local_batch, ...], as global arrays that are split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """The shapes and types of a tree, with a sharding: what tracing and restoring take."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def compile_step(step: Callable, mesh: Mesh) -> Callable:
  """Compiles `step(state, batch) -> (state, metrics)`: state and metrics replicated, batch split, state donated.

  check_vma=False keeps pmap's rule for gradients: `lax.pmean` of the per-device gradients is the gradient of the mean
  loss. Under the default, JAX would have summed them already.
  """
  mapped = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(P(), P()), check_vma=False)
  return jax.jit(mapped, donate_argnums=0)


def trace_alone(step: Callable, state: Any, batch: Any) -> Any:
  """Traces the step as `compile_step` would compile it for one device with the whole batch."""
  alone = Mesh(np.array(jax.local_devices()[:1]), (AXIS,))
  compiled: Any = compile_step(step, alone)
  return compiled.trace(abstract(state, replicated(alone)), abstract(batch, split(alone)))


def sharded(tree: Any, mesh: Mesh) -> Any:
  """The shapes of a tree, each large array split over the devices along its last axis that divides."""

  def split_last(x):
    axes = [i for i, size in enumerate(x.shape) if x.size >= SMALLEST_SPLIT and size % mesh.size == 0]
    spec = P(*[AXIS if i == axes[-1] else None for i in range(x.ndim)]) if axes else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(split_last, tree)


def bytes_a_device(tree: Any) -> int:
  """How much of a tree of shapes with shardings each device holds."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def compile_sharded_step(gradient: Callable, update: Callable, state: Any, mesh: Mesh) -> Callable:
  """Compiles the two halves of a step with the state split over the devices, as `sharded` says (ZeRO).

  The parameters and the method's state are gathered for `gradient`, per-device code on the named axis, whose gradients
  are reduced and scattered. `update` is code on global arrays, which XLA splits: each device has a part of the
  optimizer state and of the teacher, and makes a part of the update. The numbers are `compile_step`'s, but for the
  order of sums.

  Args:
    gradient: (state, batch) -> (gradients, Aux), of one device's part of the batch.
    update: (state, gradients, Aux) -> (state, metrics).
    state: shapes of the TrainState with shardings.
    mesh: its devices.
  """
  specs = jax.tree.map(lambda x: x.sharding.spec, state.params)

  def scattered(train, batch):
    grads, aux = gradient(train, batch)
    return jax.tree.map(_mean_part, grads, specs), combine(aux, AXIS)

  mapped = jax.shard_map(scattered, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=(specs, P()), check_vma=False)

  def step(train, batch):
    return update(train, *mapped(train._replace(opt_state=()), batch))

  shardings = jax.tree.map(lambda x: x.sharding, state)
  return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _mean_part(x, spec):
  """This device's part of the mean over devices."""
  if AXIS not in spec:
    return lax.pmean(x, AXIS)
  return lax.psum_scatter(x, AXIS, scatter_dimension=spec.index(AXIS), tiled=True) / lax.axis_size(AXIS)


def compile_map(function: Callable, mesh: Mesh) -> Callable:
  """Compiles `function(variables, batch) -> outputs`: variables replicated, batch split, outputs gathered."""

  def gathered(variables, batch):
    return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), function(variables, batch))

  mapped = jax.shard_map(gathered, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False)
  return jax.jit(mapped)


def accumulate(gradient: Callable, microbatch: int | None, axis_name: str) -> Callable:
  """Makes `gradient(images, positions) -> (gradients, Aux)` of a separable loss run one microbatch after the other.

  Gradients, metrics and averages are averaged over the chunks, examples concatenated: for a loss that is a mean over
  its examples the same as all at once, but that batch norm normalises within a chunk. `microbatch` is counted over all
  devices; None: all at once.
  """
  if microbatch is None:
    return gradient

  def accumulated(images, positions):
    m = microbatch // lax.axis_size(axis_name)
    chunks = jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]), (images, positions))
    n = len(positions) // m

    def add(total, chunk):
      grads, aux = gradient(*chunk)
      return jax.tree.map(jnp.add, total, (grads, aux.metrics, aux.averages)), aux.examples

    shapes = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], chunks))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], shapes[1].metrics, shapes[1].averages))
    total, examples = lax.scan(add, zero, chunks)
    grads, metrics, averages = jax.tree.map(lambda x: x / n, total)
    return grads, Aux(metrics, averages, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), examples))

  return accumulated


def combine(aux: Aux, axis_name: str) -> Aux:
  """Combines what each device's loss handed on: averages by pmean, examples by concatenation in global order."""
  return Aux(
    metrics=lax.pmean(aux.metrics, axis_name),
    averages=lax.pmean(aux.averages, axis_name),
    examples=jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), aux.examples),
  )
