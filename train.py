"""Trains an encoder without labels, on a CPU, a GPU box or a pod; the loop is this file, top to bottom.

  python train.py                                             SimCLR on the built-in images
  python train.py --config=configs/simclr_cifar10.py --workdir=runs/cifar --config.data.data_dir=D
  python train.py --config.seed=1 --config.steps=500          any key of a config can be set so

Started again with the same workdir, it goes on from the last checkpoint, exactly.
"""

import json
import os
import pathlib
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from jax import lax
from ml_collections import config_flags

from ssl_jax import augment, checkpoint, data, evaluate, methods, metrics, optim, parallel
from ssl_jax import config as configs
from ssl_jax.cli import listen_for_sigterm, run, say
from ssl_jax.errors import UserError
from ssl_jax.methods.base import AXIS, Method


class TrainState(NamedTuple):
  """Everything that the next step depends on, and so everything in a checkpoint."""

  step: jax.Array  # int32, how many steps are done
  params: Any
  state: Any  # the method's
  opt_state: Any


def make_init(method: Method, optimizer: optax.GradientTransformation, views, image_shape, seed: int):
  """Returns `() -> TrainState`; the views of one black image tell the shapes."""

  def init():
    keys = augment.example_keys(seed, jnp.int32(0), jnp.arange(1))
    example = augment.make_views(keys, jnp.zeros((1, *image_shape), jnp.uint8), views)
    params, state = method.init(jax.random.key(seed, impl="threefry2x32"), example)
    return TrainState(jnp.int32(0), params, state, optimizer.init(params))

  return init


def make_step(method: Method, optimizer: optax.GradientTransformation, views, seed: int):
  """Returns one device's training step: (TrainState, {"image": uint8 [b, H, W, C]}) -> (TrainState, metrics)."""

  def train_step(train, batch):
    step, params, state, opt_state = train
    images = batch["image"]
    positions = lax.axis_index(AXIS) * len(images) + jnp.arange(len(images))
    keys = augment.example_keys(seed, step, positions)
    drawn = augment.make_views(keys, images, views)  # one [v, b, h, w, c] array a resolution

    (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, drawn, keys, step)
    grads = lax.pmean(grads, AXIS)
    aux = parallel.combine(aux, AXIS)

    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    state = method.update(params, state, aux, step)

    row = aux.metrics | metrics.monitors(aux.examples["embedding"]) | {"grad_norm": optax.global_norm(grads)}
    # A step that is not finite changes nothing: the loop stops on it, and finds the state as it was.
    finite = jnp.isfinite(row["loss"]) & jnp.isfinite(row["grad_norm"])
    new = TrainState(step + 1, params, state, opt_state)
    return jax.tree.map(lambda x, old: jnp.where(finite, x, old), new, train), row

  return train_step


