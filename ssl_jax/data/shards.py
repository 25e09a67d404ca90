"""Image data sets as they are shared: tar shards of WebDataset, and parquet files as Hugging Face stores them.

A tar holds an image's files one after the other, named alike up to the first dot: `0001.jpg` and `0001.cls`, a class as
a number or a name, or `0001.json` with a "label". A parquet file has a column of images, {"bytes", "path"} or the bytes
alone, and maybe one of labels. Nothing is unpacked to disk, and one image is in memory, or one row group of a parquet
file's column.
"""

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ssl_jax.data.folder import EXTENSIONS
from ssl_jax.data.sources import Item, Source, check_image, members
from ssl_jax.errors import UserError

_LABELS = ("label", "labels", "fine_label", "class", "cls")  # columns, and keys of a JSON
_SPLIT = re.compile(r"(?:^|[-_.])(train|val|valid|validation|test)(?:[-_.]|$)")
_PART = re.compile(r"(\d+)-of-(\d+)")


def shards_source(folder: pathlib.Path) -> Source:
  """The tar or parquet files of a folder and the folders in it, in the order of their paths.

  Splits are named by what stands in a file's name or in its folder's: `train-00000-of-00002.parquet`, `val/0001.tar`.
  Files that name none are "train". Classes that are numbers keep them; names are numbered in the order of their bytes;
  a parquet file written by `datasets` says both. The notes count a sample's images beside its first one, labels that
  disagree, and samples without a label where others have one.

  Raises:
    UserError: no folder, no such files or both kinds, files missing by the names of the others, a file that cannot be
      read or ends early, no column of images, or labels of different kinds.
  """
  if not folder.is_dir():
    raise UserError(f"there is no folder {folder}: name the folder that holds the tar or parquet files.")
  paths = sorted((path for path in folder.rglob("*") if path.suffix in (".tar", ".parquet")), key=os.fsencode)
  kinds = {path.suffix for path in paths}
  if len(kinds) != 1:
    found = "both .tar and .parquet files" if kinds else "no .tar or .parquet files"
    raise UserError(f"{folder} holds {found}: name a folder of one kind; compressed tars have to be unpacked before.")
  _check_parts(folder, paths)
  by_split: dict[str, list[pathlib.Path]] = {}
  for path in paths:
    by_split.setdefault(_split_of(path.relative_to(folder)), []).append(path)

  kind: Any = _Tars if kinds == {".tar"} else _Parquets
  readers = {split: kind(tuple(listed)) for split, listed in sorted(by_split.items(), key=_train_first)}
  names = next((names for reader in readers.values() if (names := reader.class_names())), None)
  by_sample = {split: list(reader.labels()) for split, reader in readers.items()}
  held = [label for label in itertools.chain(*by_sample.values()) if label is not None]
  number, classes = _numbered(folder, held, names)

  def read(split: str, start: int) -> Iterator[Item]:
    for name, image, label in readers[split].rows(start):
      at = number(label)
      yield Item(name, None, at, "no image") if image is None else check_image(name, image, at)

  notes = [f"{split}: {note}" for split, reader in readers.items() for note in reader.notes()]
  for split, labels in by_sample.items():
    without = sum(number(label) == -1 for label in labels)
    if classes and without:
      notes.append(f"{split}: samples without a label: {without:,} of {len(labels):,}")
  crc = zlib.crc32("".join(f"{path.relative_to(folder)}\0{path.stat().st_size}\0" for path in paths).encode())
  splits: dict[str, Callable[[int], Iterator[Item]]] = {s: functools.partial(read, s) for s in readers}
  description = f"The images of {len(paths)} {kinds.pop()[1:]} files of the folder {folder.name}."
  return Source(splits, classes, f"{len(paths)} files, {crc:08x}", description, notes=tuple(notes))


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


def _numbered(folder, held, names) -> tuple[Callable[[Any], int], list[str]]:
  """(label -> its class's number, -1 for none; the classes' names)."""
  if not held:
    return lambda label: -1, []
  if all(isinstance(label, int) for label in held):
    most = max(held)
    if most >= 100_000:
      raise UserError(f"{folder}: labels go up to {most:,}, so they are no classes' numbers.")
    classes = names if names and len(names) > most else [str(i) for i in range(most + 1)]
    return lambda label: -1 if label is None or label < 0 else label, classes
  if not all(isinstance(label, str) for label in held):
    raise UserError(f"{folder}: some labels are numbers and some are names: they have to be of one kind.")
  classes = sorted(set(held), key=str.encode)
  number = {name: i for i, name in enumerate(classes)}
  return lambda label: -1 if label is None else number[label], classes


