"""Flax linen modules: stateless, variables in and out."""

import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models import resnet

ENCODERS: dict[str, Callable[..., nn.Module]] = {
  "resnet": resnet.ResNet,
  "resnet18": resnet.resnet18,
  "resnet34": resnet.resnet34,
  "resnet50": resnet.resnet50,
  "resnet101": resnet.resnet101,
  "resnet152": resnet.resnet152,
}


def make(config: Any, **settings: Any) -> nn.Module:
  """Builds the encoder that `config.encoder` names, with its arguments over the method's `settings`.

  Raises:
    UserError: the name or an argument does not exist.
  """
  arguments = dict(config)
  name = arguments.pop("name")
  if name not in ENCODERS:
    near = difflib.get_close_matches(name, ENCODERS, 1, 0)[0]
    raise UserError(f"encoder.name={name!r} does not exist; did you mean {near!r}? Known: {', '.join(ENCODERS)}.")
  try:
    return ENCODERS[name](**{**settings, **arguments})
  except TypeError as error:
    raise UserError(f"encoder {name}: {error}.") from error
