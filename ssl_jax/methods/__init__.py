"""One file per paper's algorithm; `base.py` documents their common interface."""

import difflib
import importlib
import pkgutil
from types import ModuleType

from ssl_jax.errors import UserError


def names() -> list[str]:
  """The methods that a recipe may name."""
  return [module.name for module in pkgutil.iter_modules(__path__) if module.name != "base"]


def find(name: str) -> ModuleType:
  """The module of the method `name`: see `base.FromConfig` and `base.MakeEncoder`.

  It may have a table SETTINGS of the keys of its section, which are checked then (`ssl_jax.settings`).

  Raises:
    UserError: there is no such method.
  """
  if name not in names():
    near = difflib.get_close_matches(name, names(), 1, 0.0)[0]
    raise UserError(f"method.name={name!r} does not exist; did you mean {near!r}? Known: {', '.join(names())}.")
  return importlib.import_module(f"{__name__}.{name}")
