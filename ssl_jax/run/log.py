"""The rows of a run, on disk and in what else it logs to, and the clock of its throughput."""

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from ssl_jax import config as configs
from ssl_jax import monitors
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, loggers, messages, whole
from ssl_jax.run.cli import say
from ssl_jax.training import TrainState

if TYPE_CHECKING:
  from ssl_jax.build import Run


_SETTLED, _LONG = 10, 120  # steps until the end is estimated, and seconds that are left, for it to be told


class Writer:
  """Rows to metrics.jsonl and to loggers; a row is on disk when `write` returns.

  On resume at `step`, rows of later steps, and a line cut short by a kill, are dropped: they will come again.
  """

  def __init__(
    self,
    workdir: pathlib.Path,
    step: int,
    names: Iterable[str] = ("tensorboard",),
    about: loggers.About | None = None,
  ):
    self.path = workdir / "metrics.jsonl"
    kept = [row for row in read_rows(self.path) if row["step"] <= step]
    whole.text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
    self.file = self.path.open("a")
    self.loggers = loggers.begin(names, workdir, step, kept, about)

  def write(self, row: dict[str, Any]) -> None:
    """Appends one row; floats are written so that they read back exactly."""
    self.file.write(json.dumps(row) + "\n")
    self.file.flush()
    for logger in self.loggers:
      logger.write(row)

  def show(self, name: str, path: pathlib.Path, step: int) -> None:
    """Hands a picture to the loggers: a PNG file, pictures/STEP.png or pictures/NAME_STEP.png in the workdir."""
    for logger in self.loggers:
      logger.show(name, path, step)

  def close(self) -> None:
    with contextlib.ExitStack() as closing:  # A full disk may fail one of them: the others are closed all the same.
      closing.callback(self.file.close)
      for logger in self.loggers:
        closing.callback(logger.close)


class NoWriter:
  """What stands in for a `Writer` on the processes that do not write."""

  def write(self, row: dict[str, Any]) -> None: ...

  def show(self, name: str, path: pathlib.Path, step: int) -> None: ...

  def close(self) -> None: ...


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
  """All whole rows of a metrics file; none if it does not exist."""
  rows = []
  for line in path.read_text().splitlines() if path.exists() else []:
    try:
      rows.append(json.loads(line))
    except json.JSONDecodeError:
      break  # cut short by a kill
  return rows


class Clock:
  """Images per second between two questions, leaving out what `restart` follows: compilation, evaluation, saving.

  `share` is the share of that time that was spent `waiting` for input.
  """

  def __init__(self, step: int, batch_size: int):
    self.outlook_from: float = step + _SETTLED
    self.batch_size, self.rate, self.share, self.shown = batch_size, 0.0, 0.0, 0.0
    self.restart(step)

  def restart(self, step: int) -> None:
    self.step, self.time, self.waited = step, time.perf_counter(), 0.0

  @contextlib.contextmanager
  def waiting(self) -> Iterator[None]:
    start = time.perf_counter()
    yield
    self.waited += time.perf_counter() - start

  def images_per_second(self, step: int) -> float:
    """The rate since the last question or restart; the last one known if no step was taken since."""
    if step > self.step:
      elapsed, first = time.perf_counter() - self.time, not self.rate
      self.rate, self.share = (step - self.step) * self.batch_size / elapsed, self.waited / elapsed
      self.shown = 0.0 if first else self.rate
      self.restart(step)
    return self.rate

  def rate_now(self, step: int) -> float:
    """The rate for the live line, which is no question; 0 until one is known without the compilation."""
    elapsed = time.perf_counter() - self.time
    if step > self.step and elapsed > 1:
      self.shown = (step - self.step) * self.batch_size / elapsed
    return self.shown


def outlook(run: "Run", step: int, rate: float, now: float) -> list[str]:
  """When a run that takes minutes will end, at `rate` images a second, and what a quarter of it would take."""
  config = run.config
  seconds = (run.last_step - step) * config.batch_size / rate
  if seconds < _LONG:
    return []
  end = time.strftime("%H:%M" if seconds < 20 * 3600 else "%a %d %b, %H:%M", time.localtime(now + seconds))
  key = "steps" if config.steps else "epochs"
  quarter = max(1, config[key] // 4)
  steps = quarter if config.steps else quarter * run.steps_per_epoch
  takes = messages.format_duration(steps * config.batch_size / rate)
  less = f"; --config.{key}={quarter}, in another --workdir, would take {takes}" if steps < run.steps else ""
  return [f"at this rate it ends at {end}, evaluations aside{less}"]


def make_writer(run: "Run", workdir: pathlib.Path, step: int) -> Writer | NoWriter:
  """One of the processes writes."""
  if not cluster.is_main():
    return NoWriter()
  about = loggers.About(configs.to_json(run.config), run.resolved(), run.last_step)
  return Writer(workdir, step, configs.loggers(run.config), about)


def write_steps(
  run: "Run", writer: Writer | NoWriter, clock: Clock, waiting: list[tuple[int, dict]], train: TrainState
) -> None:
  """Looks at the metrics of all `waiting` steps, (step, metrics), writes the rows that are due, and empties the list.

  Raises:
    UserError: a step was not finite.
  """
  config = run.config
  for step, values in jax.device_get(waiting):
    if not all(np.isfinite(value) for value in values.values()):
      writer.write({"step": step, "epoch": step / run.steps_per_epoch, "not_finite": 1})
      raise UserError(messages.nonfinite(step, values, train._asdict()))
    if step % config.log_every_steps and step != run.last_step:
      continue
    rate = clock.images_per_second(step)
    row = {"step": step, "epoch": step / run.steps_per_epoch, "learning_rate": float(run.learning_rate(step - 1))}
    row |= {name: float(value) for name, value in values.items()}
    row |= {"images_per_second": rate, "input_share": clock.share}
    if run.peak:
      row["mfu"] = run.flops * rate / config.batch_size / run.peak  # model FLOP utilisation
    writer.write(row)
    say(messages.step_line(run, row))
    if step >= clock.outlook_from:
      clock.outlook_from = math.inf  # once a start
      for line in outlook(run, step, rate, time.time()):
        say(line)
    if warning := monitors.collapse_warning(row):
      say(f"warning: {warning}")
  waiting.clear()
