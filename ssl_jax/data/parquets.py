"""Parquet files of images as Hugging Face stores them: their columns, their classes' names, their rows."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from ssl_jax.data.dataset import in_short
from ssl_jax.data.labels import NAMES, as_label, in_a_line
from ssl_jax.errors import UserError


class File(NamedTuple):
  """What the footer of a parquet file says.

  Attributes:
    path: the file.
    rows: how many it has.
    image, label: the names of their columns; no label: None.
    others: the other columns, first those that are called as labels are and are none, with their types.
    names: of the classes, as `datasets` wrote them; empty: not said, or labels are names themselves.
    damaged: whether what `datasets` wrote cannot be understood.
  """

  path: pathlib.Path
  rows: int
  image: str
  label: str | None
  others: list[str]
  names: list[str]
  damaged: bool

  def in_a_line(self) -> str:
    there = f"only {in_short(self.others)}" if self.others else "and no other one"
    why = f"there is no column of numbers or names called {' or '.join(NAMES)}, {there}"
    return in_a_line(f"column {self.image}", f"column {self.label}" if self.label else "", self.others, why)


def read_footer(path: pathlib.Path) -> File:
  """Raises UserError for a file that cannot be read or has no column of images."""
  import pyarrow as pa

  file = _open(path)
  schema = file.schema_arrow
  images = [field.name for field in schema if _holds_bytes(field.type)]
  if not images:
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise UserError(f"{path} has no column of images, which are bytes or {{bytes, path}}, only {columns}.")
  image = next((name for name in ("image", "img") if name in images), images[0])
  types = {field.name: field.type for field in schema if field.name != image}
  label = next((name for name in NAMES if name in types and _holds_labels(types[name])), None)
  odd = [f"{name} ({kind})" for name, kind in types.items() if name in NAMES and not _holds_labels(kind)]
  others = odd + [name for name, kind in types.items() if name != label and (name not in NAMES or _holds_labels(kind))]
  numbers = label is not None and (pa.types.is_integer(types[label]) or pa.types.is_floating(types[label]))
  names, damaged = _class_names(schema, label) if numbers else ([], False)
  return File(path, file.metadata.num_rows, image, label, others, names, damaged)


def _open(path):
  import pyarrow as pa
  import pyarrow.parquet as pq

  try:
    return pq.ParquetFile(path)
  except (pa.ArrowException, OSError) as error:
    reason = str(error).splitlines()[0]
    raise UserError(f"{path} is damaged, or no parquet file ({reason}): get it again.") from error


def _holds_bytes(kind):
  import pyarrow as pa

  if pa.types.is_struct(kind):
    return kind.get_field_index("bytes") >= 0
  return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _holds_labels(kind):
  import pyarrow as pa

  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)
  return is_number or pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind)


def _class_names(schema, label) -> tuple[list[str], bool]:
  """(the names that `datasets` wrote of a column's classes, whether its text cannot be understood)."""
  try:
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    names = (about.get("info", {}).get("features", {}).get(label) or {}).get("names") or []
  except (ValueError, AttributeError):
    return [], True
  if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
    return [], True
  return names, False


def common_names(files: list[File]) -> list[str]:
  """The classes' names of all files: the longest list, of which the others are a part, in whatever order.

  Raises:
    UserError: a file has a class that the longest list lacks, or another order of names that are not all different.
  """
  longest = max(files, key=lambda file: len(file.names))
  known = set(longest.names)
  for file in files:
    lacking = [name for name in file.names if name not in known]
    if lacking or (file.names != longest.names and len(set(file.names)) < len(file.names)):
      raise UserError(
        f"{file.path} names its classes {in_short(file.names)}, and {longest.path} {in_short(longest.names)}"
        f"{f', without {in_short(lacking)}' if lacking else ''}: give them the same names, or prepare them one by one."
      )
  return longest.names


class Parquets:
  """The rows of the parquet files of a split.

  Args:
    files: which have to agree in the columns of images and labels, or UserError.
    names: of the classes, see `common_names`.
  """

  def __init__(self, files: list[File], names: list[str]):
    for file in files:
      if (file.image, file.label) != (files[0].image, files[0].label):
        raise UserError(
          f"the files of a split have to agree in their columns: {files[0].path} has {files[0].in_a_line()}; "
          f"{file.path} has {file.in_a_line()}."
        )
    self.files, self.names = files, names
    number = {name: i for i, name in enumerate(names)}
    self.numbers = {file.path: [number[name] for name in file.names or names] for file in files}

  def notes(self) -> list[str]:
    files = self.files
    found = {
      "files whose Hugging Face metadata cannot be understood": [file for file in files if file.damaged],
      "files without names of classes, with numbers that are taken for those of the others": [
        file for file in files if self.names and file.label and not file.names
      ],
      "files whose classes are in another order, and numbered anew by their names": [
        file for file in files if file.names != self.names[: len(file.names)]
      ],
    }
    told = [f"{what}: {len(some):,} ({some[0].path.name})" for what, some in found.items() if some]
    return [files[0].in_a_line(), *told]

  def labels(self) -> Iterator[tuple[str, int | str | None]]:
    """Yields (name, label) of all rows."""
    for file in self.files:
      rows = _rows(file.path, 0, [file.label]) if file.label is not None else ({} for _ in range(file.rows))
      for i, row in enumerate(rows):
        yield f"{file.path.name}/{i}", self.label(file, row)

  def label(self, file: File, row: dict[str, Any]) -> int | str | None:
    if file.label is None:
      return None
    label = as_label(row[file.label], f"{file.path}: the column {file.label}")
    numbers = self.numbers[file.path]
    if not numbers or not isinstance(label, int) or label < 0:
      return label
    if label >= len(numbers):
      raise UserError(f"{file.path}: there is the label {label}, where its metadata names {len(numbers)} classes.")
    return numbers[label]

  def rows(self, start: int) -> Iterator[tuple[str, bytes | None, int | str | None]]:
    """Yields (name, the image's bytes or None, its label or None) of all rows from number `start` on."""
    first = 0
    for file in self.files:
      skipped = max(0, start - first)
      if skipped < file.rows:
        wanted = [file.image] if file.label is None else [file.image, file.label]
        for i, row in enumerate(_rows(file.path, skipped, wanted), skipped):
          held = row[file.image]
          image = held["bytes"] if isinstance(held, dict) else held
          given = held.get("path") if isinstance(held, dict) else None
          yield f"{file.path.name}/{given or i}", image, self.label(file, row)
      first += file.rows


def _rows(path: pathlib.Path, start: int, columns: list[str]) -> Iterator[dict[str, Any]]:
  """The rows of a file from `start` on, read by row groups, of which the first ones are skipped unread."""
  import pyarrow as pa

  file, first = _open(path), 0
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
