"""From a run's workdir to its encoder, or to all that its method holds, on whatever devices this process has."""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import optax

from ssl_jax import build, methods, parallel, training
from ssl_jax import config as configs
from ssl_jax.augment import EvaluationView
from ssl_jax.data.crop import centre_crop
from ssl_jax.data.image import as_pixels
from ssl_jax.data.memory import Cut
from ssl_jax.errors import UserError
from ssl_jax.evaluation import features, guard
from ssl_jax.methods.base import Method
from ssl_jax.run import checkpoint, log
from ssl_jax.run.workdir import read_json, read_resolved
from ssl_jax.training import TrainState

_AT_ONCE = 256  # images that a restored encoder computes the features of


def read_config(workdir: pathlib.Path) -> Any:
  """The config of the run in a workdir. Raises UserError where there is no run."""
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is not a run: it has no config.json.")
  config = ml_collections.ConfigDict(read_json(workdir / "config.json"))
  try:
    configs.check_values(config)
  except UserError as error:
    raise UserError(f"{workdir / 'config.json'} is damaged: {error}") from None
  return config


def encoder_section(config: Any) -> dict[str, Any]:
  """The section `encoder` of a recipe with what its method adds to the architecture, for a recipe of another method."""
  encoder = methods.find(config.method.name).make_encoder(config.method, build.context(config, 1, 1))
  added = {key: getattr(encoder, key) for key in ("positions", "project_first") if hasattr(encoder, key)}
  return {**{key: x for key, x in config.encoder.items() if key != "bn_group_size"}, **added}


class Restored(NamedTuple):
  """An encoder from a run, and `features(images)`, what it gives as the run's evaluation sees images.

  `encoder.apply(variables, images, train=False)` is the encoder alone, of images resized, cropped and normalised.

  Attributes:
    encoder: the module.
    variables: its parameters and batch statistics.
    step: of the checkpoint.
    config: the run's.
    eval_view: what the run's evaluation sees of an image.
    extractor: computes the features of data sets, on all devices.
    untrained: () -> the variables that the run began with.
  """

  encoder: nn.Module
  variables: dict[str, Any]
  step: int
  config: Any
  eval_view: EvaluationView
  extractor: features.Extractor
  untrained: Callable[[], dict[str, Any]]

  def features(self, images: np.ndarray | Sequence[np.ndarray]) -> np.ndarray:
    """Features of images in memory, resized, cropped and normalised as the run's evaluation does, some at a time.

    Args:
      images: uint8, or float in [0, 1], which is rounded to the 256 levels of an image file: [n, H, W, C], or a
        sequence of [H, W, C] of any sizes. C is the run's `data.channels`.

    Returns:
      float32 [n, d], on every process; all of them have to call it, with the same images.

    Raises:
      TypeError: images that are neither uint8 nor floating point.
      ValueError: no images, shapes or channels that do not fit, floats outside of [0, 1], an image too long to resize.
    """
    if not len(images):
      raise ValueError("images must hold one at least, got none.")
    found = []
    for start in range(0, len(images), self.extractor.batch_size):
      some = images[start : start + self.extractor.batch_size]
      cut = np.stack([centre_crop(as_pixels(x, self.config.data.channels), self.eval_view) for x in some])
      batch = Cut(images=cut, labels=np.full(len(cut), -1), num_classes=0, name="images", split="")
      found.append(self.extractor.all(self.variables, batch).features)
    return np.concatenate(found)


class RestoredRun(NamedTuple):
  """A run's method with its parameters and state, heads, teacher and queue among them, but no optimizer.

  Attributes:
    method: the method.
    encoder: its encoder for evaluation.
    params, state: of the checkpoint.
    step: of the checkpoint.
    config: the run's.
    init: () -> TrainState, what the run began with, without an optimizer.
  """

  method: Method
  encoder: nn.Module
  params: Any
  state: Any
  step: int
  config: Any
  init: Callable[[], TrainState]


def restore_encoder(workdir: str | os.PathLike, step: int | None = None) -> Restored:
  """Restores the encoder that a run's method evaluates, onto this process's devices, however many wrote it.

  Args:
    workdir: what train.py wrote to.
    step: which checkpoint; None: the newest, or the best of a run with `guard`.

  Raises:
    UserError: there is no such run or checkpoint, or it cannot be read.
  """
  run = restore_run(workdir, step)
  mesh, eval_view = parallel.make_mesh(), configs.eval_view(run.config)
  extractor = features.Extractor(run.encoder, eval_view, mesh, -(-_AT_ONCE // mesh.size) * mesh.size)
  variables = run.method.encoder(run.params, run.state)

  def untrained():
    begun = run.init()
    return run.method.encoder(begun.params, begun.state)

  return Restored(run.encoder, variables, run.step, run.config, eval_view, extractor, untrained)


def with_mask_token(run: RestoredRun) -> tuple[nn.Module, Any]:
  """The encoder that a run evaluates and its variables, with DINOv2's mask token, which evaluation has no use for."""
  variables = run.method.encoder(run.params, run.state)
  if "mask_token" not in run.params.get("encoder", {}):
    return run.encoder, variables
  mask_token = run.state.teacher_params["encoder"]["mask_token"]
  return run.encoder.clone(mask_token=True), {"params": {**variables["params"], "mask_token": mask_token}}


def restore_optimizer(workdir: str | os.PathLike, step: int) -> Any:
  """The optimizer's state of a checkpoint that `restore_run` has found, which raises what this may raise."""
  workdir = pathlib.Path(workdir)
  config, resolved = ml_collections.ConfigDict(read_json(workdir / "config.json")), read_resolved(workdir)
  mesh, steps = parallel.make_mesh(), resolved.get("steps", max(step, 1))
  state = build.program(config, mesh, steps, resolved.get("steps_per_epoch", steps)).state
  # Whole on every device, however it was split.
  parts = {"opt_state": parallel.abstract(state.opt_state, parallel.replicated(mesh))}
  return checkpoint.restore(workdir / "checkpoints", step, parts)["opt_state"]


def restore_run(workdir: str | os.PathLike, step: int | None = None) -> RestoredRun:
  """Restores all that a run's method has; arguments and errors are those of `restore_encoder`."""
  workdir = pathlib.Path(workdir)
  config, folder = read_config(workdir), workdir / "checkpoints"
  found = checkpoint.steps(folder)
  if step is None and config.get("guard"):
    step = guard.best_step([row for row in log.read_rows(workdir / "metrics.jsonl") if row["step"] in found])
  step = next(iter(found), None) if step is None else step
  if step is None:
    raise UserError(f"{folder} has no checkpoint yet.")
  if step not in found:
    raise UserError(f"{folder} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}.")
  resolved = read_resolved(workdir)
  config.data.window = config.data.get("window") or resolved.get("window")  # as the run measured it
  # Evaluation does not depend on where schedules end: for older runs, which did not write it, the step will do.
  steps = resolved.get("steps", max(step, 1))
  method, encoder = build.method_of(config, steps, resolved.get("steps_per_epoch", steps))
  init = training.make_init(method, optax.identity(), configs.views(config), config.data.channels, config.seed)
  mesh = parallel.make_mesh()
  state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
  try:
    restored = checkpoint.restore(folder, step, {"params": state.params, "state": state.state})
  except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file.
    raise UserError(
      f"the checkpoint of step {step} in {folder} cannot be read ({checkpoint.first_line(error)}): take another by its "
      f"step, of {', '.join(map(str, found))}."
    ) from error
  init = jax.jit(init, out_shardings=parallel.replicated(mesh))
  return RestoredRun(method, encoder, restored["params"], restored["state"], step, config, init)
