"""Checkpoints by Orbax: asynchronous, the last few and the best; restored on any number of devices and processes."""

import contextlib
import gc
import hashlib
import json
import logging
import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax import lax
from orbax.checkpoint import checkpoint_managers

from ssl_jax.errors import UserError
from ssl_jax.run import cluster, log


class _Best(NamedTuple):
  """Keeps the best checkpoint by metrics.jsonl: Orbax loses its own metrics when a run is resumed."""

  rows: pathlib.Path

  def should_preserve(self, checkpoints, *, context):
    del context
    rows = [{"guard": row.get("knn_top1"), **row} for row in log.read_rows(self.rows)]
    scores = {row["step"]: row["guard"] for row in rows if row["guard"] is not None}
    best = max((c.step for c in checkpoints if c.step in scores), key=lambda s: (scores[s], s), default=None)
    return [c.step == best for c in checkpoints]


class _Manager(ocp.CheckpointManager):
  """Only `signals.listening` asks JAX about preemption: the steps of old saves would mislead JAX."""

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


def manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """A manager that keeps the last `keep` checkpoints, and the best one by the scores in `folder/../metrics.jsonl`."""
  best = _Best(folder.parent / "metrics.jsonl")
  policy = checkpoint_managers.AnyPreservationPolicy([checkpoint_managers.LatestN(keep), best])
  options = ocp.CheckpointManagerOptions(
    preservation_policy=policy,
    cleanup_tmp_directories=True,
    async_options=ocp.options.AsyncOptions(barrier_sync_fn=_barrier),
  )
  return _Manager(folder.absolute(), options=options)


