"""Trains an encoder without labels, on all devices of all hosts; the loop is this file, top to bottom.

  python train.py                                             SimCLR on the built-in images
  python train.py --config=configs/simclr_cifar10.py --workdir=runs/cifar --config.data.data_dir=D
  python train.py --config.seed=1 --config.steps=500          any key of a config can be set so

Started again with the same workdir, it goes on from the last checkpoint, exactly. On a pod or a cluster the same
command is started on every host; they find each other (docs/pods.md).
"""

import contextlib
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
import optax
from absl import flags
from ml_collections import config_flags

from ssl_jax import (
  build,
  checkpoint,
  cluster,
  data,
  evaluate,
  flops,
  metrics,
  optim,
  parallel,
  report,
  training,
)
from ssl_jax import config as configs
from ssl_jax.cli import run, say
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Method
from ssl_jax.training import TrainState

PICTURES = 8  # images that pictures are drawn of


class Plan(NamedTuple):
  """A recipe with everything built from it that a run needs."""

  mesh: jax.sharding.Mesh
  train_set: data.Dataset
  bank: data.Dataset | None  # None: no labels, no online k-NN
  test_set: data.Dataset | None
  steps: int  # of the schedule
  steps_per_epoch: int
  last_step: int  # of this run
  learning_rate: optax.Schedule
  chance: float | None  # the loss of uninformative outputs, where there is such a value
  flops: int  # of a step, on all devices
  peak: float | None  # FLOP/s of all devices; None: not known
  method: Method
  init: Callable
  state: TrainState  # shapes, types and shardings
  train_step: Callable
  extractor: evaluate.Extractor
  painter: Callable | None  # None: the method has no pictures


def make_plan(config) -> Plan:
  """Builds everything. Whatever is wrong with a recipe shows here, before anything is compiled."""
  mesh = parallel.make_mesh()
  train_set = load(config, config.data.split)
  configs.check(config, images=len(train_set.images), devices=mesh.size)
  if train_set.is_streamed:
    data.stream.check_sample(train_set.images)
  test_set = load_test_set(config) if train_set.is_labelled else None
  bank = None
  if test_set and not test_set.is_labelled:
    test_set = None
  if test_set:
    bank, test_set = evaluate.match(evaluate.thinned(train_set, config.knn.bank_images), test_set)
    if test_set.is_streamed:
      data.stream.check_sample(test_set.images)
  steps, steps_per_epoch = configs.schedule_length(config, len(train_set.images))
  learning_rate = optim.schedule_from_config(config, steps, steps_per_epoch)
  optimizer = optim.from_config(config, learning_rate, steps, steps_per_epoch)
  views = configs.views(config)
  channels = config.data.channels
  image_shape = (views[0].size, views[0].size, channels) if train_set.is_streamed else train_set.images.shape[1:]
  try:
    method, encoder = build.method(config, steps, steps_per_epoch)
    init = training.make_init(method, optimizer, views, image_shape, config.seed)
    step = training.make_step(method, optimizer, views, config.seed, config.microbatch)
    state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
    optim.check_rules(config, state.params)
    if config.parallel.shard_state:
      state = parallel.sharded(state, mesh)
    train_step = training.compile_step(step, state, mesh)
    init = jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, state))
    whole_images = None if train_set.is_streamed else image_shape
    shapes = training.batch_shapes(views, config.batch_size, channels, whole_images)
    batch = parallel.abstract(shapes, parallel.split(mesh))
    program = train_step.trace(state, batch)
    if config.microbatch and not method.separable:  # It encodes twice, and what is done twice is no FLOPs of the model.
      whole = config.copy_and_resolve_references()
      whole.microbatch = None
      at_once = training.make_step(build.method(whole, steps, steps_per_epoch)[0], optimizer, views, config.seed)
      program = training.compile_step(at_once, state, mesh).trace(state, batch)
    extractor = evaluate.Extractor(encoder, config, mesh, config.batch_size)
    shown = test_set or train_set
    for dataset in (bank or shown, shown):
      extractor.trace(method.encoder(state.params, state.state), dataset)
    view = configs.eval_view(config)
    painter_view = view._replace(resize=None, size=None) if shown.is_streamed else view  # else the device resizes
    painter = evaluate.make_painter(method, painter_view, mesh) if method.pictures else None
  except (TypeError, ValueError) as error:
    raise UserError(f"this recipe cannot be built: {error}") from error
  last_step = min(steps, config.stop_after_steps or steps)
  chance = method.chance(config.batch_size) if method.chance else None
  device_peak = flops.peak(mesh.devices.flat[0].device_kind, config.dtype)
  costs = flops.count(program.jaxpr), device_peak and device_peak * mesh.size
  built = method, init, state, train_step, extractor, painter
  return Plan(mesh, train_set, bank, test_set, steps, steps_per_epoch, last_step, learning_rate, chance, *costs, *built)


