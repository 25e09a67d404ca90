"""Finds the most similar images, by the features that `embed` wrote: a table and a picture.

  python -m ssl_jax neighbours photographs.npz --out=found
  python -m ssl_jax neighbours photographs.npz --of=beach/12.jpg --k=20 --out=found
  python -m ssl_jax neighbours photographs.npz --of=others.npz --out=found

writes found/neighbours.csv (query, rank, neighbour, similarity: the cosine) and found/neighbours.png, of the first of
some queries. An image is not its own neighbour. See docs/embeddings.md.

  --of=NAME            of one image, by its name in the file or the end of it; or of all images of another file of
                       embeddings by the same encoder; by default of all images
  --out=DIR            the folder to write to
  --k=10               how many neighbours
  --folder=DIR         where the images are, if they are no longer where they were
"""

import csv
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from absl import flags

from ssl_jax import parallel
from ssl_jax.commands import check_writable, encoders
from ssl_jax.data.image import ImageError
from ssl_jax.errors import UserError
from ssl_jax.evaluation import embeddings, neighbours
from ssl_jax.evaluation.embeddings import Embeddings
from ssl_jax.run import cli, cluster, plots, whole
from ssl_jax.run.cli import say

_DRAWN, _SHOWN, _SIDE = 6, 8, 256  # rows and neighbours in the picture, pixels of one
_SAME = ("weights", "view", "shape", "channels")  # what features that are compared must have in common


def run(path: pathlib.Path, of: str | None, out: pathlib.Path, k: int, folder: str | None) -> int:
  """Finds neighbours. Returns the exit status."""
  bank = embeddings.read(path)
  queries, rows = queries_of(bank, of)
  itself = rows if queries is bank else None
  if len(bank.names) - (itself is not None) < 1:
    raise UserError(f"{path} holds one image, which has no neighbours.")
  for embedded in (bank,) if queries is bank else (bank, queries):
    encoders.tell_changes(embedded, folder)
  features = queries.features if len(rows) == len(queries.names) else queries.features[rows]
  table, mesh = out / "neighbours.csv", parallel.make_mesh()
  drawn = np.unique(np.arange(_DRAWN) * len(rows) // _DRAWN)
  found: dict[int, list[int]] = {}

  def lines():
    for first, values, nearest in neighbours.nearest(bank.features, features, k, mesh, itself):
      for i, (similarity, row) in enumerate(zip(values, nearest, strict=True), first):
        if i in drawn:
          found[i] = row.tolist()
        for rank, (value, neighbour) in enumerate(zip(similarity, row, strict=True), 1):
          yield queries.names[rows[i]], rank, bank.names[neighbour], f"{value:.6f}"
      if len(rows) > neighbours.QUERIES:
        say(f"{first + len(values):,} of {len(rows):,} images")

  if k > (fewer := len(bank.names) - (itself is not None)):
    say(f"note: --k={k:,}, and there are {fewer:,} other images")
  write_table(table, ("query", "rank", "neighbour", "similarity"), lines())
  say(f"wrote {table}: the nearest of {len(bank.names):,} images for {len(rows):,}")
  cells = [[(queries, int(rows[i])), *((bank, row) for row in found[i][:_SHOWN])] for i in drawn]
  headings = ["image", *(f"nearest {rank}" for rank in range(1, len(cells[0])))]
  draw(out / "neighbours.png", cells, headings, f"nearest images in {path.name}", folder)
  return 0


def queries_of(bank: Embeddings, of: str | None) -> tuple[Embeddings, np.ndarray]:
  """The embeddings, and rows of them, that `--of` names."""
  if of is None:
    return bank, np.arange(len(bank.names))
  if pathlib.Path(of).suffix in embeddings.FORMATS:
    others = embeddings.read(of)
    differ = [key for key in _SAME if bank.about.get(key) != others.about.get(key)]
    if differ or bank.features.shape[1] != others.features.shape[1]:
      texts = ", ".join(differ) or "their width"
      raise UserError(f"--of: {of} is not by the same encoder ({texts} differ), and its features cannot be compared.")
    return others, np.arange(len(others.names))
  names = np.asarray(bank.names)
  rows = np.flatnonzero(names == of)
  if not len(rows):
    rows = np.flatnonzero(np.char.endswith(names, f"/{of}"))
  if len(rows) != 1:
    what = f"{len(rows):,} images are called so, such as {', '.join(names[rows[:3]])}" if len(rows) else "no image is"
    raise UserError(f"--of: {what}, got {of}. An image that is not in the file has to be embedded first.")
  return bank, rows


def write_table(path: pathlib.Path, head: Sequence[str], lines: Any) -> None:
  """Writes a CSV file line by line; it is there when it is whole."""
  check_writable("--out", path)
  with whole.file(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    writer.writerow(head)
    writer.writerows(lines)


def draw(
  path: pathlib.Path, cells: list[list[tuple[Embeddings, int]]], headings: list[str], title: str, folder: str | None
) -> None:
  """Draws rows of images, each (embeddings, row) of `cells`, or says why not."""
  readers: dict[int, Callable] = {}
  lost = []

  def picture(found, row):
    try:
      reader = readers.setdefault(id(found), encoders.reader_of(found, folder))
      pixels = reader(row)
    except (ImageError, UserError) as error:
      lost.append(f"{found.names[row]}: {error}")
      return np.ones((8, 8, 3))
    stride = -(-max(pixels.shape) // _SIDE)
    return pixels[::stride, ::stride] / 255

  width = len(headings)
  filled = [[picture(*row[j]) if j < len(row) else np.ones((8, 8, 3)) for row in cells] for j in range(width)]
  if len(lost) == sum(map(len, cells)):
    say(f"no picture: the images cannot be read ({lost[0]}); --folder=DIR says where they are")
    return
  plots.draw_grid(path, list(zip(headings, filled, strict=True)), title)
  say(f"wrote {path}" + (f"; {len(lost)} images cannot be read, such as {lost[0]}" if lost else ""))


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.strip())
    return
  file = take_file()
  of = flags.DEFINE_string("of", None, "a name in the file, or another file; by default all images")
  out = flags.DEFINE_string("out", None, "the folder to write to")
  k = flags.DEFINE_integer("k", 10, "how many neighbours", lower_bound=1)
  folder = flags.DEFINE_string("folder", None, "where the images are")

  def start():
    if not file or not out.value:
      raise UserError("give embeddings and a folder: neighbours E.npz --out=found")
    found = pathlib.Path(os.path.expanduser(out.value))
    with cluster.ending_together(orderly=UserError, folder=found):
      return run(pathlib.Path(file), of.value, found, k.value, folder.value)

  cli.run(start)


def take_file() -> str | None:
  """Takes the first word that is no flag out of the command's arguments."""
  for i, argument in enumerate(sys.argv[1:], 1):
    if not argument.startswith("-"):
      return sys.argv.pop(i)
  return None
