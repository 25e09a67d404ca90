"""The state that a run starts with where its recipe names weights: `init_from`."""

import os
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from ssl_jax.errors import UserError
from ssl_jax.models.vit import interpolate_positions
from ssl_jax.run import checkpoint
from ssl_jax.training import TrainState
from ssl_jax.weights import load


def start_from(
  path: str | os.PathLike,
  train: TrainState,
  encoder: nn.Module,
  method: Any,
  channels: int,
  take_optimizer: bool = False,
) -> tuple[TrainState, list[str]]:
  """Puts weights into a state before its first step; step and schedules stay at their beginning.

  A run of the same method gives its parameters and state whole: heads, teacher, queue, centre. Anything else gives an
  encoder (`load_weights`), to every encoder that the method has: the teacher, target or key encoder starts as the
  trained one does. Learned positions are interpolated for the recipe's image size, and the first convolution is made
  for its channels.

  Args:
    path: a workdir, a folder or a file.
    train: the state as initialised, whose shardings are kept.
    encoder: the recipe's.
    method: the recipe's section `method`.
    channels: of the images.
    take_optimizer: of a run of the same method take the optimizer's moments too; otherwise they start at zero.

  Returns:
    (the state, what was done in lines for people).

  Raises:
    UserError: see `load_weights`; or a part of a run of the same method has another shape; or there are no moments to
      take.
  """
  if (pathlib.Path(path) / "checkpoints").is_dir():
    from ssl_jax import restore  # imported late: it imports this module

    run = restore.restore_run(path)
    if _kind(run.config.method) == _kind(method):
      new, lines = _whole(run, train, path, getattr(encoder, "resize", "offset") == "antialiased")
      if take_optimizer:
        opt_state = _moments(restore.restore_optimizer(path, run.step), new.opt_state, path)
        new, lines = new._replace(opt_state=opt_state), [*lines, "the optimizer's moments too; schedules begin anew"]
      return new, lines
  if take_optimizer:
    raise UserError(f"init_optimizer=True is for a run of the same method, and init_from={path} is none.")
  if "mask_token" in train.params.get("encoder", {}):  # DINOv2's, which its evaluation has no use for
    encoder = encoder.clone(mask_token=True)
  loaded = load.load_weights(path, encoder, channels=channels, resize_positions=True)
  given = {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(loaded.variables)}
  taken: dict[str, None] = {}  # in order
  left: dict[str, None] = {}

  def put(keys, leaf):
    names = _names(keys)
    kind = "batch_stats" if "batch_stats" in names[1] else "params"
    at = names.index("encoder") if "encoder" in names else 1
    whole = "encoder" in names or kind == "batch_stats"  # DINO's batch statistics are the encoder's alone
    value = given.get((kind, *names[at + 1 :])) if whole else None
    if value is None:
      short = names if "encoder" in names else names[: 2 if names[0] == "params" else 3]
      left[".".join(short)] = None
      return leaf
    taken[".".join(names[: at + 1])] = None
    return _placed(value, leaf)

  parts = {"params": train.params, "state": train.state}
  new = jax.tree_util.tree_map_with_path(put, parts)
  lines = [*loaded.report, f"weights for {', '.join(taken)}"]
  if left:
    lines.append(f"initialised at random, as without weights: {', '.join(left)}")
  return train._replace(**new), lines


def source(path: str | os.PathLike, encoder: nn.Module) -> dict[str, Any]:
  """What `start_from` takes from a path, to tell later whether it still gives the same. All processes come here.

  Args:
    path: a workdir, a folder or a file.
    encoder: the recipe's.

  Returns:
    {"step": of a run's checkpoint, None of a file, "weights": SHA-256 of the encoder's weights as they lie there}.

  Raises:
    UserError: see `load_weights`.
  """
  path = pathlib.Path(path)
  if not (path / "checkpoints").is_dir():
    return {"step": None, "weights": checkpoint.digest(load.read_state(path, encoder))}
  from ssl_jax import restore  # imported late: it imports this module

  run = restore.restore_encoder(path)
  return {"step": run.step, "weights": checkpoint.digest(run.variables)}


def _whole(run, train, path, antialias):
  there = {"params": run.params, "state": run.state}
  values = {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(there)}
  parts = {"params": train.params, "state": train.state}
  wanted = {_names(keys): leaf for keys, leaf in jax.tree_util.tree_leaves_with_path(parts)}
  lines = [f"parameters and state of step {run.step} of {path}, a run of the same method: {', '.join(_parts(wanted))}"]
  for names, leaf in wanted.items():
    value = values.get(names)
    if value is not None and names[-1] == "pos_embed" and value.shape != leaf.shape and value.shape[2] == leaf.shape[2]:
      grid = round((leaf.shape[1] - 1) ** 0.5)
      values[names] = interpolate_positions(jnp.asarray(np.asarray(value)), grid, grid, antialias=antialias)
      lines.append(f"{'.'.join(names)}: interpolated for {grid}x{grid} patches")
  differ = [
    f"{'.'.join(names)}: there {values[names].shape if names in values else 'none'}, here {leaf.shape}"
    for names, leaf in wanted.items()
    if names not in values or values[names].shape != leaf.shape
  ]
  if differ:
    raise UserError(
      f"init_from={path} is a run of the same method with parts of other shapes ({'; '.join(differ[:5])}). To take its "
      "encoder alone, export it (python -m ssl_jax export --to=safetensors) and give that folder."
    )
  new = jax.tree_util.tree_map_with_path(lambda keys, leaf: _placed(values[_names(keys)], leaf), parts)
  return train._replace(**new), lines


def _moments(there, here, path):
  """An optimizer's state with the moments of another: its averages of gradients, without the schedule's step count."""
  old, new = (jax.tree.leaves(x, is_leaf=_averages) for x in (there, here))
  old, mine = ([x for x in nodes if _averages(x)] for nodes in (old, new))
  shapes = [jax.tree.map(lambda x: x.shape, nodes) for nodes in (old, mine)]
  if shapes[0] != shapes[1]:
    raise UserError(
      f"init_optimizer=True: the optimizer of {path} has other moments, since it is another one or trains other "
      "parameters. Leave init_optimizer out, and its moments start at zero."
    )
  values = iter(old)
  take = lambda node: jax.tree.map(_placed, next(values), node) if _averages(node) else node  # noqa: E731
  return jax.tree.map(take, here, is_leaf=_averages)


def _averages(node):
  return isinstance(node, optax.ScaleByAdamState | optax.TraceState)


def _placed(value, leaf):
  """A value with the type and sharding of a leaf, which may be spread over processes."""
  value = np.asarray(value).astype(leaf.dtype)  # a copy for each leaf, since the step donates its input
  if value.shape != leaf.shape:
    raise UserError(f"init_from has an array of {value.shape} where the recipe has {leaf.shape}.")
  return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index])


def _kind(method):
  return method.name, method.get("version"), method.get("train_encoder")


def _names(keys) -> tuple[str, ...]:
  return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def _parts(names):
  return dict.fromkeys(".".join(path[:2]) for path in names)
