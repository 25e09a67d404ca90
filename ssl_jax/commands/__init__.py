"""The commands of `python -m ssl_jax`."""

import argparse
import pathlib
import sys
from typing import Never

from ssl_jax.errors import UserError


class Parser(argparse.ArgumentParser):
  """Tells a mistake in one line: status 2 for one in the words of the command, 1 for any other."""

  def error(self, message: str) -> Never:
    self.tell(message)
    sys.exit(2)

  def tell(self, message: str) -> int:
    print(f"{self.prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 1


def at_least_one(text: str) -> int:
  """The type of an argument that is a whole number from 1 on."""
  if not text.isdecimal() or int(text) < 1:
    raise argparse.ArgumentTypeError(f"must be a whole number, at least 1, got {text!r}")
  return int(text)


def check_writable(flag: str, path: pathlib.Path) -> None:
  """Raises UserError unless a file can be written there: before the work that would be lost."""
  existed = path.exists()
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.open("a").close()
    if not existed:
      path.unlink()
  except OSError as error:
    raise UserError(f"{flag}: {path} cannot be written: {error.strerror}.") from error
