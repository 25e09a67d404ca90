"""What a run's folder holds beside its checkpoints and rows, and whether a run may go on in it."""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from ssl_jax import config as configs
from ssl_jax.data import Dataset
from ssl_jax.decide import Decision
from ssl_jax.errors import UserError
from ssl_jax.run import checkpoint, cluster, whole
from ssl_jax.run.cli import say

if TYPE_CHECKING:
  from ssl_jax.build import Run

WRITTEN = (
  "checkpoints",
  "metrics.jsonl",
  "tensorboard",
  "wandb",
  "mlflow.db",
  "mlartifacts",
  "config.json",
  "resolved.json",
  "curves.png",
  "pictures",
  "skipped.txt",
  "report.html",
)
_TOLD = 10  # files that cannot be read are told one by one, up to so many


class Saved(NamedTuple):
  """What a run that has a checkpoint was started with: its config, and which of its values were decided then."""

  config: dict[str, Any]
  decided: list[Decision]


def saved(workdir: pathlib.Path) -> Saved | None:
  """What the run in a workdir goes on with; None: there is none."""
  if not (workdir / "config.json").is_file() or not checkpoint.steps(workdir / "checkpoints"):
    return None
  decided = [Decision(*row) for row in read_resolved(workdir).get("decided", [])]
  return Saved(read_json(workdir / "config.json"), decided)


def check_resumable(run: "Run", workdir: pathlib.Path) -> None:
  """Raises UserError if the workdir has a run with another config, or other files: steps would see other images."""
  for name in ("checkpoints", "tensorboard", "pictures"):
    if (workdir / name).exists() and not (workdir / name).is_dir():
      raise UserError(f"{workdir / name} is a file, where a run has a folder: move it away, or take another --workdir.")
  if not checkpoint.steps(workdir / "checkpoints"):
    return
  if not (workdir / "config.json").is_file():
    raise UserError(f"{workdir} has checkpoints but no config.json: take another --workdir.")
  configs.check_same(run.config, read_json(workdir / "config.json"))
  then = {"window": None, "decided": []} | read_resolved(workdir)  # older versions measured and decided none
  differ = {key: (then[key], now) for key, now in run.resolved().items() if key in then and then[key] != now}
  if differ:
    texts = "; ".join(f"{key}: {before} then, now {now}" for key, (before, now) in differ.items())
    raise UserError(
      f"the images are not those that this run began with ({texts}). Put the data back as they were, or take another "
      "--workdir."
    )


def source(run: "Run", workdir: pathlib.Path, start: int, begins: bool) -> dict[str, Any] | None:
  """Which weights the run in a workdir began with, or begins with now, as of `Run.source`. All processes come here.

  None: no weights, a method without labels, or a run that an older version began.

  Raises:
    UserError: the run has ended at `start`, and `init_from` gives other weights now: its figures are of the old ones.
  """
  if begins:
    return run.source()
  then = read_resolved(workdir).get("init_from")
  if then is None:
    return None
  path = run.config.init_from
  try:
    now = run.source()
  except UserError as error:  # its checkpoints are gone, say, which the run does not need any more
    say(f"note: whether init_from={path} still has the weights that {workdir} began with cannot be told: {error}")
    now = None
  if now not in (None, then):
    before, here = (f"{x['weights'][:8]}" if x["step"] is None else f"step {x['step']}" for x in (then, now))
    if before == here:
      here = f"other ones of {here}"
    told = f"{workdir} began with other weights than {path} has now ({before} then, {here} now)"
    if start < run.last_step:
      say(f"note: {told}; it goes on with those of then")
      return then
    raise UserError(f"{told}: delete {workdir} to train with those of now, or take another --workdir.")
  return then


def write_start(run: "Run", workdir: pathlib.Path, source: dict[str, Any] | None = None) -> None:
  """Writes what the run is made from: config.json, and resolved.json, what the data and `init_from` gave."""
  workdir.mkdir(parents=True, exist_ok=True)
  resolved = run.resolved() | ({} if source is None else {"init_from": source})
  whole.text(workdir / "config.json", json.dumps(configs.to_json(run.config), indent=2) + "\n")
  whole.text(workdir / "resolved.json", json.dumps(resolved, indent=2) + "\n")


def read_resolved(workdir: pathlib.Path) -> dict[str, Any]:
  """`Run.resolved` of the run in a workdir; of one that an older version wrote, what it has."""
  if (workdir / "resolved.json").is_file():
    return read_json(workdir / "resolved.json")
  return {"files": (workdir / "files.txt").read_text()} if (workdir / "files.txt").is_file() else {}


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """What a run wrote into a JSON file of its workdir. Raises UserError where somebody has damaged it."""
  try:
    content = json.loads(path.read_text())
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}): put it back as it was, or take another --workdir.") from None
  if not isinstance(content, dict):
    raise UserError(f"{path} is damaged, it holds {content!r}: put it back as it was, or take another --workdir.")
  return content


def noting_skipped(
  batches: Iterable[dict[str, Any]], dataset: Dataset, workdir: pathlib.Path
) -> Iterator[dict[str, Any]]:
  """Passes batches on, and lists in skipped.txt the files that could not be read.

  Each process has a list of its own, process 1's in skipped_1.txt; process 0 also tells its first ones.
  """
  path = workdir / ("skipped.txt" if cluster.is_main() else f"skipped_{jax.process_index()}.txt")
  known = set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()
  for batch in batches:
    for i in batch["wanted"][batch["wanted"] != batch["index"]]:
      name = dataset.image_name(i)
      if name not in known:
        known.add(name)
        if len(known) <= _TOLD:
          say(f"skipped {name}, which cannot be read; all such are listed in {path}")
        whole.text(path, "".join(f"{name}\n" for name in sorted(known)))
    yield batch