def main(config, workdir: pathlib.Path) -> int:
  """Trains. Returns the exit status: 0, or 143 where SIGTERM ended the run."""
  stopping = listen_for_sigterm()

  # Whatever can be wrong with the settings shows here, before anything is compiled.
  mesh = parallel.make_mesh()
  train_set = load(config, config.data.split)
  configs.check(config, images=len(train_set.images), devices=mesh.size)
  steps, steps_per_epoch = configs.schedule_length(config, len(train_set.images))
  last_step = min(steps, config.stop_after_steps or steps)
  peak = optim.scaled_learning_rate(config.lr.base, config.batch_size, config.lr.scaling)
  learning_rate = optim.warmup_cosine(peak, round(config.lr.warmup_epochs * steps_per_epoch), steps, config.lr.end)
  optimizer = optim.from_config(config, learning_rate)
  views = configs.views(config)
  module = methods.find(config.method.name)
  everywhere = parallel.replicated(mesh)
  try:
    method, encoder = module.from_config(config, steps), module.make_encoder(config)
    init = make_init(method, optimizer, views, train_set.images.shape[1:], config.seed)
    shapes = jax.eval_shape(init)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    train_step = parallel.compile_step(make_step(method, optimizer, views, config.seed), mesh)
    first = parallel.abstract_batch(mesh, {"image": train_set.images[: config.batch_size]})
    train_step.trace(abstract, first)
    extractor = evaluate.make_extractor(encoder, configs.eval_view(config), mesh)
    extractor.trace(jax.eval_shape(method.encoder, shapes.params, shapes.state), first["image"])
  except (TypeError, ValueError) as error:
    raise UserError(f"this recipe cannot be built: {error}") from error
  test_set = load(config, config.data.test_split) if train_set.num_classes and config.data.test_split else None

  # Resume where there is something to resume.
  folder = workdir / "checkpoints"
  if checkpoint.steps(folder):
    configs.check_same(config, json.loads((workdir / "config.json").read_text()))
  restored = checkpoint.restore_newest(folder, abstract._asdict(), say)
  start = restored[0] if restored else 0
  if start >= last_step:
    say(f"complete: {workdir} holds the checkpoint of step {start}, of {last_step}; nothing to do")
    return 0
  workdir.mkdir(parents=True, exist_ok=True)
  write_whole(workdir / "config.json", json.dumps(configs.to_json(config), indent=2) + "\n")
  writer = metrics.Writer(workdir, start if restored else -1)
  saver = checkpoint.manager(folder, config.keep_checkpoints)

  chance = method.chance(config.batch_size)
  sizes = [sum(x.size for x in jax.tree.leaves(tree)) for tree in (shapes.params["encoder"], shapes.params)]
  shape = "x".join(map(str, train_set.images.shape[1:]))
  say(f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind}, in {jax.process_count()} process(es)")
  say(f"data: {train_set.name} {train_set.split}, {len(train_set.images):,} images {shape}")
  say(f"{config.method.name}: {sizes[0]:,} parameters in the encoder, {sizes[1]:,} in all")
  say(f"batch {config.batch_size}, {steps_per_epoch} steps an epoch, {steps} steps, this run ends at {last_step}")
  say(f"learning rate: base {config.lr.base:g}, {config.lr.scaling} scaling, peak {peak:g}, end {config.lr.end:g}")
  say(f"loss at chance: {chance:.4f}")
  if test_set is None:
    say("no labels or no test split: the online k-NN is off")
  say(f"resuming at step {start}" if restored else f"starting in {workdir}")

  started = time.perf_counter()
  train = TrainState(**restored[1]) if restored else jax.jit(init, out_shardings=everywhere)()

  def evaluation(step):
    """Writes an evaluation row. Returns the k-NN top-1, None where there are no labels."""
    if test_set is None:
      return None
    bank = evaluate.first_images(train_set, config.knn.bank_images)
    settings = dict(k=config.knn.k, temperature=config.knn.temperature)
    variables = method.encoder(train.params, train.state)
    a, b = (evaluate.features(extractor, variables, x.images, config.batch_size, mesh) for x in (bank, test_set))
    scores = evaluate.knn_accuracy(a, bank.labels, b, test_set.labels, **settings)
    row = {"step": step, "epoch": step / steps_per_epoch} | {f"knn_{name}": score for name, score in scores.items()}
    if step == 0:
      row |= evaluate.pixel_baselines(bank, test_set, **settings)
    writer.write(row)
    say(f"step {step}/{steps}  k-NN top-1 {scores['top1']:.2f} %")
    return scores["top1"]

  waiting: list[tuple[int, dict]] = []  # steps whose metrics are still on the device

  def report():
    """Looks at all waiting steps, and writes the rows that are due."""
    for step, values in jax.device_get(waiting):
      if not all(np.isfinite(value) for value in values.values()):
        raise UserError(describe_nonfinite(step, values, train))
      if step % config.log_every_steps and step != last_step:
        continue
      rate = clock.images_per_second(step)
      row = {"step": step, "epoch": step / steps_per_epoch, "learning_rate": float(learning_rate(step - 1))}
      row |= {name: float(value) for name, value in values.items()} | {"images_per_second": rate}
      writer.write(row)
      left = metrics.format_duration((last_step - step) * config.batch_size / rate)
      say(
        f"step {step}/{steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f} (chance {chance:.2f})  "
        f"lr {row['learning_rate']:.2e}  {rate:,.0f} images/s  {left} left"
      )
      if warning := metrics.collapse_warning(row):
        say(f"warning: {warning}")
    waiting.clear()

  if start == 0:
    evaluation(0)
  clock = metrics.Clock(start, config.batch_size)
  for step in range(start + 1, last_step + 1):
    batch = {"image": train_set.images[local_indices(config, len(train_set.images), step - 1)]}
    train, row = train_step(train, parallel.put_batch(mesh, batch))
    if waiting and waiting[-1][0] % config.log_every_steps == 0:
      report()  # One step late: the device is at work on the next one already.
    waiting.append((step, row))
    if step == start + 1:
      jax.block_until_ready(train)
      say(f"first step done after {time.perf_counter() - started:.1f} s")
      clock.restart(step)

    ends = step == last_step or stopping()
    evaluates = step % (config.eval_every_epochs * steps_per_epoch) == 0 or step == last_step
    if ends or evaluates or step % config.checkpoint_every_steps == 0:
      report()  # Before the save, so that nothing bad is saved and no row is lost.
      top1 = evaluation(step) if evaluates else None
      if step == last_step:
        title = f"{config.method.name}, {train_set.name}"
        metrics.draw_curves(metrics.read_rows(workdir / "metrics.jsonl"), workdir / "curves.png", chance, title)
      checkpoint.save(saver, step, train._asdict(), top1)
      clock.restart(step)
    if ends:
      break
  saver.close()  # waits for the save
  writer.close()
  if step < last_step:
    say(f"stopped by SIGTERM after step {step}, which is saved; the same command goes on from there")
    return 143
  for line in summary(config, metrics.read_rows(workdir / "metrics.jsonl")):
    say(line)
  for name in ("checkpoints", "metrics.jsonl", "tensorboard", "config.json", "curves.png"):
    say(f"wrote {workdir / name}")
  return 0


