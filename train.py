"""Trains an encoder without labels, on all devices of all hosts; the loop is this file, top to bottom.

  python train.py                                             SimCLR on the built-in images
  python train.py --config=configs/simclr_cifar10.py --workdir=runs/cifar --config.data.data_dir=D
  python train.py --config.seed=1 --config.steps=500          any key of a config can be set so

Started again with the same workdir, it goes on from the last checkpoint, exactly. On a pod or a cluster the same
command is started on every host; they find each other (docs/pods.md).
"""

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Callable
from typing import Any

import jax
from absl import flags
from ml_collections import config_flags

from ssl_jax import build, parallel
from ssl_jax import config as configs
from ssl_jax.build import Run
from ssl_jax.evaluation import during_training, guard
from ssl_jax.page import pages
from ssl_jax.run import checkpoint, cli, cluster, lock, log, loggers, messages, plots, profile, progress, signals
from ssl_jax.run import workdir as workdirs
from ssl_jax.run.cli import say
from ssl_jax.training import TrainState


def main(config, workdir: pathlib.Path) -> int:
  """Trains. Returns the exit status: 0, or 128 + the number of the signal that ended the run."""
  cluster.together(lambda: cluster.is_main() and loggers.check_installed(configs.loggers(config)))
  run = cluster.together(lambda: build.run(config, workdirs.saved(workdir), say))
  cluster.check_alike(configs.facts(run.config) | run.facts())
  with lock.held(workdir), signals.listening() as stopping:  # A signal still ends it while it waits for the lock.
    return go_on(run, workdir, stopping)


def go_on(run: Run, workdir: pathlib.Path, stopping: Callable[[], int]) -> int:
  """Begins in the workdir, or goes on from its last checkpoint. Returns the exit status."""
  config = run.config
  cluster.check_shared(workdir)
  cluster.together(lambda: workdirs.check_resumable(run, workdir))
  restored = checkpoint.restore_newest(workdir / "checkpoints", run.state._asdict(), say)
  start = restored[0] if restored else 0
  source = workdirs.source(run, workdir, start, begins=not restored)
  if start >= run.last_step:
    say(f"complete: {workdir} holds the checkpoint of step {start}, of {run.last_step}; nothing to do")
    return 0
  for line in messages.describe(run):
    say(line)
  told: list[str] = []
  if restored:
    train = TrainState(**restored[1])
  else:  # Before anything is written: the weights of `init_from` may be the wrong ones.
    train, told = cluster.together(lambda: build.first_state(run))
  if cluster.is_main():
    workdirs.write_start(run, workdir, source)
  for line in (f"resuming at step {start}" if restored else f"starting in {workdir}", *told):
    say(line)
  step, number = fit(run, train, start, workdir, stopping)
  if step < run.last_step:
    name = signal.Signals(number).name
    say(f"stopped by {name} after step {step}, which is saved in {workdir}; the same command goes on from there")
    return 128 + number
  if cluster.is_main():
    for line in messages.summary(config, log.read_rows(workdir / "metrics.jsonl")):
      say(line)
    for name in workdirs.WRITTEN:
      if (workdir / name).exists():
        say(f"wrote {workdir / name}")
  return 0


