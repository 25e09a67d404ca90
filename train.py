"""Trains an encoder without labels, on one CPU, a GPU box or a pod: the loop is this file, top to bottom.

  python train.py                                             SimCLR on the built-in images
  python train.py --config=configs/simclr_cifar10.py --workdir=runs/cifar --config.data.data_dir=D
  python train.py --config.seed=1 --config.steps=500          any key of a config can be set so

Started again with the same workdir, it goes on from the last checkpoint, exactly.
"""

import glob
import json
import os
import pathlib
import re
import signal
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from jax import lax
from ml_collections import config_flags

from ssl_jax import augment, checkpoint, data, evaluate, methods, metrics, optim, parallel
from ssl_jax import config as configs
from ssl_jax.errors import UserError
from ssl_jax.methods.base import AXIS, Method

HERE = pathlib.Path(__file__).parent


class TrainState(NamedTuple):
  """Everything that the next step depends on, and so everything in a checkpoint."""

  step: jax.Array  # int32, how many steps are done
  params: Any
  state: Any  # the method's
  opt_state: Any


def make_init(method: Method, optimizer: optax.GradientTransformation, views, image_shape, seed: int):
  """Returns `() -> TrainState`; one random image is enough to learn the shapes."""

  def init():
    keys = augment.example_keys(seed, jnp.int32(0), jnp.arange(1))
    example = augment.make_views(keys, jnp.zeros((1, *image_shape), jnp.uint8), views)
    params, state = method.init(jax.random.key(seed, impl="threefry2x32"), example)
    return TrainState(jnp.int32(0), params, state, optimizer.init(params))

  return init


