"""What a run's features are like, where no label says what they are worth; and a picture of nearest neighbours.

  python -m ssl_jax judge --workdir=runs/quickstart [--folder=DIR] [--split=train] [--images=2048] [--features=cls]

RankMe, effective rank, uniformity and alignment of the trained encoder, of the one that the run began with and of the
raw pixels, on evenly spaced images of a split, labelled or not. docs/evaluation.md says what these can tell and what
not. The picture, WORKDIR/neighbours.png, has a dozen of the images and beside each its five nearest neighbours among
all of them, by the encoder and by the pixels. The last line is JSON, which WORKDIR/judge.json holds too.

  --workdir=runs/quickstart   the run; --step=N: the checkpoint of a step, by default the newest
  --folder=DIR                other images than the run's; or --data=NAME --data_dir=D, a prepared data set
  --split=train               which of them; by default what the run trained on
  --images=2048               how many of the split: RankMe is at most this number, and grows with it
  --features=cls              what is read off the encoder: cls, mean, cls+mean or flat, of a ResNet pooled or flat
"""

import pathlib
import sys
from typing import Any

import numpy as np
from absl import flags

from ssl_jax import config as configs
from ssl_jax import parallel, restore
from ssl_jax.commands import evaluate
from ssl_jax.commands.evaluate import BATCH_SIZE, FEATURES, STEP, TEST_SPLIT, WORKDIR, find
from ssl_jax.errors import UserError
from ssl_jax.evaluation import judge
from ssl_jax.evaluation.accuracy import LARGEST
from ssl_jax.evaluation.features import Extractor, reading
from ssl_jax.run import cli, cluster, messages, plots
from ssl_jax.run.cli import say

SPLIT = flags.DEFINE_string("split", None, "the images; by default what the run trained on")
IMAGES = flags.DEFINE_integer("images", judge.IMAGES, "how many of them, at least 3")


def look() -> int:
  """Measures, draws and tells. Returns the exit status."""
  workdir = pathlib.Path(WORKDIR.value)
  if TEST_SPLIT.value or evaluate.CACHE.value:
    raise UserError("judge looks at one split, --split, and keeps no features: leave --test_split and --cache out.")
  if IMAGES.value < 3:
    raise UserError(f"--images must be at least 3, got {IMAGES.value}.")
  restored = restore.restore_encoder(workdir, STEP.value)
  config, read = restored.config, reading(restored.encoder, FEATURES.value)
  dataset = find(config, SPLIT.value or config.data.split).thinned(IMAGES.value)
  say(f"step {restored.step} of {workdir}")
  mesh = parallel.make_mesh()
  batch_size = -(-BATCH_SIZE.value // mesh.size) * mesh.size
  extractor = Extractor(restored.encoder, restored.eval_view, mesh, batch_size, read)

  found = extractor.all(restored.variables, dataset)
  n = len(found.features)
  if n < 3:
    raise UserError(f"{dataset.name} {dataset.split!r} has {n} images that can be read: three are the least.")
  say(f"images: {n:,} of {dataset.name} {dataset.split}, features of width {found.features.shape[1]}")
  figures: dict[str, Any] = {"step": restored.step, "images": n, "split": dataset.split} | evaluate.facts(config)
  queries = np.unique(np.arange(judge.SHOWN) * n // judge.SHOWN)
  neighbours = {"encoder": judge.nearest(found.features, queries)[0]}
  pixels = dataset.pixels(restored.eval_view, LARGEST)
  if pixels is None:
    say("raw pixels: not tried, since the images are large or not in memory")
  else:
    flat = pixels[found.indices].reshape(n, -1).astype(np.float32) / 255
    tell(figures, "pixels_", "raw pixels", judge.measure(flat))
    neighbours["pixels"] = judge.nearest(flat, queries)[0]
  view = configs.views(config)[0]
  for prefix, name, variables in (
    ("untrained_", "encoder, untrained", restored.untrained()),
    ("", "encoder", restored.variables),
  ):
    features = extractor.all(variables, dataset).features if prefix else found.features
    tell(figures, prefix, name, judge.measure(features) | judge.aligned(extractor, variables, dataset, view))
  if cluster.is_main():
    path = evaluate.place(workdir, "neighbours", "png")
    drawn = judge.columns(dataset, found.indices, restored.eval_view, queries, neighbours)
    try:
      plots.draw_grid(path, drawn, f"nearest neighbours among {n:,} images, step {restored.step}", side=1)
      say(f"wrote {path}")
    except OSError as error:
      say(f"not written: {path} ({error.strerror})")
  evaluate.hand_over(figures, workdir, "judge")
  return 0


def tell(figures: dict[str, Any], prefix: str, name: str, found: dict[str, float]) -> None:
  """Adds what was measured to the figures, and says it in a line."""
  figures |= {f"{prefix}{key}": value for key, value in found.items()}
  say(f"{name:<20}{messages.in_words(found)}")


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.strip())
    return
  cli.run(look, joins=True)