def main(config, workdir: pathlib.Path) -> int:
  """Trains. Returns the exit status: 0, or 143 where SIGTERM ended the run."""
  stopping = cluster.listen_for_sigterm()
  plan = cluster.together(lambda: make_plan(config))
  sets = {"data.split": plan.train_set, "data.test_split": plan.test_set}
  cluster.check_alike(configs.facts(config) | {name: data.summary(images) for name, images in sets.items()})
  cluster.check_shared(workdir)
  cluster.together(lambda: check_resumable(config, plan, workdir))
  folder = workdir / "checkpoints"
  restored = checkpoint.restore_newest(folder, plan.state._asdict(), say)
  start = restored[0] if restored else 0
  if start >= plan.last_step:
    say(f"complete: {workdir} holds the checkpoint of step {start}, of {plan.last_step}; nothing to do")
    return 0
  if cluster.is_main():
    workdir.mkdir(parents=True, exist_ok=True)
    write_whole(workdir / "config.json", json.dumps(configs.to_json(config), indent=2) + "\n")
    write_whole(workdir / "files.txt", plan.train_set.fingerprint)
  for line in report.describe(config, plan):
    say(line)
  say(f"resuming at step {start}" if restored else f"starting in {workdir}")

  started = time.perf_counter()
  train = TrainState(**restored[1]) if restored else plan.init()
  waiting: list[tuple[int, dict]] = []  # (step, metrics) still on the device
  with (
    contextlib.closing(make_writer(workdir, start if restored else -1)) as writer,
    contextlib.closing(checkpoint.manager(folder, config.keep_checkpoints)) as saver,  # waits for its saves
    cluster.ending_together(),
  ):
    if start == 0:
      evaluation(config, plan, writer, train, 0)
      draw_pictures(config, plan, writer, train, 0, workdir)
    clock = metrics.Clock(start, config.batch_size)
    batches = read_batches(config, plan, start, workdir)
    for step in range(start + 1, plan.last_step + 1):
      with clock.waiting():
        batch = next(batches)
      # Both calls return at once: this batch is copied while the device computes the step before.
      train, row = plan.train_step(train, parallel.put_batch(plan.mesh, batch))
      if len(waiting) > 1:  # Not further ahead than that: batches would pile up in the device's memory.
        jax.block_until_ready(waiting[-2][1])
      if waiting and waiting[-1][0] % config.log_every_steps == 0:
        write_rows(config, plan, writer, clock, waiting, train)  # One step late: the device is busy with the next one.
      waiting.append((step, row))
      if step == start + 1:
        jax.block_until_ready(train)
        say(f"first step done after {time.perf_counter() - started:.1f} s")
        clock.images_per_second(step)  # with its compilation: not to be counted in the next rows

      ends = step == plan.last_step or stopping()
      evaluates = step % (config.eval_every_epochs * plan.steps_per_epoch) == 0 or step == plan.last_step
      if ends or evaluates or step % config.checkpoint_every_steps == 0:
        # First, so that no row is lost and nothing bad is saved.
        write_rows(config, plan, writer, clock, waiting, train)
        if evaluates:
          evaluation(config, plan, writer, train, step)
          draw_pictures(config, plan, writer, train, step, workdir)
        if step == plan.last_step and cluster.is_main():
          metrics.draw_curves(workdir, plan.chance, f"{config.method.name}, {plan.train_set.name}")
        checkpoint.save(saver, step, train._asdict())
        clock.restart(step)
      if ends:
        break
    saver.wait_until_finished()  # here, where a failure ends all processes
  if step < plan.last_step:
    say(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
    return 143
  if not cluster.is_main():
    return 0
  for line in report.summary(config, metrics.read_rows(workdir / "metrics.jsonl")):
    say(line)
  for name in ("checkpoints", "metrics.jsonl", "tensorboard", "config.json", "curves.png", "pictures", "skipped.txt"):
    if (workdir / name).exists():
      say(f"wrote {workdir / name}")
  return 0


def evaluation(config, plan: Plan, writer: metrics.Writer | metrics.NoWriter, train: TrainState, step: int) -> None:
  """Writes an evaluation row, where there are labels."""
  if plan.bank is None or plan.test_set is None:
    return
  bank, queries = plan.bank, plan.test_set
  variables = plan.method.encoder(train.params, train.state)
  found = [*plan.extractor(variables, bank), *plan.extractor(variables, queries)]
  settings = dict(k=min(config.knn.k, len(found[0])), temperature=config.knn.temperature)
  scores = evaluate.knn_accuracy(*found, mesh=plan.mesh, **settings)
  row = {"step": step, "epoch": step / plan.steps_per_epoch} | {f"knn_{name}": x for name, x in scores.items()}
  if step == 0 and cluster.is_main() and not bank.is_streamed and bank.images.shape[1:] == queries.images.shape[1:]:
    row |= evaluate.pixel_baselines(bank, queries, **settings)
  writer.write(row)
  say(f"step {step}/{plan.steps}  k-NN top-1 {scores['top1']:.2f} %")


def draw_pictures(
  config, plan: Plan, writer: metrics.Writer | metrics.NoWriter, train: TrainState, step: int, workdir
) -> None:
  """Writes pictures/<step>.png where the method has something to show."""
  if plan.painter is None:
    return
  images, _ = plan.extractor.pixels(evaluate.thinned(plan.test_set or plan.train_set, PICTURES))
  drawn = jax.device_get(plan.painter(train.params, train.state, images))
  if not cluster.is_main():
    return
  path = workdir / "pictures" / f"{step:08d}.png"
  writer.show("pictures", metrics.draw_pictures(path, drawn, f"{config.method.name}, step {step}"), step)


def write_rows(
  config,
  plan: Plan,
  writer: metrics.Writer | metrics.NoWriter,
  clock: metrics.Clock,
  waiting: list,
  train: TrainState,
) -> None:
  """Looks at all waiting steps, writes the rows that are due, and empties the list."""
  for step, values in jax.device_get(waiting):
    if not all(np.isfinite(value) for value in values.values()):
      raise UserError(report.nonfinite(step, values, train._asdict()))
    if step % config.log_every_steps and step != plan.last_step:
      continue
    rate = clock.images_per_second(step)
    row = {"step": step, "epoch": step / plan.steps_per_epoch, "learning_rate": float(plan.learning_rate(step - 1))}
    row |= {name: float(value) for name, value in values.items()}
    row |= {"images_per_second": rate, "input_share": clock.share}
    if plan.peak:
      row["mfu"] = plan.flops * rate / config.batch_size / plan.peak  # model FLOP utilisation
    writer.write(row)
    say(report.progress(config, plan, row))
    if warning := metrics.collapse_warning(row):
      say(f"warning: {warning}")
  waiting.clear()


def make_writer(workdir: pathlib.Path, step: int) -> metrics.Writer | metrics.NoWriter:
  """One of the processes writes."""
  return metrics.Writer(workdir, step) if cluster.is_main() else metrics.NoWriter()


def load(config, split: str) -> data.Dataset:
  """A split of the data that the config names."""
  if config.data.folder:
    return data.load_folder(config.data.folder, split, channels=config.data.channels)
  return data.load(config.data.name, split, data_dir=config.data.data_dir, channels=config.data.channels)


def load_test_set(config) -> data.Dataset | None:
  """The labelled images that the online k-NN classifies; None where there are none."""
  folder, split = config.data.folder, config.data.test_split
  if not split or (folder and not (pathlib.Path(folder).expanduser() / split).is_dir()):
    return None
  return load(config, split)


def read_batches(config, plan: Plan, start: int, workdir: pathlib.Path) -> Iterator[dict]:
  """Yields {"image": ...}, this process's part of each step's batch: images, or crops where they are streamed.

  Files that cannot be read are listed in skipped.txt, process 1's in skipped_1.txt; process 0 also tells its own, once.
  """
  images, batch_size = plan.train_set.images, config.batch_size
  here = dict(process_index=jax.process_index(), process_count=jax.process_count())
  if not plan.train_set.is_streamed:
    for step in range(start, plan.last_step):
      yield {"image": images[data.batch_indices(len(images), batch_size, config.seed, step, **here)]}
    return
  skipped = workdir / ("skipped.txt" if cluster.is_main() else f"skipped_{jax.process_index()}.txt")
  told = set(skipped.read_text().splitlines()) if skipped.exists() else set()
  read = dict(threads=configs.threads(config), workers=config.data.workers, reduced=config.data.reduced_decoding)
  read |= dict(start=start, stop=plan.last_step)
  for batch in data.stream.batches(
    images, configs.views(config), batch_size=batch_size, seed=config.seed, **read, **here
  ):
    for i in batch["wanted"][batch["wanted"] != batch["index"]]:
      if images.name(i) not in told:
        told.add(images.name(i))
        if len(told) <= 10:
          say(f"skipped {images.name(i)}, which cannot be read; all such are listed in {skipped}")
        write_whole(skipped, "".join(f"{name}\n" for name in sorted(told)))
    yield {"image": batch["image"]}


def check_resumable(config, plan: Plan, workdir: pathlib.Path) -> None:
  """Raises UserError if the workdir has a run with another config, or other files: steps would see other images."""
  if not checkpoint.steps(workdir / "checkpoints"):
    return
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} has checkpoints but no config.json: take another --workdir.")
  configs.check_same(config, json.loads((workdir / "config.json").read_text()))
  path, now = workdir / "files.txt", plan.train_set.fingerprint
  then = path.read_text() if path.exists() else now
  if then != now:
    raise UserError(
      f"the images are not those that this run began with: {then} then, now {now}. "
      "Put the folder back as it was, or take another --workdir."
    )


def write_whole(path: pathlib.Path, text: str) -> None:
  """Writes a file so that a kill leaves the old one or the new one."""
  scratch = path.with_suffix(".tmp")
  scratch.write_text(text)
  os.replace(scratch, path)


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe; by default configs/quickstart.py")
  WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written; by default runs/<the recipe's name>")

  def start():
    name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
    return main(CONFIG.value, pathlib.Path(WORKDIR.value or f"runs/{name}"))

  run(start, recipe=str(pathlib.Path(__file__).parent / "configs" / "quickstart.py"), joins=True)
