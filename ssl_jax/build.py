"""The one door: from a config, or from a run's workdir, to everything that is built from it.

Only this file and `config.py` see a whole config. The other modules are handed their own sections or plain values.
"""

import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

from ssl_jax import config as configs
from ssl_jax import data, flops, methods, models, optim, parallel, training
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import Dataset
from ssl_jax.data.crop import centre_crop
from ssl_jax.data.image import as_pixels
from ssl_jax.data.memory import InMemory
from ssl_jax.errors import NoSplit, UserError
from ssl_jax.evaluation import features, guard
from ssl_jax.methods.base import AXIS, Context, Method
from ssl_jax.run import checkpoint, log
from ssl_jax.run.workdir import read_json, read_resolved
from ssl_jax.training import TrainState
from ssl_jax.weights import initial

_AT_ONCE = 256  # images that a restored encoder computes the features of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """What a recipe computes with, whatever the data.

  Attributes:
    learning_rate: the schedule.
    optimizer: with the schedule inside.
    method, encoder: the method, and its encoder for evaluation.
    init: () -> TrainState, compiled.
    state: the TrainState's shapes, types and shardings.
    train_step: (TrainState, batch) -> (TrainState, metrics), compiled; the state that goes in is donated.
  """

  learning_rate: optax.Schedule
  optimizer: optax.GradientTransformation
  method: Method
  encoder: nn.Module
  init: Callable[[], TrainState]
  state: TrainState
  train_step: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run(Program):
  """A recipe with everything built from it that a run needs.

  Attributes beside those of `Program`:
    config: the recipe, for what is written and told, and for when the loop logs, evaluates and saves.
    mesh: all devices of all processes.
    train_set: what it trains on.
    bank, test_set: labelled images for the online k-NN; None: there are none.
    views, eval_view: what training draws of an image, and what evaluation sees of it.
    steps, steps_per_epoch: of the schedules.
    last_step: of this run, which may be stopped earlier.
    flops: of a step, on all devices.
    peak: FLOP/s of all devices; None: not known.
    chance: the loss of uninformative outputs; None: there is no such value.
    extractor: computes features.
    painter: draws the method's pictures; None: it has none.
  """

  config: Any
  mesh: Mesh
  train_set: Dataset
  bank: Dataset | None
  test_set: Dataset | None
  views: tuple[View, ...]
  eval_view: EvaluationView
  steps: int
  steps_per_epoch: int
  last_step: int
  flops: int
  peak: float | None
  chance: float | None
  extractor: features.Extractor
  painter: Callable | None

  def batches(self, start: int) -> Iterator[dict[str, Any]]:
    """This process's part of the batches from step `start` to the run's last (`Dataset.batches`)."""
    settings = dict(batch_size=self.config.batch_size, seed=self.config.seed, start=start, stop=self.last_step)
    return self.train_set.batches(self.views, **settings, part=data.Part(jax.process_index(), jax.process_count()))

  def facts(self) -> dict[str, str]:
    """The data sets in a line each, which all processes of a run must have alike."""
    sets = {"data.split": self.train_set, "data.test_split": self.test_set}
    return {name: "none" if x is None else x.summary() for name, x in sets.items()}

  def resolved(self) -> dict[str, Any]:
    """What the data decided and the config alone does not tell, as JSON holds it."""
    return {
      "images": len(self.train_set),
      "files": self.train_set.fingerprint,
      "sample": self.train_set.sample,
      "channels": self.train_set.channels,
      "window": self.train_set.window and list(self.train_set.window),
      "classes": list(self.train_set.classes),
      "steps": self.steps,
      "steps_per_epoch": self.steps_per_epoch,
    }


def run(config: Any) -> Run:
  """Builds everything. Whatever is wrong with a recipe shows here, before anything is compiled.

  Raises:
    UserError: a mistake in the recipe or the data. Any other exception is a bug.
  """
  configs.check_values(config)
  mesh, views, eval_view = parallel.make_mesh(), configs.views(config), configs.eval_view(config)
  train_set = dataset(config, config.data.split).tried()
  configs.check(config, images=len(train_set), devices=mesh.size)
  bank, test_set = knn_sets(config, train_set)

  steps, steps_per_epoch = configs.schedule_length(config, len(train_set))
  made = program(config, mesh, steps, steps_per_epoch)
  shapes = train_set.batch_shapes(views, config.batch_size)
  traced = made.train_step.trace(made.state, parallel.abstract(shapes, parallel.split(mesh)))

  method, state = made.method, made.state
  extractor = features.Extractor(made.encoder, eval_view, mesh, config.batch_size)
  extractor.trace(method.encoder(state.params, state.state), train_set.channels)
  device_peak = flops.peak(mesh.devices.flat[0].device_kind, config.dtype)
  return Run(
    config=config,
    mesh=mesh,
    train_set=train_set,
    bank=bank,
    test_set=test_set,
    views=views,
    eval_view=eval_view,
    steps=steps,
    steps_per_epoch=steps_per_epoch,
    last_step=min(steps, config.stop_after_steps or steps),
    **vars(made),
    flops=flops.count(traced.jaxpr),
    peak=device_peak and device_peak * mesh.size,
    chance=method.chance(config.batch_size) if method.chance else None,
    extractor=extractor,
    painter=features.make_painter(method, eval_view, mesh) if method.pictures else None,
  )


def start(run: Run) -> tuple[TrainState, list[str]]:
  """(the state before the first step, what was put into it in lines for people): see `init_from` of the config."""
  if not run.config.get("init_from"):
    return run.init(), []
  path = pathlib.Path(os.path.expanduser(run.config.init_from))
  settings = run.config.method, run.config.data.channels, bool(run.config.get("init_optimizer"))
  return initial.start_from(path, run.init(), run.encoder, *settings)


def program(config: Any, mesh: Mesh, steps: int, steps_per_epoch: int) -> Program:
  """The method, optimizer and training step of a recipe, for a schedule of this length; no data are needed."""
  views, rules = configs.views(config), configs.parameter_rules(config)
  learning_rate = optim.make_schedule(config.lr, config.batch_size, steps, steps_per_epoch)
  optimizer = optim.make(config.optimizer, rules, learning_rate, steps, steps_per_epoch)
  if config.get("heads_first_steps"):
    optimizer = optim.heads_first(optimizer, config.heads_first_steps)
  method, encoder = method_of(config, steps, steps_per_epoch)
  init = training.make_init(method, optimizer, views, config.data.channels, config.seed)
  step = training.make_step(method, optimizer, views, config.seed, config.microbatch)
  state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
  optim.check_rules(rules, state.params)
  if config.parallel.shard_state:
    state = parallel.sharded(state, mesh)
  init = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, state))
  return Program(
    learning_rate=learning_rate,
    optimizer=optimizer,
    method=method,
    encoder=encoder,
    init=init,
    state=state,
    train_step=training.compile_step(step, state, mesh),
  )


def dataset(config: Any, split: str) -> Dataset:
  """A split of the data that a config names."""
  window = config.data.get("window")  # a list, where the config comes from a file
  settings: dict[str, Any] = dict(channels=config.data.channels, reading=configs.reading(config))
  settings["window"] = window and tuple(window)
  if config.data.folder:
    return data.load_folder(config.data.folder, split, **settings)
  return data.load(config.data.name, split, data_dir=config.data.data_dir, **settings)


def knn_sets(config: Any, train_set: Dataset) -> tuple[Dataset, Dataset] | tuple[None, None]:
  """(bank, queries) of the online k-NN, numbered alike; Nones where one of them has no labels."""
  named = config.copy_and_resolve_references()
  named.data.window = train_set.window  # one for both splits
  try:
    test_set = dataset(named, config.data.test_split) if config.data.test_split and train_set.is_labelled else None
  except NoSplit:
    test_set = None
  if test_set is None or not test_set.is_labelled:
    return None, None
  test_set = test_set.tried().numbered_as(train_set)
  return (train_set.thinned(config.knn.bank_images), test_set) if test_set.is_labelled else (None, None)


def context(config: Any, steps: int, steps_per_epoch: int, axis_name: str | None = AXIS) -> Context:
  """What the method of a recipe gets beside its own section."""
  views, dtype = configs.views(config), jnp.dtype(config.dtype)
  settings = dict(method=config.method.name, image_size=views[0].size, dtype=dtype, axis_name=axis_name)
  return Context(
    encoder=functools.partial(models.make, config.encoder, **settings),
    is_vit=config.encoder.name.startswith("vit"),
    views=views,
    batch_size=config.batch_size,
    channels=config.data.channels,
    steps=steps,
    steps_per_epoch=steps_per_epoch,
    dtype=dtype,
    microbatch=config.microbatch,
    axis_name=axis_name,
  )


def method_of(config: Any, steps: int, steps_per_epoch: int, axis_name: str | None = AXIS) -> tuple[Method, nn.Module]:
  """The method of a recipe, and its encoder for evaluation."""
  module, given = methods.find(config.method.name), context(config, steps, steps_per_epoch, axis_name)
  return module.from_config(config.method, given), module.make_encoder(config.method, given)


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
      batch = InMemory(images=cut, labels=np.full(len(cut), -1), num_classes=0, name="images", split="")
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
  run = restore(workdir, step)
  mesh, eval_view = parallel.make_mesh(), configs.eval_view(run.config)
  extractor = features.Extractor(run.encoder, eval_view, mesh, -(-_AT_ONCE // mesh.size) * mesh.size)
  variables = run.method.encoder(run.params, run.state)

  def untrained():
    begun = run.init()
    return run.method.encoder(begun.params, begun.state)

  return Restored(run.encoder, variables, run.step, run.config, eval_view, extractor, untrained)


def restore_optimizer(workdir: str | os.PathLike, step: int) -> Any:
  """The optimizer's state of a run's checkpoint. `restore` has found the checkpoint, and raises what this may raise."""
  workdir = pathlib.Path(workdir)
  config, resolved = ml_collections.ConfigDict(read_json(workdir / "config.json")), read_resolved(workdir)
  mesh, steps = parallel.make_mesh(), resolved.get("steps", max(step, 1))
  state = program(config, mesh, steps, resolved.get("steps_per_epoch", steps)).state
  # Whole on every device, however it was split.
  parts = {"opt_state": parallel.abstract(state.opt_state, parallel.replicated(mesh))}
  return checkpoint.restore(workdir / "checkpoints", step, parts)["opt_state"]


def restore(workdir: str | os.PathLike, step: int | None = None) -> RestoredRun:
  """Restores all that a run's method has; arguments and errors are those of `restore_encoder`."""
  workdir = pathlib.Path(workdir)
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} is not a run: it has no config.json.")
  config = ml_collections.ConfigDict(read_json(workdir / "config.json"))
  folder = workdir / "checkpoints"
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
  # Schedules end at `steps`, which no evaluation sees: runs that did not write it are as long as they came.
  steps = resolved.get("steps", max(step, 1))
  method, encoder = method_of(config, steps, resolved.get("steps_per_epoch", steps))
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
