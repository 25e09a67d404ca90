"""The one door: from a config to everything that is built from it (`restore.py`: from a run's workdir).

Only this file and `config.py` see a whole config. The other modules are handed their own sections or plain values.
"""

import dataclasses
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ssl_jax import advise, data, decide, flops, methods, microbatch, models, optim, parallel, training
from ssl_jax import config as configs
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import Dataset, look
from ssl_jax.data.dataset import SAMPLE, usable_cores
from ssl_jax.data.folder import files_of
from ssl_jax.decide import Decision
from ssl_jax.errors import NoSplit, UserError
from ssl_jax.evaluation import features, probe
from ssl_jax.methods.base import AXIS, Context, Method
from ssl_jax.run import cluster
from ssl_jax.run.workdir import Saved
from ssl_jax.training import TrainState
from ssl_jax.weights import initial

_GLANCE = 64  # images of a folder that are looked at to warn of a recipe that does not suit them


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
    config: the recipe with all that was decided, for what is written and told, and for when the loop logs, evaluates
      and saves.
    decided: what the recipe had left open.
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
    classifier: computes the logits of an objective that takes labels; None: the method takes none.
    painter: draws the method's pictures; None: it has none.
  """

  config: Any
  decided: list[Decision]
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
  classifier: features.Extractor | None
  painter: Callable | None

  @property
  def inputs(self) -> tuple[str, ...]:
    """What the step takes of a batch."""
    return ("image", "label") if self.method.takes_labels else ("image",)

  def batches(self, start: int) -> Iterator[dict[str, Any]]:
    """This process's part of the batches from step `start` to the run's last (`Dataset.batches`)."""
    settings: dict[str, Any] = dict(batch_size=self.config.batch_size, seed=self.config.seed)
    settings |= dict(start=start, stop=self.last_step, labelled=self.method.takes_labels)
    return self.train_set.batches(self.views, **settings, part=data.Part(jax.process_index(), jax.process_count()))

  def facts(self) -> dict[str, str]:
    """The data sets in a line each, which all processes of a run must have alike."""
    sets = {"data.split": self.train_set, "data.test_split": self.test_set}
    return {name: "none" if x is None else x.summary() for name, x in sets.items()}

  def source(self) -> dict[str, Any] | None:
    """Which weights `init_from` gives a run of labels now, as of `initial.source`, alike on all processes.

    None: there are none, or a process does not see them. All processes come here.
    """
    if not self.method.takes_labels or not self.config.get("init_from"):
      return None
    path = _init_from(self)
    if not all(cluster.exchange("there" if path.exists() else "")):
      return None
    found = cluster.together(lambda: initial.source(path, self.encoder))
    cluster.check_alike({"init_from": json.dumps(found)})
    return found

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
      "decided": configs.as_json([list(decision) for decision in self.decided]),
    }


def run(config: Any, saved: Saved | None = None, tell: Callable[[str], None] = lambda line: None) -> Run:
  """Builds everything. Whatever is wrong with a recipe shows here, before anything is compiled.

  Args:
    config: the recipe.
    saved: what a run of it was saved with, which decides what it leaves open; None: data and device do.
    tell: is given what the user should know before anything is compiled, line by line.

  Raises:
    UserError: a mistake in the recipe or the data. Any other exception is a bug.
  """
  mesh = parallel.make_mesh()
  device = device_facts(mesh)
  searches_microbatch = saved is None and "microbatch" in decide.open_keys(config)
  was_open = decide.is_open(config)
  config, decided = settled(config, device, saved, tell)
  views, eval_view = configs.views(config), configs.eval_view(config)
  train_set = dataset(config, config.data.split).tried()
  if "classes" in config.method:
    config, train_set = with_labels(config, train_set)
  if config.data.folder and not was_open:
    facts = look.look_at_files(files_of(config.data.folder, config.data.split), _GLANCE)
    for line in (*advise.on_recipe(config), *advise.on_data(config, facts), *advise.on_images(config, facts)):
      tell(line)
  configs.check(config, images=len(train_set), devices=mesh.size)
  bank, test_set = knn_sets(config, train_set)

  steps, steps_per_epoch = configs.schedule_length(config, len(train_set))
  made = program(config, mesh, steps, steps_per_epoch)
  shapes = train_set.batch_shapes(views, config.batch_size)
  if made.method.takes_labels:
    shapes["label"] = jax.ShapeDtypeStruct((config.batch_size,), np.int32)
  batch = parallel.abstract(shapes, parallel.split(mesh))
  traced = made.train_step.trace(made.state, batch)
  count, device_peak = flops.count(traced.jaxpr), flops.peak(mesh.devices.flat[0].device_kind, config.dtype)
  peak = device_peak and device_peak * mesh.size
  for line in advise.on_device(config, count, device, usable_cores(), peak):
    tell(line)
  if searches_microbatch:
    config, made, found = _with_microbatch(config, mesh, batch, steps, steps_per_epoch)
    decided = [*decided, found]
    tell(f"microbatch: {found.reason}")

  method, state = made.method, made.state
  extractor = features.Extractor(made.encoder, eval_view, mesh, config.batch_size)
  extractor.trace(method.encoder(state.params, state.state), train_set.channels)
  classifier = None
  if method.classifier:
    classifier = features.Extractor(method.classifier.network, eval_view, mesh, config.batch_size)
  return Run(
    config=config,
    decided=decided,
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
    flops=count,
    peak=peak,
    chance=method.chance(config.batch_size) if method.chance else None,
    extractor=extractor,
    classifier=classifier,
    painter=features.make_painter(method, eval_view, mesh) if method.pictures else None,
  )


def device_facts(mesh: Mesh) -> decide.DeviceFacts:
  """What the devices of a run are, for what a recipe leaves open."""
  return decide.DeviceFacts(mesh.devices.flat[0].platform, mesh.size)


def settled(
  config: Any, device: decide.DeviceFacts, saved: Saved | None, tell: Callable[[str], None]
) -> tuple[Any, list[Decision]]:
  """(a config that leaves nothing open, what was decided), after a look at the images."""
  decided: list[Decision] = []
  was_open = decide.is_open(config)
  config, told = decide.plain(config) if was_open else config, []
  configs.check_values(config)
  if config.data.folder:  # whose images may be large
    tell(f"looking at {SAMPLE} images of {config.data.folder} at most")
  if not was_open:
    return config, decided
  if saved is not None:
    config, decided = decide.completed(config, saved.config), saved.decided
  else:
    facts = facts_of(config)
    config, decided = decide.decide(facts, device, config)
    told = advise.on_images(config, facts)
  for line in (*decide.table(decided), *told):
    tell(line)
  configs.check_values(config)
  return config, decided


def facts_of(config: Any) -> look.DataFacts:
  """What the images that a recipe names are like, whatever it says of them."""
  if config.data.folder:
    return look.look_at_files(files_of(config.data.folder, config.data.split))
  named = decide.plain(config)
  named.data.channels = 3
  return look.look_at(dataset(named, config.data.split))


def _with_microbatch(config, mesh, batch, steps, steps_per_epoch):
  """(the config with the microbatch that fits, its program, whose step is compiled already, the decision)."""

  def compile_with(size):
    tried = decide.plain(config)
    tried.microbatch = size
    made = program(tried, mesh, steps, steps_per_epoch)
    return (tried, made), made.train_step.trace(made.state, batch).lower().compile()

  group = config.method.get("bn_group_size") or config.encoder.get("bn_group_size") or 1
  memory = microbatch.memory_of(mesh)
  ((fitting, made), compiled), decision = microbatch.search(compile_with, config.batch_size, group * mesh.size, memory)
  return fitting, dataclasses.replace(made, train_step=compiled), decision


def first_state(run: Run) -> tuple[TrainState, list[str]]:
  """(the state before the first step, what was put into it in lines for people): see `init_from` of the config."""
  if not run.config.get("init_from"):
    return run.init(), []
  settings = run.config.method, run.config.data.channels, bool(run.config.get("init_optimizer"))
  return initial.start_from(_init_from(run), run.init(), run.encoder, *settings)


def _init_from(run):
  return pathlib.Path(os.path.expanduser(run.config.init_from))


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


def overlap(config: Any, one: str, other: str) -> bool:
  """Whether two splits of the data that a config names share images. Raises NoSplit where one is not there."""
  if config.data.folder:
    return data.folder.overlap(config.data.folder, one, other)
  return data.prepared.overlap(config.data.name, one, other, data_dir=config.data.data_dir)


def with_labels(config: Any, train_set: Dataset) -> tuple[Any, Dataset]:
  """(the recipe with the number of the data's classes, the images whose labels it uses), for a supervised objective.

  Raises:
    UserError: images without labels, another number of classes than the recipe's, or `method.labels` that are not to
      be had.
  """
  where = f"data.split={config.data.split!r} of {train_set.name}"
  if not train_set.is_labelled:
    raise UserError(f"{where} has no labels, and method.name={config.method.name!r} trains by them.")
  labels, classes = train_set.labels, train_set.num_classes
  if labels is not None and (missing := int(np.sum(labels < 0))):
    raise UserError(f"{missing:,} of the {len(labels):,} images of {where} have no label: each one needs a label.")
  if classes < 2:
    raise UserError(f"all images of {where} are of one class: there is nothing to tell apart.")
  if config.method.classes not in (None, classes):
    raise UserError(f"method.classes={config.method.classes}, and {where} has {classes} classes.")
  config = config.copy_and_resolve_references()
  config.method.classes = classes
  if config.method.get("labels"):
    wanted = probe.parse_labels(config.method.labels, "method.labels")
    if labels is None:
      raise UserError(f"method.labels={config.method.labels!r} draws by class, and of {where} only the images know it.")
    few = np.bincount(labels, minlength=classes).min()
    if wanted.share is None and wanted.each > few:
      raise UserError(f"method.labels={config.method.labels!r} is more than the {few} images of a class of {where}.")
    rng = np.random.default_rng((config.seed, 0))  # the first draw of eval_linear.py with this --seed
    train_set = train_set.take(probe.draw_labelled(labels, wanted, rng))
  return config, train_set


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
    seed=config.seed,
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
