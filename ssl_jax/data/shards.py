"""Image data sets as they are shared: tar shards of WebDataset, and parquet files as Hugging Face stores them.

A tar holds an image's files one after the other, named alike up to the first dot: `0001.jpg` and `0001.cls`, a class as
a number or a name, or `0001.json` with a "label". A parquet file has a column of images, {"bytes", "path"} or the bytes
alone, and maybe one of labels. Nothing is unpacked to disk, and one image is in memory, or one row group of a parquet
file's column.
"""

import functools
import itertools
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterator

from ssl_jax.data.dataset import in_short
from ssl_jax.data.labels import is_missing, numbered
from ssl_jax.data.parquets import Parquets, common_names, read_footer
from ssl_jax.data.sources import Item, Source, check_image
from ssl_jax.data.tars import Tars
from ssl_jax.errors import UserError

_SPLIT = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?:[-_.]|$)")
_PART = re.compile(r"(\d+)-of-(\d+)")


def shards_source(folder: pathlib.Path) -> Source:
  """The tar or parquet files of a folder and the folders in it, in the order of their paths.

  Splits are named by what stands in a file's name or in its folder's: `train-00000-of-00002.parquet`, `val/0001.tar`.
  Files that name none are "train". Classes that are numbers keep them; names are numbered in the order of their bytes;
  a parquet file written by `datasets` says both. The notes tell what images and labels were taken from, and count files
  of other kinds, a sample's images beside its first one, labels that disagree, and samples without an image or a label.

  Raises:
    UserError: no folder, no such files or both kinds, files missing by the names of the others, a file that cannot be
      read or ends early, no column of images, files of a split with other columns than their first one, files that
      name other classes, or labels that are of different kinds or no classes.
  """
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}: name the folder that holds the tar or parquet files.")
  found = sorted((path for path in folder.rglob("*") if not path.is_dir()), key=os.fsencode)
  paths = [path for path in found if _kind(path) in (".tar", ".parquet")]
  kinds = {_kind(path) for path in paths}
  if len(kinds) != 1:
    held = "both .tar and .parquet files" if kinds else "no .tar or .parquet files"
    raise UserError(f"{folder} holds {held}: name a folder of one kind; compressed tars have to be unpacked before.")
  _check_parts(folder, paths)
  by_split: dict[str, list[pathlib.Path]] = {}
  for path in paths:
    by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)

  readers, names = _readers(dict(sorted(by_split.items(), key=_train_first)))
  labels: dict[str, list[int | str | None]] = {}
  others = [path.name for path in found if _kind(path) not in kinds and not _is_hidden(path.relative_to(folder))]
  notes = [f"left out: {len(others):,} of other kinds ({in_short(others)})"] if others else []
  for split, reader in readers.items():
    labels[split], first = [], ""
    for where, label in reader.labels():
      labels[split].append(label)
      first = first or (where if is_missing(label) else "")
    notes += [f"{split}: {note}" for note in reader.notes()]
    if without := sum(map(is_missing, labels[split])):
      notes.append(f"{split}: samples without a label: {without:,} of {len(labels[split]):,} ({first})")
  number, classes = numbered(folder, (x for x in itertools.chain(*labels.values()) if x is not None), names)

  def read(split: str, start: int) -> Iterator[Item]:
    for name, image, label in readers[split].rows(start):
      at = number(label)
      yield Item(name, None, at, "no image") if image is None else check_image(name, image, at)

  crc = zlib.crc32("".join(f"{path.relative_to(folder)}\0{path.stat().st_size}\0" for path in paths).encode())
  for of_split in labels.values():
    crc = zlib.crc32(repr([number(label) for label in of_split]).encode(), crc)
  splits: dict[str, Callable[[int], Iterator[Item]]] = {s: functools.partial(read, s) for s in readers}
  description = f"The images of {len(paths)} {kinds.pop()[1:]} files of the folder {folder.name}."
  return Source(splits, classes, f"{len(paths)} files, {crc:08x}", description, notes=tuple(notes))


def _readers(by_split: dict[str, list[pathlib.Path]]) -> tuple[dict[str, Tars | Parquets], list[str]]:
  """(what reads each split, the classes' names where the files say them)."""
  if _kind(next(iter(by_split.values()))[0]) == ".tar":
    return {split: Tars(paths) for split, paths in by_split.items()}, []
  files = {split: [read_footer(path) for path in paths] for split, paths in by_split.items()}
  names = common_names(list(itertools.chain(*files.values())))
  return {split: Parquets(found, names) for split, found in files.items()}, names


def _kind(path):
  return path.suffix.lower()


def _is_hidden(path):
  return any(part.startswith(".") for part in path.parts)


def _check_parts(folder, paths):
  """Refuses a folder in which some of the files `train-00000-of-00005.tar` and so on are missing."""
  found: dict[tuple[pathlib.Path, str, str], set[int]] = {}
  for path in paths:
    if match := _PART.search(path.name):  # What follows can be a checksum, another one in each name.
      found.setdefault((path.parent, path.name[: match.start()], match[2]), set()).add(int(match[1]))
  for (parent, prefix, total), numbers in found.items():
    if (missing := int(total) - len(numbers)) > 0:
      files = f"{(parent / f'{prefix}*-of-{total}').relative_to(folder)}{paths[0].suffix}"
      raise UserError(
        f"{folder}: {missing:,} of the {int(total):,} files {files} are missing: put them there, or rename the others "
        f"without -of-{total} to do without."
      )


def _split_of(path):
  for part in (path.stem, *reversed(path.parent.parts)):
    if match := _SPLIT.search(part.lower()):
      return "val" if match[1].startswith("val") else match[1]
  return "train"


def _train_first(item):
  return ("train", "val", "test").index(item[0])
