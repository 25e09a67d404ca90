"""Finds images that are in a set more than once, by the features that `embed` wrote: a table and a picture.

  python -m ssl_jax duplicates photographs.npz --workdir=runs/dino --out=found

writes found/duplicates.csv (group, image, similarity: to the nearest other) and found/duplicates.png, of pairs that are
only just near enough. How near is enough is measured with this encoder on these images: {sample} of them are altered as
copies are, and what 95 % of these reach with their original is enough. See docs/embeddings.md.

{flags}
  --out=DIR            the folder to write to
  --reach=0.95         the share of altered copies that reach it: less is stricter
  --folder=DIR         where the images are, if they are no longer where they were
"""

import io
import json
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import PIL.Image
from absl import flags

from ssl_jax import parallel
from ssl_jax.commands import encoders
from ssl_jax.commands.neighbours import draw, take_file, write_table
from ssl_jax.data import look
from ssl_jax.data.crop import centre_crop, crop_box
from ssl_jax.data.image import ImageError, read_image
from ssl_jax.data.memory import Cut
from ssl_jax.data.resize import resized_crop
from ssl_jax.errors import UserError
from ssl_jax.evaluation import embeddings, neighbours
from ssl_jax.evaluation.embeddings import Embeddings
from ssl_jax.random_streams import ALTERED
from ssl_jax.run import cli, cluster
from ssl_jax.run.cli import say

SAMPLE = 512  # images that are altered
_STRANGER = 3  # each image's third nearest is taken for another image; the first two may be copies
_DRAWN = 8
_UNCHANGED = 0.999  # the least cosine of an image's features with what was embedded: other devices and bfloat16 round


class Threshold(NamedTuple):
  """From which similarity on two images count as one.

  Attributes:
    least: the similarity.
    copies: float [s], of altered copies with their originals.
    strangers: float [s], of images with their third nearest.
  """

  least: float
  copies: np.ndarray
  strangers: np.ndarray


def run(
  path: pathlib.Path, source: encoders.Source, out: pathlib.Path, folder: str | None, reach: float, batch_size: int
) -> int:
  """Finds duplicates. Returns the exit status."""
  found = embeddings.read(path)
  facts = json.loads(json.dumps(source.facts()))
  if differ := [key for key in ("weights", "view", "shape", "channels") if found.about.get(key) != facts[key]]:
    raise UserError(f"{path} is not by {source.name}: {', '.join(differ)} differ. Give the encoder that it is by.")
  if len(found.names) < 2:
    raise UserError(f"{path} holds one image, which has no duplicates.")
  encoders.tell_changes(found, folder)
  threshold = measure(found, source, encoders.reader_of(found, folder), reach, batch_size)
  reached = float(np.mean(threshold.copies >= threshold.least))
  for name, x in (("altered copies", threshold.copies), ("third nearest images", threshold.strangers)):
    say(f"{name} of {len(x):,} images: similarity {_ends(x)} for the middle 90 %, {np.median(x):.4f} in the middle")
  say(f"duplicates are from {threshold.least:.4f} on, which {100 * reached:.1f} % of the altered copies reach")
  if reached < reach - 0.01:
    say("note: other images come as near as altered copies do, so that only what is nearer than these counts")

  mesh = parallel.make_mesh()
  groups, highest = neighbours.similar_groups(found.features, threshold.least, mesh)
  rows = np.flatnonzero(np.isfinite(highest))
  rows = rows[np.argsort(groups[rows], kind="stable")]
  number = {group: i for i, group in enumerate(dict.fromkeys(groups[rows].tolist()), 1)}
  table = out / "duplicates.csv"
  lines = ((number[int(groups[i])], found.names[int(i)], f"{highest[i]:.6f}") for i in rows)
  write_table(table, ("group", "image", "similarity"), lines)
  say(f"wrote {table}: {len(rows):,} of {len(found.names):,} images in {len(number):,} groups")
  if len(rows):
    drawn = rows[np.argsort(highest[rows], kind="stable")]
    _, first = np.unique(groups[drawn], return_index=True)  # one of each group
    drawn = drawn[np.sort(first)][:_DRAWN]
    _, _, nearest = next(neighbours.nearest(found.features, found.features[drawn], 1, mesh, drawn))
    cells = [[(found, int(i)), (found, int(j[0]))] for i, j in zip(drawn, nearest, strict=True)]
    title = f"just near enough\nin {path.name}"
    draw(out / "duplicates.png", cells, ["image", "duplicate"], title, folder)
  figures = {"images": len(found.names), "groups": len(number), "superfluous": len(rows) - len(number)}
  say(json.dumps({**figures, "threshold": threshold.least, "altered_reach": reached}))
  return 0