def make_step(method: Method, optimizer: optax.GradientTransformation, views, seed: int):
  """Returns one training step of one device: (state, {"image": uint8 [b, H, W, C]}) -> (state, metrics)."""

  def train_step(train: TrainState, batch):
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
  """Trains, and returns the exit status: 0, or 143 if SIGTERM ended the run."""
  stop = listen_for_sigterm()

  # Everything that can be wrong with the settings shows here, before anything is compiled.
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
  method, encoder = module.from_config(config, steps), module.make_encoder(config)
  init = make_init(method, optimizer, views, train_set.images.shape[1:], config.seed)
  shapes = jax.eval_shape(init)
  labelled = train_set.num_classes > 0
  test_set = load(config, config.data.test_split) if labelled else None

  # Resume, or start.
  folder = workdir / "checkpoints"
  if checkpoint.steps(folder):
    configs.check_same(config, json.loads((workdir / "config.json").read_text()))
  sharding = parallel.replicated(mesh)
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes)
  restored = checkpoint.restore_newest(folder, abstract._asdict(), say)
  start = restored[0] if restored else 0
  if start >= last_step:
    say(f"complete: {workdir} holds the checkpoint of step {start} of {last_step}; nothing to do")
    return 0
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / "config.json").write_text(json.dumps(configs.to_json(config), indent=2) + "\n")
  writer = metrics.Writer(workdir, start if restored else -1)
  saver = checkpoint.manager(folder, config.keep_checkpoints)

  parameters = sum(x.size for x in jax.tree.leaves(shapes.params))
  in_encoder = sum(x.size for x in jax.tree.leaves(shapes.params["encoder"]))
  chance = method.chance(config.batch_size)
  say(f"{config.method.name}: {in_encoder:,} parameters in the encoder, {parameters:,} in all")
  say(
    f"devices: {mesh.size} x {mesh.devices.flat[0].device_kind} ({jax.default_backend()}), {jax.process_count()} process(es)"
  )
  shape = "x".join(map(str, train_set.images.shape[1:]))
  say(f"data: {train_set.name} {train_set.split}, {len(train_set.images):,} images {shape}")
  say(f"batch {config.batch_size}, {steps_per_epoch} steps an epoch, {steps} steps; ends at step {last_step}")
  say(f"learning rate {config.lr.base:g} ({config.lr.scaling} scaling) -> peak {peak:g}, end {config.lr.end:g}")
  say(f"loss at chance level {chance:.4f}")
  if not labelled:
    say("no labels: the online k-NN is off")
  say(f"resumed at step {start}" if restored else "compiling, then training")

  train = TrainState(**restored[1]) if restored else jax.jit(init, out_shardings=sharding)()
  train_step = parallel.compile_step(make_step(method, optimizer, views, config.seed), mesh)

  extractor = evaluate.make_extractor(encoder, configs.eval_view(config), mesh)

  def evaluation(step):
    """Evaluates and writes a row; returns the k-NN top-1, None without labels."""
    if not labelled:
      return None
    bank = evaluate.first_images(train_set, config.knn.bank_images)
    settings = dict(k=config.knn.k, temperature=config.knn.temperature)
    variables = method.encoder(train.params, train.state)
    a, b = (evaluate.features(extractor, variables, x.images, config.batch_size, mesh) for x in (bank, test_set))
    scores = evaluate.knn_accuracy(a, bank.labels, b, test_set.labels, **settings)
    row = {"step": step, "epoch": step / steps_per_epoch} | {f"knn_{key}": value for key, value in scores.items()}
    if step == 0:
      row |= evaluate.pixel_baselines(bank, test_set, **settings)
    writer.write(row)
    say(f"step {step}/{steps}  k-NN top-1 {scores['top1']:.2f} %")
    return scores["top1"]

  if start == 0:
    evaluation(0)

  waiting: list[tuple[int, dict]] = []  # steps whose metrics are still on the device
  clock = Clock(start)

  def report():
    """Writes the newest waiting row. Raises UserError at the first step that was not finite."""
    rows = jax.device_get(waiting)
    waiting.clear()
    for step, values in rows:
      bad = [name for name, value in values.items() if not np.isfinite(value)]
      if bad:
        leaf = evaluate.nonfinite_leaf(train.params) or evaluate.nonfinite_leaf(train.state)
        cause = (
          f"the first array that is not finite is {leaf}" if leaf else "all parameters are finite, its gradient is not"
        )
        raise UserError(
          f"step {step} is not finite ({', '.join(bad)}): {cause}. Nothing was saved since. A lower lr.base often helps."
        )
    for step, values in rows[-1:]:
      rate = clock.images_per_second(step, config.batch_size)
      row = {"step": step, "epoch": step / steps_per_epoch, "learning_rate": float(learning_rate(step - 1))}
      row |= {name: float(value) for name, value in values.items()} | {"images_per_second": rate}
      writer.write(row)
      left = metrics.format_duration((last_step - step) * config.batch_size / rate)
      say(
        f"step {step}/{steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f} (chance {chance:.2f})  "
        f"lr {row['learning_rate']:.2e}  {rate:,.0f} images/s  {left} left"
      )
      warning = metrics.collapse_warning(row)
      if warning:
        say(f"warning: {warning}")

  n, processes = len(train_set.images), jax.process_count()
  due = False
  for step in range(start + 1, last_step + 1):
    indices = data.batch_indices(
      n, config.batch_size, config.seed, step - 1, process_index=jax.process_index(), process_count=processes
    )
    train, row = train_step(train, parallel.put_batch(mesh, {"image": train_set.images[indices]}))
    if due:  # The row of the step before: the device is busy with this one already.
      report()
    waiting.append((step, row))
    due = step % config.log_every_steps == 0 or step == 1

    ends = step == last_step or stop()
    evaluates = step % (config.eval_every_epochs * steps_per_epoch) == 0 or step == last_step
    if evaluates or ends or step % config.checkpoint_every_steps == 0:
      report()
      due = False
      top1 = evaluation(step) if evaluates else None
      if step == last_step:
        finish(workdir, config, chance)
      checkpoint.save(saver, step, train._asdict(), configs.to_json(config), top1)
      clock.restart(step)
    if ends:
      break
  saver.close()  # waits for the save
  writer.close()
  if stop():
    say(f"stopped by SIGTERM at step {step}, saved; the same command goes on from here")
    return 143
  return 0


