"""Writes report.html, a page that shows what came of a run, or of a few runs side by side.

  python -m ssl_jax report DIR [DIR ...] [--out=FILE] [--fresh]

A run writes its own page at each evaluation and at its end; this makes it again, with what was measured since
(eval_linear.py, eval_knn.py). Pictures are those of the last evaluation, or, where there are none or with --fresh, made
from the newest checkpoint and the run's data. The page is one file and loads nothing.
"""

import argparse
import json
import pathlib

import jax.numpy as jnp

from ssl_jax import build, restore
from ssl_jax.commands import Parser, check_writable
from ssl_jax.errors import UserError
from ssl_jax.evaluation import during_training
from ssl_jax.page import look, pages
from ssl_jax.run import cluster, whole
from ssl_jax.training import TrainState


def main(arguments: list[str] | None = None) -> int:
  """The command. Returns the exit status."""
  parser = Parser(
    prog="python -m ssl_jax report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("runs", nargs="+", type=pathlib.Path, metavar="DIR", help="what train.py wrote to")
  parser.add_argument("--out", type=pathlib.Path, help="the page; by default DIR/report.html")
  parser.add_argument("--fresh", action="store_true", help="look at the encoder anew, and do not take its last look")
  args = parser.parse_args(arguments)
  try:
    write(args.runs, args.out, args.fresh)
  except UserError as error:
    return parser.tell(str(error))
  except OSError as error:
    return parser.tell(cluster.refusal(error, args.out or args.runs[0]) or f"{error.filename}: {error.strerror}")
  return 0


def write(workdirs: list[pathlib.Path], out: pathlib.Path | None, fresh: bool) -> None:
  """What the command does with its arguments."""
  if len(workdirs) > pages.MOST_RUNS:
    raise UserError(f"at most {pages.MOST_RUNS} runs fit beside each other, got {len(workdirs)}.")
  if out is None and len(workdirs) > 1:
    raise UserError("name the page of several runs: --out=both.html")
  out = out or workdirs[0] / pages.PAGE
  for workdir in workdirs:
    pages.folder(workdir)  # so that what is no run is told before any work
  check_writable("--out", out)
  for workdir in workdirs:
    last = pages.folder(workdir)["look"]
    if fresh or not last:
      told = {
        key: last[key] for key in ("environment", "described", "command") if key in last
      }  # of the training itself
      try:
        whole.text(workdir / pages.LOOK, json.dumps(look_again(workdir) | told))
      except UserError as error:
        print(f"{workdir}: no new pictures: {error}")
  pages.write_page(workdirs, out)
  print(f"wrote {out}")


def look_again(workdir: pathlib.Path) -> dict:
  """The look of a run's newest checkpoint, at the data that its config names. Raises UserError where either is gone."""
  restored = restore.restore_run(workdir)
  run = build.run(restored.config)
  train = TrainState(jnp.int32(restored.step), restored.params, restored.state, ())
  seen = look.gallery(run)
  drawn = during_training.pictures(run, train)
  found = look.take(look.features(run, train, seen), seen, restored.step, drawn, thorough=True)
  return found | look.still(seen, look.views(run)) | pages.facts(run)
