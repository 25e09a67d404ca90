"""One program for one device or a pod of hosts: the mesh, shardings, and how parts of a batch are combined."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssl_jax.methods.base import AXIS, Aux, Monitored

MONITORED = 256  # the approximate number of examples to which larger batches are subsampled for the monitors
SMALLEST_SPLIT = 2**14  # entries; for smaller arrays the extra collective costs more than the saved memory is worth


def make_mesh(devices: Sequence | None = None) -> Mesh:
  """Devices on one axis, each process's side by side, so that every process has a contiguous part of each batch.

  `devices`: None for all devices of all processes. If they are only described (`jax.experimental.topologies`),
  programs can be compiled for them.
  """
  return Mesh(np.array(sorted(devices or jax.devices(), key=lambda d: (d.process_index, d.id))), (AXIS,))


def replicated(mesh: Mesh) -> NamedSharding:
  """The sharding of the state: a full copy on every device."""
  return NamedSharding(mesh, P())


def split(mesh: Mesh) -> NamedSharding:
  """The sharding of a batch: its first axis over the devices."""
  return NamedSharding(mesh, P(AXIS))


def put_split(mesh: Mesh, tree: Any) -> Any:
  """Arrays that every process has in full, as global arrays whose first axis is split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, split(mesh), lambda at: x[at]), tree)


def put_batch(mesh: Mesh, batch: Any) -> Any:
  """This process's part of a batch, arrays [local_batch, ...], as global arrays that are split over the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(split(mesh), x), batch)


def abstract(tree: Any, sharding: NamedSharding) -> Any:
  """The shapes and types of a tree, with a sharding: what tracing and restoring take."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def sharded(tree: Any, mesh: Mesh) -> Any:
  """The shapes of a tree, each large array split over the devices (ZeRO), along the last axis that divides evenly."""

  def split_last(x):
    axes = [i for i, size in enumerate(x.shape) if x.size >= SMALLEST_SPLIT and size % mesh.size == 0]
    spec = P(*[AXIS if i == axes[-1] else None for i in range(x.ndim)]) if axes else P()
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

  return jax.tree.map(split_last, tree)


def bytes_a_device(tree: Any) -> int:
  """How much of a tree of shapes with shardings each device holds."""
  return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def mean_part(x: jax.Array, spec: P) -> jax.Array:
  """The mean over devices; where `spec` splits the array, only this device's part of it (reduce-scatter)."""
  if AXIS not in spec:
    return lax.pmean(x, AXIS)
  return lax.psum_scatter(x, AXIS, scatter_dimension=spec.index(AXIS), tiled=True) / lax.axis_size(AXIS)


def compile_map(function: Callable, mesh: Mesh) -> Any:
  """Compiles `function(variables, batch) -> outputs`: variables replicated, batch split, outputs gathered."""

  def gathered(variables, batch):
    return jax.tree.map(lambda x: lax.all_gather(x, AXIS, tiled=True), function(variables, batch))

  mapped = jax.shard_map(gathered, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P(), check_vma=False)
  return jax.jit(mapped)


def accumulate(gradient: Callable, microbatch: int | None, axis_name: str) -> Callable:
  """Gradient accumulation over microbatches for `gradient(batch, positions) -> (gradients, Aux)` of a separable loss.

  Gradients, metrics and averages are averaged over the chunks, and examples are concatenated. For a loss that is a mean
  over its examples this gives what the whole batch at once gives, except that batch norm normalises within a chunk.
  `microbatch` is counted over all devices; None: the whole batch at once.
  """
  if microbatch is None:
    return gradient

  def accumulated(batch, positions):
    m = microbatch // lax.axis_size(axis_name)
    chunks = jax.tree.map(lambda x: x.reshape(-1, m, *x.shape[1:]), (batch, positions))
    n = len(positions) // m

    def add(total, chunk):
      grads, aux = gradient(*chunk)
      averaged, concatenated = _by_kind(aux)
      return jax.tree.map(jnp.add, total, (grads, averaged)), concatenated

    grads, aux = jax.eval_shape(gradient, *jax.tree.map(lambda x: x[0], chunks))
    zero = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, _by_kind(aux)[0]))
    total, concatenated = lax.scan(add, zero, chunks)
    grads, averaged = jax.tree.map(lambda x: x / n, total)
    return grads, _from_kinds(averaged, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), concatenated))

  return accumulated


def combine(aux: Aux, axis_name: str) -> Aux:
  """Combines the `Aux` of all devices: averages by pmean, examples by concatenation in global order.

  A batch of at least twice `MONITORED` examples is subsampled at even spacing to fewer than twice that many embeddings,
  and at least one per device: the monitors are estimates, and the embeddings are gathered at every step.
  """
  averaged, (examples, embedding) = _by_kind(aux)
  if embedding is not None:
    rows = embedding.shape[0]
    embedding = embedding[:: max(1, min(rows * lax.axis_size(axis_name) // MONITORED, rows))]
  gathered = jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True), (examples, embedding))
  return _from_kinds(lax.pmean(averaged, axis_name), gathered)


def _by_kind(aux):
  """((what is averaged), (what is concatenated))."""
  embedding, marginal = aux.monitored or (None, None)
  return (aux.metrics, aux.averages, marginal), (aux.examples, embedding)


def _from_kinds(averaged, concatenated):
  (metrics, averages, marginal), (examples, embedding) = averaged, concatenated
  return Aux(metrics, averages, examples, None if embedding is None else Monitored(embedding, marginal))
