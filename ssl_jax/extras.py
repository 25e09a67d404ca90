"""Imports modules of ours that may need more than the core dependencies; says which extra brings what is missing."""

import importlib
import importlib.util
from types import ModuleType


class MissingPackage(ModuleNotFoundError):
  """A package is not installed that one of the extras of pyproject.toml brings."""


def load(module: str, wanted: str, extra: str) -> ModuleType:
  """Imports `ssl_jax.{module}`, in which `wanted` is: a public name, or a command.

  Raises:
    MissingPackage: it imports a package that is not installed; one line with the package and the extra that brings it.
  """
  try:
    return importlib.import_module(f"ssl_jax.{module}")
  except ModuleNotFoundError as error:
    package = (error.name or "").partition(".")[0]
    if not package or importlib.util.find_spec(package):  # it is there, and lacks a part: a traceback tells more
      raise
    told = f'{wanted} needs {package}, which is not installed: pip install "ssl_jax[{extra}]"'
    raise MissingPackage(told, name=error.name, path=error.path) from None
