"""Reads every image of a folder and says what training will find.

  python -m ssl_jax check DIR [--channels=3] [--threads=N] [--report=skipped.txt] [--strict]

Prints how many images there are, of which sizes, which cannot be read and why, which files are left out by their names,
and the mean and standard deviation of each channel, for a recipe's `mean` and `std`. With --strict the exit status is 1
if any image cannot be read.
"""

import argparse
import collections
import concurrent.futures
import dataclasses
import pathlib
import sys
import time

import numpy as np

from ssl_jax import advise
from ssl_jax.commands import Parser, at_least_one, check_writable
from ssl_jax.data import look
from ssl_jax.data.dataset import in_short, in_words, usable_cores
from ssl_jax.data.folder import EXTENSIONS, Files, find_files, is_image
from ssl_jax.data.image import ImageError, channel_count, read_image
from ssl_jax.data.turns import taking_turns
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, whole

FEW = 32  # levels of 256 below which an image is told


def examine(files: Files, i: int) -> tuple[str | None, tuple[int, ...], np.ndarray, bool]:
  """What one image is.

  Returns:
    What is wrong or None, the shape, how many pixels of each channel have each of the 256 levels, and whether it has
    colours that become grey.
  """
  try:
    with taking_turns():
      pixels = files.read(i)
      levels = look.levels(pixels)
      loses = files.channels == 1 and channel_count(files.source(i)) == 3
      return None, pixels.shape, levels, loses and not look.is_grey(read_image(files.source(i), 3, files.window))
  except ImageError as error:
    return str(error), (), np.zeros((files.channels, 256), int), False


def main(arguments: list[str] | None = None) -> int:
  parser = Parser(
    prog="python -m ssl_jax check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("folder", type=pathlib.Path)
  parser.add_argument("--channels", type=at_least_one, default=3)
  parser.add_argument("--threads", type=at_least_one, default=usable_cores())
  parser.add_argument("--report", type=pathlib.Path, help="a file for all names and reasons of what cannot be read")
  parser.add_argument("--strict", action="store_true")
  args = parser.parse_args(arguments)
  try:
    if not args.folder.is_dir():
      raise UserError(f"there is no folder {args.folder}")
    if args.report:
      check_writable("--report", args.report)
    return examine_all(args)
  except UserError as error:
    parser.error(str(error))
  except OSError as error:
    return parser.tell(cluster.refusal(error, args.report) or f"{error.filename}: {error.strerror}")


def examine_all(args: argparse.Namespace) -> int:
  """What the command does with its arguments. Returns the exit status."""
  found = find_files(args.folder)
  names = [name for name in found.names if is_image(name)]
  files = Files(str(args.folder), names, args.channels)
  if not len(files):
    raise UserError("; ".join([f"{args.folder} holds no images ({', '.join(EXTENSIONS)})", *found.notes]))

  files = dataclasses.replace(files, window=files.measured())
  bad: dict[str, str] = {}
  sizes: collections.Counter = collections.Counter()
  levels, flat, coloured, start = np.zeros((args.channels, 256), int), [], 0, time.time()
  with concurrent.futures.ThreadPoolExecutor(args.threads) as pool:
    for i, (reason, shape, of_image, has_colours) in enumerate(
      pool.map(lambda i: examine(files, i), range(len(files)))
    ):
      if reason is None:
        sizes[shape[1::-1]] += 1
        levels += of_image
        coloured += has_colours
        if np.count_nonzero(of_image.any(axis=0)) < FEW:
          flat.append(files.name(i))
      else:
        bad[files.name(i)] = reason
      if sys.stderr.isatty() and (i + 1) % 50 == 0:
        rate = (i + 1) / (time.time() - start)
        left = (len(files) - i - 1) / rate
        print(f"\r{i + 1:,} of {len(files):,}, {rate:,.0f} a second, {left:.0f} s left ", end="", file=sys.stderr)
  if sys.stderr.isatty():
    print(file=sys.stderr)

  print(f"{len(files):,} image{'s' if len(files) > 1 else ''}, {len(bad):,} skipped{':' if bad else ''}")
  kinds = {name: reason.partition(" (")[0] for name, reason in bad.items()}  # without counts of bytes
  for reason, count in collections.Counter(kinds.values()).most_common():
    names = [name for name, why in kinds.items() if why == reason]
    print(f"  {count:,} {reason}: {', '.join(names[:3])}{', ...' if count > 3 else ''}")
  if len(bad) > 3 and not args.report:
    print("  --report=FILE writes all names and reasons")
  others = collections.Counter(
    pathlib.Path(name).suffix.lower() or "no ending" for name in found.names if not is_image(name)
  )
  if others:
    common = ", ".join(f"{ending} ({count:,})" for ending, count in others.most_common(5))
    print(f"left out by their names: {common}{', ...' if len(others) > 5 else ''}")
  lost = advise.on_colours(args.channels, coloured, sizes.total())
  for note in (*found.notes, *in_words(None, files.window), *lost):
    print(note)
  if flat:
    wide = "" if files.window is None else "; a narrower data.window may tell more of them apart"
    print(f"{len(flat):,} with fewer than {FEW} levels, such as {in_short(flat)}{wide}")
  if sizes:
    common = ", ".join(f"{w}x{h} ({count:,})" for (w, h), count in sizes.most_common(5))
    many = f"{len(sizes):,} size{'s' if len(sizes) > 1 else ''}"
    print(f"{many}, width x height: {common}{', ...' if len(sizes) > 5 else ''}")
    if len(sizes) > 1:
      least, most = (pick(sizes, key=lambda size: size[0] * size[1]) for pick in (min, max))
      print(f"the smallest is {least[0]}x{least[1]}, the largest {most[0]}x{most[1]}")
    values, pixels = np.arange(256) / 255, levels[0].sum()
    mean = levels @ values / pixels
    std = np.sqrt(np.maximum(levels @ values**2 / pixels - mean**2, 0))
    shown = [", ".join(f"{x:.4f}" for x in values) for values in (mean, std)]
    print(f"mean ({shown[0]}), std ({shown[1]}), in [0, 1]")
  if args.report:
    whole.text(args.report, "".join(f"{name}\t{reason}\n" for name, reason in sorted(bad.items())))
    print(f"wrote {args.report}")
  return 1 if not sizes or (args.strict and bad) else 0
