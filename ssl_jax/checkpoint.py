"""Checkpoints by Orbax: asynchronous, the last few and the best; restored on any number of devices."""

import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from ssl_jax.errors import UserError


def manager(folder: pathlib.Path, keep: int) -> ocp.CheckpointManager:
  """A manager that keeps the last `keep` checkpoints and the one with the best k-NN."""
  policy = checkpoint_managers.AnyPreservationPolicy(
    [
      checkpoint_managers.LatestN(keep),
      checkpoint_managers.BestN(
        n=1, get_metric_fn=lambda metrics: metrics["knn_top1"], keep_checkpoints_without_metrics=False
      ),
    ]
  )
  options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=True)
  return ocp.CheckpointManager(folder.absolute(), options=options)


def save(saver: ocp.CheckpointManager, step: int, state: dict[str, Any], knn_top1: float | None) -> None:
  """Starts saving; the arrays are copied before this returns, so that the next step may overwrite them."""
  items = ocp.args.Composite(state=ocp.args.StandardSave(state))
  saver.save(step, args=items, metrics=None if knn_top1 is None else {"knn_top1": knn_top1}, force=True)


def steps(folder: pathlib.Path) -> list[int]:
  """Steps of the checkpoint directories that bear a finished one's name, the newest first."""
  names = [d.name for d in folder.iterdir() if d.is_dir()] if folder.is_dir() else []
  return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def restore_newest(
  folder: pathlib.Path, abstract: dict[str, Any], say: Callable[[str], None]
) -> tuple[int, dict[str, Any]] | None:
  """Restores the newest checkpoint that can be read.

  Args:
    folder: the checkpoints' folder.
    abstract: tree of `jax.ShapeDtypeStruct` with the shardings to restore to.
    say: told about each checkpoint that is skipped. Skipped ones are moved to `folder/../damaged`.

  Returns:
    (step, state), or None if there is no checkpoint.

  Raises:
    UserError: there are checkpoints, and none can be read.
  """
  errors: dict[int, str] = {}
  for step in steps(folder):
    try:
      state = restore(folder, step, abstract)
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
      errors[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
      continue
    for bad, why in errors.items():
      target = folder.parent / "damaged" / str(bad)
      target.parent.mkdir(exist_ok=True)
      shutil.rmtree(target, ignore_errors=True)
      shutil.move(folder / str(bad), target)
      say(f"skipped the checkpoint of step {bad}, which cannot be read ({why}); it is now in {target}")
    return step, state
  if errors:
    newest, why = next(iter(errors.items()))
    raise UserError(
      f"none of the {len(errors)} checkpoints in {folder} can be read (step {newest}: {why}). "
      "Take another --workdir, or move them away to start afresh."
    )
  return None


def restore(folder: pathlib.Path, step: int, abstract: dict[str, Any]) -> dict[str, Any]:
  """Restores the parts of the checkpoint of `step` that `abstract` names, to the shardings that it has."""
  restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, global_shape=x.shape), abstract)
  with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
    state = reader.restore(
      (folder / str(step) / "state").absolute(),
      args=ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True),
    )
  for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(abstract), strict=True):
    if (got.shape, got.dtype) != (want.shape, want.dtype):
      raise ValueError(f"{jax.tree_util.keystr(path)} is {got.dtype}{got.shape}, not {want.dtype}{want.shape}")
  return state
