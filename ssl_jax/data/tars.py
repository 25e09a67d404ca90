"""Tar files: their members, one by one, and their samples as WebDataset writes them."""

import contextlib
import functools
import json
import pathlib
import re
import tarfile
from collections.abc import Callable, Iterator
from typing import Any

from ssl_jax.data.dataset import in_short
from ssl_jax.data.folder import EXTENSIONS
from ssl_jax.data.labels import NAMES, as_label, in_a_line
from ssl_jax.errors import UserError


def members(path: pathlib.Path, file: Any = None) -> Iterator[tuple[Any, Any]]:
  """Yields (tar, member) for the files of a tar file, or of `file`, a tar file inside it.

  What follows the zeros at a tar's end is read as one more tar, as `cat` joins them.

  Raises:
    UserError: it is no tar file, or it is damaged or ends before the block of zeros that every whole one ends with.
  """
  last = "its beginning"
  try:
    with tarfile.open(path if file is None else None, "r:", fileobj=file) as tar:
      handle: Any = tar.fileobj
      more = True
      while more:
        while (member := tar.next()) is not None:
          tar.members = []  # type: ignore[attr-defined]  # TarFile keeps every member that it has read.
          last = member.name
          if member.isfile():
            yield tar, member
        handle.seek(tar.offset)
        block = handle.read(tarfile.BLOCKSIZE)
        if block != bytes(tarfile.BLOCKSIZE):  # TarFile takes any block that is not a header for the end.
          state = "ends early" if len(block) < tarfile.BLOCKSIZE else "is damaged"
          raise UserError(f"{path} {state}, after {last}: copy or download it again.")
        more = _skip_zeros(tar, handle)
        tar.pax_headers = {}  # They hold for one tar.
  except tarfile.TarError as error:
    raise UserError(f"{path} is damaged, or no tar file ({error}): copy or download it again.") from error


def _skip_zeros(tar, handle):
  """Moves a tar to its next block that is not of zeros. Returns whether there is one."""
  tar.offset += tarfile.BLOCKSIZE
  while read := handle.read(128 * tarfile.BLOCKSIZE):
    zeros = len(read) - len(read.lstrip(b"\0"))
    tar.offset += zeros // tarfile.BLOCKSIZE * tarfile.BLOCKSIZE
    if zeros < len(read):
      return True
  return False


def content(path: pathlib.Path, tar: Any, member: Any) -> bytes:
  """The bytes of a member of the tar file `path`. Raises UserError where they end early."""
  try:
    return tar.extractfile(member).read()
  except Exception as error:  # tarfile can raise any exception on damaged bytes
    raise UserError(f"{path} ends within {member.name} ({error}): copy or download it again.") from error