def fit(run: Run, train: TrainState, start: int, workdir: pathlib.Path, stopping: Callable[[], int]) -> tuple[int, int]:
  """The loop, from `start` to the run's last step, or until `stopping()` names a signal.

  Returns the last step, which is saved, and the signal or 0.
  """
  config, started, number = run.config, time.perf_counter(), 0
  waiting: list[tuple[int, dict]] = []  # (step, metrics) still on the device
  with (
    contextlib.closing(log.make_writer(run, workdir, start or -1)) as writer,
    contextlib.closing(checkpoint.manager(workdir / "checkpoints", config.keep_checkpoints)) as saver,
    contextlib.closing(
      profile.Profile(workdir / "tensorboard", config.get("profile_steps"), start, run.last_step)
    ) as profiled,
    progress.cleared(),
    cluster.ending_together(folder=workdir),
  ):
    page = pages.Pages(run, workdir, writer)
    if start == 0:
      page.write(train, 0, evaluate(run, writer, train, 0, workdir))
      if config.get("guard") and not checkpoint.steps(workdir / "checkpoints"):
        checkpoint.save(saver, 0, train._asdict())  # the start may turn out to be the best
    clock = log.Clock(start, config.batch_size)
    batches = workdirs.noting_skipped(run.batches(start), run.train_set, workdir)
    for step in range(start + 1, run.last_step + 1):
      with clock.waiting():
        found = next(batches)
      profiled.before(step, train)
      # Both calls return at once: this batch is copied while the device computes the step before.
      batch = {name: found[name] for name in run.inputs}
      train, row = run.train_step(train, parallel.put_batch(run.mesh, batch))
      if len(waiting) > 1:  # Not further ahead than that: batches would pile up in the device's memory.
        jax.block_until_ready(waiting[-2][1])
      if waiting and waiting[-1][0] % config.log_every_steps == 0:
        log.write_steps(run, writer, clock, waiting, train)  # One step late: the device is busy with the next one.
      waiting.append((step, row))
      if profiled.after(step, train):
        clock.restart(step)
      if step == start + 1:
        jax.block_until_ready(train)
        say(f"first step done after {time.perf_counter() - started:.1f} s")
        clock.images_per_second(step)  # with its compilation: not to be counted in the next rows
      cli.live(functools.partial(messages.live_line, run, step, clock.rate_now(step)))

      number = stopping()
      ends = number or step == run.last_step
      evaluates = step % (config.eval_every_epochs * run.steps_per_epoch) == 0 or step == run.last_step
      if ends or evaluates or step % config.checkpoint_every_steps == 0:
        # Before saving: it raises where a number is not finite, and no row is lost.
        log.write_steps(run, writer, clock, waiting, train)
        drawn = evaluate(run, writer, train, step, workdir) if evaluates else None
        if step == run.last_step and cluster.is_main():
          plots.draw_curves(workdir, run.chance, f"{config.method.name}, {run.train_set.name}")
        checkpoint.save(saver, step, train._asdict())
        if evaluates:
          page.write(train, step, drawn)
        elif ends:
          page.end()
        clock.restart(step)
      if ends:
        break
    saver.wait_until_finished()  # here, where a failure ends all processes
  return step, number


def evaluate(run: Run, writer: log.Writer | log.NoWriter, train: TrainState, step: int, workdir: pathlib.Path) -> Any:
  """Evaluates and writes the row, and pictures/<step>.png where the method has pictures; returns these or None."""
  row = during_training.evaluate(run, train, step)
  say(f"step {step}/{run.steps}  {messages.evaluation(row)}")
  if run.config.get("guard"):
    row |= guard.measure(run, train, step, workdir, row.get("knn_top1"))
  writer.write(row)
  drawn = during_training.pictures(run, train)
  if drawn is not None and cluster.is_main():
    path = workdir / "pictures" / f"{step:08d}.png"
    plots.draw_pictures(path, drawn, f"{run.config.method.name}, step {step}")
    writer.show("pictures", path, step)
  return drawn


if __name__ == "__main__":
  CONFIG = config_flags.DEFINE_config_file("config", None, "the recipe; by default configs/quickstart.py")
  WORKDIR = flags.DEFINE_string("workdir", None, "where everything is written; by default runs/<the recipe's name>")

  def start():
    name = pathlib.Path(flags.FLAGS["config"].config_filename).stem
    return main(CONFIG.value, pathlib.Path(WORKDIR.value or f"runs/{name}"))

  cli.run(start, recipe=str(pathlib.Path(__file__).parent / "configs" / "quickstart.py"), joins=True)