def _barrier(*, key, timeout_ms):
  """Orbax's barrier, but skipped in the `finally` of a save that failed here: the others wait for it elsewhere."""
  if error := sys.exc_info()[1]:
    raise error
  ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def save(saver: ocp.CheckpointManager, step: int, state: dict[str, Any]) -> None:
  """Starts saving; the arrays are copied before this returns, so that the next step may overwrite them."""
  parts = _with_arrays(state)
  marked = {**parts, "fingerprint": {name: fingerprint(part) for name, part in parts.items()}}
  saver.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(marked)), force=True)


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the checkpoint directories with the name of a finished one, the newest first."""
  names = [d.name for d in folder.iterdir() if d.is_dir()] if folder.is_dir() else []
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def restore_newest(
  folder: pathlib.Path, abstract: dict[str, Any], say: Callable[[str], None]
) -> tuple[int, dict[str, Any]] | None:
  """Restores the newest checkpoint that can be read, the same one on all processes.

  Args:
    folder: the checkpoints' folder.
    abstract: tree of `jax.ShapeDtypeStruct` with the shardings to restore to.
    say: called with a message for each checkpoint that is skipped. Skipped ones are moved to `folder/../damaged`.

  Returns:
    (step, state), or None if there is no checkpoint.

  Raises:
    UserError: there are checkpoints, and none can be read.
  """
  errors: dict[int, str] = {}
  for step in json.loads(cluster.exchange(json.dumps(steps(folder)))[0]):
    state, why = _on_all(_read, folder, step, abstract)
    if not why:  # Verification computes on all processes: all of them must have read.
      state, why = _on_all(_verified, state)
    if why:
      errors[step] = why
      continue
    for bad, why in errors.items():
      target = folder.parent / "damaged" / str(bad)
      if cluster.is_main():
        target.parent.mkdir(exist_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        shutil.move(folder / str(bad), target)
      say(f"skipped the checkpoint of step {bad}, which cannot be read ({why}); it is now in {target}")
    cluster.exchange("moved")
    return step, abstract | state
  if errors:
    newest, why = next(iter(errors.items()))
    raise UserError(
      f"none of the {len(errors)} checkpoints in {folder} can be read (step {newest}: {why}). "
      "Take another --workdir, or move them away to start afresh."
    )
  return None


def _on_all(function, *args):
  """(what the function returns, ""), or (anything, the reason) where it fails on one of the processes."""
  result, why = None, ""
  try:
    with _quiet():
      result = function(*args)
  except Exception as error:  # Orbax and TensorStore raise many types for a damaged file.
    why = first_line(error)
  return result, next(filter(None, cluster.exchange(why)), "")


def restore(folder: pathlib.Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
  """Restores the parts of the checkpoint of `step` that `abstract` names, to the shardings that it has.

  Raises:
    Exception: of many types, by Orbax and TensorStore, for files that are damaged or missing.
    ValueError: an array has another shape or type, or its bits differ from those that were saved.
  """
  return abstract | _verified(_read(folder, step, abstract))


def _read(folder, step, abstract):
  """The parts with their fingerprints; each process reads what its devices hold, without waiting for the others."""
  parts = _with_arrays(abstract)
  marks = dict.fromkeys(parts, ocp.RestoreArgs(restore_type=np.ndarray))
  to = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), parts)
  alone = ocp.options.MultiprocessingOptions(
    primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="read"
  )
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=alone) as reader:
    state = reader.restore(
      (folder / str(step) / "state").absolute(),
      args=ocp.args.PyTreeRestore(
        item={**parts, "fingerprint": dict.fromkeys(parts, np.uint32(0))},
        restore_args={**to, "fingerprint": marks},
        partial_restore=True,
      ),
    )
  for (path, want), got in zip(
    jax.tree_util.tree_leaves_with_path(parts), jax.tree.leaves({name: state[name] for name in parts}), strict=True
  ):
    if not isinstance(got, jax.Array) or (got.shape, got.dtype) != (want.shape, want.dtype):
      raise ValueError(f"{jax.tree_util.keystr(path)} is not in the checkpoint as {want.dtype}{list(want.shape)}")
  return state


def _verified(state):
  """Checks the parts against their fingerprints, on all processes, and returns them without these."""
  marks = state.pop("fingerprint")
  changed = [name for name, part in state.items() if fingerprint(part) != marks[name]]
  if changed:
    raise ValueError(f"the bits of {', '.join(changed)} are not those that were saved")
  return state


def _with_arrays(state):
  """The parts that hold arrays: Orbax does not restore an empty one, such as MAE's state."""
  return {name: part for name, part in state.items() if jax.tree.leaves(part)}


def first_line(error: Exception) -> str:
  """The first line of an error of Orbax's, without its pages of detail."""
  return (str(error).strip() or type(error).__name__).splitlines()[0].partition(". See full")[0][:200]


@contextlib.contextmanager
def _quiet():
  """Suppresses the hundreds of tracebacks of Orbax's other reads, where one has failed and is reported."""
  logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
  logger.disabled, sys.unraisablehook = True, lambda _: None
  try:
    yield
  finally:
    gc.collect()  # Abandoned reads log their errors when they are collected.
    logger.disabled, sys.unraisablehook = False, hook


@jax.jit
def fingerprint(tree: Any) -> jax.Array:
  """A uint32 of all bits of a tree, computed where its arrays are: TensorStore does not detect a flipped bit."""
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    leaf = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    words = lax.bitcast_convert_type(leaf, jnp.dtype(f"uint{8 * leaf.dtype.itemsize}")).astype(jnp.uint32)
    place = jnp.uint32(0)  # row-major index; each device computes its own part
    for axis, size in enumerate(leaf.shape):
      place = place * jnp.uint32(size) + lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
    # Odd weights by position: one changed word always changes the sum, and several almost always do.
    total = 31 * total + jnp.sum(words * (2 * place + 1), dtype=jnp.uint32)
  return total


def digest(tree: Any) -> str:
  """SHA-256 of the names, types, shapes and values of a tree's arrays, each of which this process has whole."""
  found = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(leaf)
    found.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    found.update(array.view(np.uint8).data)
  return found.hexdigest()