class Tars:
  """The samples of the tar files of a split."""

  def __init__(self, paths: list[pathlib.Path]):
    self.paths = paths
    self.found: dict[str, tuple[int, str]] = {}  # what `labels` found to tell of: how often, and where first
    self.kinds: dict[str, None] = {}  # of files, in the order in which `labels` found them
    self.sources: dict[str, None] = {}  # of labels
    self.keys: dict[str, None] = {}  # of JSONs

  def labels(self) -> Iterator[tuple[str, int | str | None]]:
    """Yields (name, label) of all samples, but the ones that have neither an image nor a label."""
    for path in self.paths:
      for name, files in self.samples(path, lambda i, kind: kind in ("cls", "json")):
        where = f"{path.name}/{name}"
        images, (label, source) = [kind for kind in files if _is_image(kind)], _label(f"{path}/{name}", files)
        self.look(where, files, images, label, source)
        if images or label is not None:
          yield where, label

  def look(self, where, files, images, label, source) -> None:
    """Keeps what is to be told of a sample."""
    self.kinds |= dict.fromkeys(files)
    self.sources |= {source: None} if source else {}
    for kind in images[1:]:
      self.note("images left out, beside the first one of a sample", f"{where}.{kind}")
    if not images:
      self.note("samples without an image", where)
    with contextlib.suppress(UserError):  # a JSON that is not needed
      held = _json(where, files)
      self.keys |= dict.fromkeys(held)
      if "cls" not in files:
        for key in NAMES:
          if not _is_scalar(held.get(key)):
            kind = type(held[key]).__name__
            self.note(f'"{key}" of .json passed over, where it is a {kind} and no number or name', where)
      else:  # A name says nothing of a number.
        other, _ = _json_label(where, files)
        if type(other) is type(label) and other not in (None, label):
          self.note("labels of .cls taken where .json has another", f"{where}: {label}, {other}")

  def note(self, what: str, where: str) -> None:
    count, first = self.found.get(what, (0, where))
    self.found[what] = count + 1, first

  def notes(self) -> list[str]:
    """What `labels` found, in words."""
    images = in_short([f".{kind}" for kind in self.kinds if _is_image(kind)])
    sources = " and ".join(self.sources)
    others = [f".{kind}" for kind in self.kinds if not _is_image(kind) and f".{kind}" not in sources]
    others = [kind for kind in others if kind != ".json" or not self.keys]
    others += [f'"{key}" of .json' for key in self.keys if f'"{key}"' not in sources]
    has = f"there is no .cls, and no .json with {' or '.join(NAMES)}" + (f", only {in_short(others)}" if others else "")
    line = in_a_line(images or "none", sources, others, has)
    return [line, *(f"{what}: {count:,} ({first})" for what, (count, first) in self.found.items())]

  def rows(self, start: int) -> Iterator[tuple[str, bytes | None, int | str | None]]:
    """Yields (name, the image's bytes or None, its label or None) of all samples from number `start` on."""
    for path in self.paths:
      count = 0
      for count, (name, files) in enumerate(self.samples(path, functools.partial(_from, start)), 1):
        if count > start:
          image = next((held for kind, held in files.items() if _is_image(kind)), None)
          yield f"{path.name}/{name}", image, _label(f"{path}/{name}", files)[0]
      start = max(0, start - count)

  def samples(self, path: pathlib.Path, wanted: Callable[[int, str], bool]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Yields (name, {kind: content}) of a tar's samples; where not `wanted(number, kind)`, b"" without a read.

    A sample ends where another name follows, or a kind of file that it has already.
    """
    current: str | None = None
    files: dict[str, bytes] = {}
    i = 0
    for tar, member in members(path):
      folder, _, last = member.name.rpartition("/")
      if last.startswith("."):
        continue
      stem, _, kind = last.partition(".")
      name, kind = f"{folder}/{stem}" if folder else stem, kind.lower()
      if current is not None and (name != current or kind in files):
        yield current, files
        files, i = {}, i + 1
      current = name
      files[kind] = content(path, tar, member) if wanted(i, kind) else b""
    if current is not None:
      yield current, files


def _from(start, i, kind):
  del kind
  return i >= start


def _is_image(kind):
  return f".{kind}".endswith(EXTENSIONS)


def _is_scalar(value):
  return not isinstance(value, list | dict)


def _label(where, files) -> tuple[int | str | None, str]:
  """(a sample's label, what it was taken from)."""
  if "cls" not in files:
    return _json_label(where, files)
  try:
    text = files["cls"].decode().strip()
  except UnicodeDecodeError as error:
    raise UserError(f"{where}.cls is no text in UTF-8 ({error}).") from error
  number = re.fullmatch(r"(-?\d{1,18})(\.0*)?", text)
  return int(number[1]) if number else text or None, ".cls"


def _json_label(where, files) -> tuple[int | str | None, str]:
  held = _json(where, files)
  keys = [key for key in NAMES if key in held and _is_scalar(held[key])]
  if not keys:
    return None, ""
  key = next((key for key in keys if held[key] is not None), keys[0])
  return as_label(held[key], f'{where}: "{key}" of its .json'), f'"{key}" of .json'


def _json(where, files) -> dict[str, Any]:
  if not files.get("json"):
    return {}
  try:
    held = json.loads(files["json"])
  except ValueError as error:
    raise UserError(f"{where}: a sample's JSON is damaged ({error}).") from error
  return held if isinstance(held, dict) else {}
