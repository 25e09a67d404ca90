"""Writes the features of a folder of images, or of a split of a run's data set, with the images' names.

  python -m ssl_jax embed --workdir=runs/dino --folder=photographs --out=photographs.npz
  python -m ssl_jax embed --workdir=runs/dino --split=test --out=test.parquet
  python -m ssl_jax embed --weights=exported/dino --folder=photographs --out=photographs.npz

All devices compute, on several hosts too, and memory holds a few batches. A killed job goes on by the same command, and
the file is the same bit for bit; other images, weights or views under the same name are refused. See
docs/embeddings.md.

{flags}
  --folder=DIR         all images in it; --split=NAME: of its folder NAME
  --split=NAME         without --folder: a split of the run's own data
  --out=E.npz          or E.parquet, which needs pyarrow
"""

import json
import os
import pathlib
import sys
import time

import numpy as np
from absl import flags

from ssl_jax.commands import encoders
from ssl_jax.data.dataset import in_short
from ssl_jax.errors import UserError
from ssl_jax.evaluation import embeddings
from ssl_jax.evaluation.features import Features
from ssl_jax.run import cli, cluster
from ssl_jax.run.cli import say


def run(source: encoders.Source, folder: str | None, split: str | None, out: pathlib.Path, batch_size: int) -> int:
  """Embeds. Returns the exit status."""
  embeddings.check_format(out)
  extractor = source.extractor(batch_size)
  dataset, place = encoders.images_of(source, folder, split)
  about = source.facts() | {"images": dataset.contents(), "window": dataset.window, "batch_size": extractor.batch_size}
  images = embeddings.Images(len(dataset), dataset.image_name, dataset.num_classes > 0, dataset.classes)
  cluster.check_alike({key: json.dumps(value) for key, value in about.items()})
  say(f"{source.name}: {len(dataset):,} images of {dataset.name}")
  for note in dataset.notes:
    say(note)
  started, begun = time.perf_counter(), [-1]

  def compute(start):
    begun[0] = start
    if start:
      say(f"going on at image {start:,}")
    rest = dataset.take(range(start, len(dataset))) if start else dataset
    for batch in extractor.batches(source.variables, rest):
      yield Features(batch.features, batch.labels, batch.indices + start)

  def progress(done):
    rate = (done - begun[0]) / (time.perf_counter() - started)
    say(f"{done:,} of {len(dataset):,} images, {rate:,.0f} a second, {(len(dataset) - done) / rate:,.0f} s left")

  new = embeddings.write(out, images, about | {"data": place}, extractor.batch_size, compute, progress)
  if not cluster.is_main():
    return 0
  found = embeddings.read(out)
  unread = np.setdiff1d(np.arange(len(dataset)), found.indices)
  if len(unread):
    say(f"{len(unread):,} cannot be read and are left out, such as {in_short([dataset.image_name(i) for i in unread])}")
  shape = "x".join(f"{n:,}" for n in found.features.shape)
  say(f"{'wrote' if new else 'already there, nothing changed:'} {out}: features {shape}")
  return 0


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.format(flags=encoders.FLAGS).strip())
    return
  load, batch_size = encoders.define_flags()
  folder = flags.DEFINE_string("folder", None, "a folder of images")
  split = flags.DEFINE_string("split", None, "a split of the folder's, or of the run's data")
  out = flags.DEFINE_string("out", None, "the file to write")

  def start():
    if not out.value:
      raise UserError("give a file to write: --out=E.npz, or E.parquet.")
    path = pathlib.Path(os.path.expanduser(out.value))
    embeddings.check_format(path)
    with cluster.ending_together(orderly=UserError, folder=path.parent):
      return run(load(), folder.value, split.value, path, batch_size.value)

  cli.run(start, joins=True)