def load(config, split: str) -> data.Dataset:
  """A split of the data that the config names."""
  if config.data.folder:
    return data.load_folder(config.data.folder, split, channels=config.data.channels)
  return data.load(config.data.name, split, data_dir=config.data.data_dir, channels=config.data.channels)


def local_indices(config, images: int, step: int) -> np.ndarray:
  """This process's examples of a step."""
  here = dict(process_index=jax.process_index(), process_count=jax.process_count())
  return data.batch_indices(images, config.batch_size, config.seed, step, **here)


def describe_nonfinite(step: int, values: dict, train: TrainState) -> str:
  """What went wrong, from a step's metrics and the state, which that step left as it was."""
  bad = ", ".join(name for name, value in values.items() if not np.isfinite(value))
  leaf = metrics.nonfinite_leaf(train._asdict())
  cause = f"the first array that is not finite is {leaf}" if leaf else "the state is finite, so the gradient is not"
  return f"step {step} is not finite ({bad}): {cause}. The last checkpoint is untouched. A lower lr.base often helps."


def summary(config, rows: list[dict]) -> list[str]:
  """What the encoder is worth, beside its untrained self and the pixels."""
  scored = [row for row in rows if "knn_top1" in row]
  if not scored:
    return []
  first, last = scored[0], scored[-1]
  figures = {
    "encoder": last["knn_top1"],
    "encoder, untrained": first["knn_top1"],
    "raw pixels": first["pixels_top1"],
    "pixels, centred": first["pixels_centred_top1"],
    "pixels, standardised": first["pixels_standardised_top1"],
  }
  title = f"k-NN top-1 (cosine, k={config.knn.k}, T={config.knn.temperature:g}) on {config.data.test_split}:"
  return [title, *(f"  {name:<22}{value:6.2f} %" for name, value in figures.items())]


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

  run(start, recipe=str(pathlib.Path(__file__).parent / "configs" / "quickstart.py"))