class _Tars:
  """The samples of tar files: (name, the image's bytes or None, its label or None)."""

  def __init__(self, paths: tuple[pathlib.Path, ...]):
    self.paths = paths
    self.found: dict[str, tuple[int, str]] = {}  # what `labels` found to tell of: how often, and where first

  def class_names(self) -> list[str]:
    return []

  def labels(self) -> Iterator[int | str | None]:
    """Those of all samples, but the ones that have neither an image nor a label."""
    for path in self.paths:
      for name, files in self.samples(path, lambda i, kind: not _is_image(kind)):
        images, label = [kind for kind in files if _is_image(kind)], _label(path, files)
        for kind in images[1:]:
          self.note("images left out, beside the first one of a sample", f"{path.name}/{name}.{kind}")
        if "cls" in files and (other := _other_label(path, files, label)) is not None:
          self.note("labels of .cls taken where .json has another", f"{path.name}/{name}: {label}, {other}")
        if images or label is not None:
          yield label

  def notes(self) -> list[str]:
    """What `labels` found, in words."""
    return [f"{what}: {count:,} ({first})" for what, (count, first) in self.found.items()]

  def note(self, what: str, where: str) -> None:
    count, first = self.found.get(what, (0, where))
    self.found[what] = count + 1, first

  def rows(self, start: int) -> Iterator[tuple[str, bytes | None, int | str | None]]:
    for path in self.paths:
      count = 0
      for count, (name, files) in enumerate(self.samples(path, functools.partial(_from, start)), 1):
        if count > start:
          image = next((content for kind, content in files.items() if _is_image(kind)), None)
          yield f"{path.name}/{name}", image, _label(path, files)
      start = max(0, start - count)

  def samples(self, path: pathlib.Path, wanted: Callable[[int, str], bool]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (name, {kind: content}) of a tar's samples; where not `wanted(number, kind)`, b"" without a read."""
    current: str | None = None
    files: dict[str, bytes] = {}
    i = 0
    for tar, member in members(path):
      folder, _, last = member.name.rpartition("/")
      if last.startswith("."):
        continue
      stem, _, kind = last.partition(".")
      name = f"{folder}/{stem}" if folder else stem
      if name != current and current is not None:
        yield current, files
        files, i = {}, i + 1
      current = name
      files[kind.lower()] = _content(path, tar, member) if wanted(i, kind.lower()) else b""
    if current is not None:
      yield current, files


def _from(start, i, kind):
  del kind
  return i >= start


def _is_image(kind):
  return f".{kind}".endswith(EXTENSIONS)


def _content(path, tar, member):
  try:
    return tar.extractfile(member).read()
  except Exception as error:  # tarfile can raise any exception on damaged bytes
    raise UserError(f"{path} ends within {member.name} ({error}): copy or download it again.") from error


def _label(path, files) -> int | str | None:
  if "cls" in files:
    text = files["cls"].decode("utf-8", "replace").strip()
    return int(text) if re.fullmatch(r"-?\d+", text) else text or None
  return _json_label(path, files)


def _json_label(path, files):
  if files.get("json"):
    try:
      content = json.loads(files["json"])
    except ValueError as error:
      raise UserError(f"{path}: a sample's JSON is damaged ({error}).") from error
    return next((_plain(content[key]) for key in _LABELS if isinstance(content, dict) and key in content), None)
  return None


def _other_label(path, files, label):
  """The label of a sample's JSON where it is not `label`, the one of its .cls; a name says nothing of a number."""
  with contextlib.suppress(UserError):  # a JSON that is not needed
    other = _json_label(path, files)
    return other if type(other) is type(label) and other != label else None


def _plain(label):
  return label if isinstance(label, int | str) and not isinstance(label, bool) else None


class _Parquets:
  """The rows of parquet files: (name, the image's bytes or None, its label or None)."""

  def __init__(self, paths: tuple[pathlib.Path, ...]):
    self.paths = paths
    self.image, self.label, self.info = self.columns()

  def columns(self) -> tuple[str, str | None, dict[str, Any]]:
    """The names of the columns of images and labels, and what `datasets` wrote of its features."""
    import pyarrow as pa

    schema = self.open(self.paths[0]).schema_arrow
    info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})

    def holds_bytes(field):
      kind = field.type
      if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0
      return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)

    images = [field.name for field in schema if holds_bytes(field)]
    if not images:
      raise UserError(f"{self.paths[0]} has no column of images, only {', '.join(schema.names)}.")
    image = next((name for name in ("image", "img") if name in images), images[0])
    return image, next((name for name in _LABELS if name in schema.names), None), info

  def open(self, path: pathlib.Path) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
      return pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
      reason = str(error).splitlines()[0]
      raise UserError(f"{path} is damaged, or no parquet file ({reason}): get it again.") from error

  def class_names(self) -> list[str]:
    about = self.info.get(self.label or "") or {}
    return [str(name) for name in about.get("names") or []]

  def notes(self) -> list[str]:
    return []

  def labels(self) -> Iterable[int | str | None]:
    for path in self.paths:
      if self.label is None:
        yield from itertools.repeat(None, self.open(path).metadata.num_rows)
        continue
      for row in self.groups(path, 0, [self.label]):
        yield _plain(row[self.label])

  def rows(self, start: int) -> Iterator[tuple[str, bytes | None, int | str | None]]:
    first = 0
    for path in self.paths:
      count = self.open(path).metadata.num_rows
      skipped = max(0, start - first)
      if skipped < count:
        wanted = [self.image] if self.label is None else [self.image, self.label]
        for i, row in enumerate(self.groups(path, skipped, wanted), skipped):
          held = row[self.image]
          image = held["bytes"] if isinstance(held, dict) else held
          given = held.get("path") if isinstance(held, dict) else None
          yield f"{path.name}/{given or i}", image, None if self.label is None else _plain(row[self.label])
      first += count

  def groups(self, path: pathlib.Path, start: int, columns: list[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file from `start` on, read by row groups, of which the first ones are skipped unread."""
    import pyarrow as pa

    file, first = self.open(path), 0
    for group in range(file.num_row_groups):
      count = file.metadata.row_group(group).num_rows
      if first + count > start:
        try:
          for batch in file.iter_batches(16, row_groups=[group], columns=columns):
            kept = batch.slice(max(0, min(len(batch), start - first)))
            yield from kept.to_pylist()
            first += len(batch)
        except (pa.ArrowException, OSError) as error:
          raise UserError(f"{path} is damaged ({str(error).splitlines()[0]}): get it again.") from error
      else:
        first += count