def measure(
  found: Embeddings, source: encoders.Source, read: Callable[[int], np.ndarray], reach: float, batch_size: int
) -> Threshold:
  """Measures from which similarity on two images count as one.

  It is what a share `reach` of altered copies reach with their original, but at least as far above the middle of
  strangers, in degrees, as the farthest 1 % of these are below it. Their upper half, which may hold duplicates, is not
  looked at.

  Args:
    found: the embeddings.
    source: the encoder that they are by.
    read: row -> uint8 [H, W, C].
    reach: in (0, 1).
    batch_size: of images encoded at once.

  Raises:
    UserError: the images are not those that were embedded, or none of them can be read.
  """
  altered_ones, unaltered, kept, lost = [], [], [], []
  for i in np.unique(np.arange(SAMPLE) * len(found.names) // SAMPLE):
    try:
      pixels = read(int(i))
      unaltered.append(centre_crop(pixels, source.view))
      altered_ones.append(centre_crop(altered(pixels, np.random.default_rng((int(i), 0, 0, 0, ALTERED))), source.view))
      kept.append(i)
    except ImageError as error:
      lost.append(f"{found.names[i]}: {error}")
  if not kept:
    raise UserError(f"none of the images can be read ({lost[-1]}): --folder=DIR says where they are.")
  images = np.stack([*altered_ones, *unaltered])
  seen = Cut(images=images, labels=np.full(len(images), -1, np.int32), num_classes=0, name="copies", split="")
  of_copies, of_images = np.split(_unit(source.extractor(batch_size).all(source.variables, seen).features), 2)
  originals = _unit(found.features[kept])
  apart = np.sum(np.square(of_images - originals), axis=1) > 2 - 2 * _UNCHANGED  # features that are all zero are not
  changed = [found.names[i] for i in np.array(kept)[apart]]
  if differ := [*changed, *lost]:
    raise UserError(
      f"the images are not those that were embedded: {len(differ):,} of {len(kept) + len(lost):,} that were looked at "
      f"differ, such as {differ[0]}. Run embed again, or give the folder that was embedded as --folder=DIR."
    )
  same = np.sum(of_copies * originals, axis=1)
  search = neighbours.nearest(found.features, originals, _STRANGER, parallel.make_mesh(), np.array(kept))
  strangers = np.concatenate([values[:, -1] for _, values, _ in search])
  angles = np.arccos(np.clip(strangers, -1, 1))
  nearest = max(0.0, 2 * np.median(angles) - np.quantile(angles, 0.99))
  least = max(np.quantile(same, 1 - reach, method="lower"), np.cos(nearest))
  return Threshold(float(least) - 1e-6, same, strangers)  # less what rounding makes of equal images


def altered(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """An image as its copies are: 90 to 100 % of its area, half to all of its sides, other brightness and contrast, JPEG.

  Args:
    pixels: uint8 [H, W, C]; of other than 1 or 3 channels no JPEG is made.
    rng: what is drawn from.
  """
  height, width, channels = pixels.shape
  box = crop_box(rng, (height, width), (0.9, 1.0), (0.97 * width / height, width / height / 0.97))
  scale = rng.uniform(0.5, 1)
  size = max(1, round(box[2] * scale)), max(1, round(box[3] * scale))
  small, values = resized_crop(pixels, box, size, "bilinear"), np.arange(256)
  contrast, brightness = rng.uniform(0.9, 1.1, 2)
  mean = look.levels(small).sum(axis=0) @ values / small.size
  changed = np.clip(np.round(((values - mean) * contrast + mean) * brightness), 0, 255).astype(np.uint8)
  for rows in look.strips(small):
    rows[:] = changed[rows]
  quality = int(rng.integers(50, 96))
  if channels not in (1, 3):
    return small
  file = io.BytesIO()
  PIL.Image.fromarray(small if channels == 3 else small[..., 0]).save(file, "jpeg", quality=quality)
  return read_image(file.getvalue(), channels)


def _ends(x):
  return " to ".join(f"{value:.4f}" for value in np.quantile(x, (0.05, 0.95)))


def _unit(x):
  return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.format(flags=encoders.FLAGS, sample=SAMPLE).strip())
    return
  file = take_file()
  load, batch_size = encoders.define_flags()
  out = flags.DEFINE_string("out", None, "the folder to write to")
  reach = flags.DEFINE_float("reach", 0.95, "the share of altered copies that count as duplicates")
  folder = flags.DEFINE_string("folder", None, "where the images are")

  def start():
    if not file or not out.value:
      raise UserError("give embeddings, an encoder and a folder: duplicates E.npz --workdir=RUN --out=found")
    if not 0 < reach.value < 1:
      raise UserError(f"--reach must be a number between 0 and 1, got {reach.value}.")
    found = pathlib.Path(os.path.expanduser(out.value))
    with cluster.ending_together(orderly=UserError, folder=found):
      return run(pathlib.Path(file), load(), found, folder.value, reach.value, batch_size.value)

  cli.run(start)
