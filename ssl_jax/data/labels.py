"""Labels of shared data sets: which values are classes, what they are called, and their numbers."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ssl_jax.data.dataset import in_short
from ssl_jax.errors import UserError

NAMES = ("label", "labels", "fine_label", "class", "cls")  # columns of a parquet file, and keys of a JSON
_MOST = 100_000


def as_label(value: Any, where: str) -> int | str | None:
  """A class's number or name; None for null and NaN, which pandas makes of it.

  Whole numbers may be written as floats, which pandas makes of integers beside a null, and False and True are 0 and 1.

  Raises:
    UserError: any other value, at `where`.
  """
  if value is None or isinstance(value, str):
    return value
  if isinstance(value, float) and math.isnan(value):
    return None
  if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
    return int(value)
  raise UserError(f"{where} holds {value!r}, and classes are whole numbers or names: rename it to do without labels.")


def is_missing(label: int | str | None) -> bool:
  """Whether there is no class; `datasets` writes -1 for that."""
  return label is None or (isinstance(label, int) and label < 0)


def numbered(
  where: object, held: Iterable[int | str], names: list[str]
) -> tuple[Callable[[int | str | None], int], list[str]]:
  """Numbers classes: numbers keep themselves, and names are numbered in the order of their bytes.

  Args:
    where: for messages.
    held: all labels.
    names: of the classes, where labels are numbers and something says them.

  Returns:
    (label -> its class's number, -1 for none; the classes' names).

  Raises:
    UserError: labels of both kinds, or numbers that are too large for classes'.
  """
  different = set(held)
  if not different:
    return lambda label: -1, []
  numbers = [label for label in different if isinstance(label, int)]
  if len(numbers) == len(different):
    if (most := max(numbers)) >= _MOST:
      raise UserError(f"{where}: labels go up to {most:,}, so they are no classes' numbers.")
    classes = names or [str(i) for i in range(most + 1)]
    return lambda label: label if isinstance(label, int) and label >= 0 else -1, classes
  if numbers:
    name = min(label for label in different if isinstance(label, str))
    raise UserError(
      f"{where}: some labels are numbers and some are names, such as {numbers[0]} and {name!r}: they have to be of one "
      "kind."
    )
  classes = sorted(map(str, different), key=str.encode)
  number = {name: i for i, name in enumerate(classes)}
  return lambda label: -1 if label is None else number[str(label)], classes


def in_a_line(images: str, label: str, others: Sequence[str], why: str) -> str:
  """Which part of the files the images and the labels come from; `label` is empty where there are none, and `why`."""
  over = f" (others: {in_short(others)})" if others else ""
  return f"images: {images}; " + (f"labels: {label}{over}" if label else f"no labels: {why}")