class Clock:
  """Images per second since the last row, without compilation, evaluation and saving."""

  def __init__(self, step):
    self.restart(step)

  def restart(self, step):
    self.step, self.time = step, time.perf_counter()

  def images_per_second(self, step, batch_size):
    now = time.perf_counter()
    rate = (step - self.step) * batch_size / max(now - self.time, 1e-9)
    self.step, self.time = step, now
    return rate


def load(config, split: str) -> data.Dataset:
  """The images of a split, as the config names them."""
  if config.data.folder:
    return data.load_folder(config.data.folder, split, channels=config.data.channels)
  return data.load(config.data.name, split, data_dir=config.data.data_dir, channels=config.data.channels)


def finish(workdir: pathlib.Path, config, chance: float) -> None:
  """Draws the curves and prints what the encoder is worth and where everything is."""
  rows = metrics.read_rows(workdir / "metrics.jsonl")
  metrics.draw_curves(rows, workdir / "curves.png", chance=chance, title=f"{config.method.name}, {config.data.name}")
  scored = [row for row in rows if "knn_top1" in row]
  if scored:
    first, last = scored[0], scored[-1]
    say(f"k-NN top-1 (k={config.knn.k}, T={config.knn.temperature}), {config.data.test_split} images:")
    say(f"  encoder               {last['knn_top1']:6.2f} %")
    say(f"  encoder, untrained    {first['knn_top1']:6.2f} %")
    for name in ("pixels", "pixels_centred", "pixels_standardised"):
      say(f"  {'raw pixels' if name == 'pixels' else name.replace('_', ', '):<22}{first[f'{name}_top1']:6.2f} %")
  for name in ("checkpoints", "metrics.jsonl", "tensorboard", "config.json", "curves.png"):
    say(f"wrote {workdir / name}")


def listen_for_sigterm():
  """Returns a function that says whether SIGTERM came: the step is finished and saved. A second one ends at once."""
  came = []

  def handler(number, frame):
    del frame
    came.append(number)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

  signal.signal(signal.SIGTERM, handler)
  return lambda: bool(came)


def say(line: str) -> None:
  print(line, flush=True)


def tell_of_idle_gpu() -> None:
  if glob.glob("/dev/nvidia[0-9]*") and jax.default_backend() == "cpu":
    say('an NVIDIA GPU is here, but JAX sees only the CPU: pip install -U "jax[cuda13]"')


def use_compilation_cache() -> None:
  """Compiled programs are kept between runs; JAX_COMPILATION_CACHE_DIR says where, if set."""
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "ssl_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(cache))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parse_flags(argv):
  """absl's parsing, with a mistake told in one line."""
  named = [arg.partition("=")[2] for arg in argv if re.match(r"--?config=", arg)]
  if named and not pathlib.Path(named[-1]).is_file():
    there = ", ".join(sorted(str(p.relative_to(HERE)) for p in (HERE / "configs").glob("*.py")))
    sys.exit(f"train.py: error: there is no config file {named[-1]!r}. Here are: {there}")
  try:
    return flags.FLAGS(argv)
  except (AttributeError, KeyError, TypeError) as error:
    config = flags.FLAGS["config"].value
    for arg in argv:
      key = re.match(r"--?config\.([\w.]+)", arg)
      if key and not configs.has_key(config, key[1]):
        sys.exit(
          f"train.py: error: there is no config key {key[1]!r}; did you mean {configs.nearest_key(config, key[1])!r}?"
        )
    sys.exit(f"train.py: error: {str(error).splitlines()[0]}")
  except flags.Error as error:
    sys.exit(f"train.py: error: {str(error).splitlines()[0]}")


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file(
    "config", str(HERE / "configs/quickstart.py"), "the recipe", lock_config=True
  )
  WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written; default: runs/<name of the config>")

  def run(_):
    logging.set_verbosity(logging.WARNING)  # JAX, TFDS and Orbax tell a lot at INFO
    use_compilation_cache()
    tell_of_idle_gpu()
    name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
    try:
      return main(CONFIG.value, pathlib.Path(WORKDIR.value or f"runs/{name}"))
    except UserError as error:
      sys.exit(f"train.py: error: {error}")

  app.run(run, flags_parser=parse_flags)
