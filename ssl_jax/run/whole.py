"""Files that are there whole or not at all: a kill, or a full disk, leaves what was there before."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from ssl_jax.errors import UserError

_UNFINISHED = ".unfinished"


@contextlib.contextmanager
def file(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields the name of a file beside `path` to write, which takes its place at the end; deleted on any exception.

  An OSError names `path`: that of a full disk names no file.
  """
  scratch = path.with_name(f"{path.name}.tmp")
  try:
    yield scratch
    os.replace(scratch, path)
  except BaseException as error:
    with contextlib.suppress(OSError):
      scratch.unlink()
    if isinstance(error, OSError) and error.filename in (None, str(scratch), scratch):
      error.filename, error.filename2 = str(path), None
    raise


def text(path: pathlib.Path, content: str) -> None:
  """Writes a file of text, as UTF-8."""
  with file(path) as scratch:
    scratch.write_text(content, encoding="utf-8")


@contextlib.contextmanager
def folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """Yields a folder to fill, whose files are moved to `path` at the end; deleted on any exception.

  It is within `path`, which may be a disk of its own, and what a kill has left there is replaced.

  Raises:
    UserError: `path` is not new or empty.
  """
  work = path / _UNFINISHED
  if path.exists() and any(x != work for x in path.iterdir()):
    raise UserError(f"{path} is not empty: take another --out.")
  shutil.rmtree(work, ignore_errors=True)
  work.mkdir(parents=True)
  try:
    yield work
    for made in sorted(work.iterdir()):
      made.rename(path / made.name)
  finally:
    shutil.rmtree(work, ignore_errors=True)
