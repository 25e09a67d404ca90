"""Flax linen modules: stateless, variables in and out."""

import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ssl_jax.errors import UserError, check_arguments
from ssl_jax.models import heads as heads
from ssl_jax.models import resnet as resnet
from ssl_jax.models import vit as vit

ENCODERS: dict[str, Callable[..., nn.Module]] = {
  "resnet": resnet.ResNet,
  "resnet18": resnet.resnet18,
  "resnet34": resnet.resnet34,
  "resnet50": resnet.resnet50,
  "resnet101": resnet.resnet101,
  "resnet152": resnet.resnet152,
  "vit": vit.ViT,
  "vit_tiny": vit.vit_tiny,
  "vit_small": vit.vit_small,
  "vit_base": vit.vit_base,
  "vit_large": vit.vit_large,
  "vit_huge": vit.vit_huge,
}


def make(
  encoder: Any,
  *,
  method: str,
  image_size: int,
  dtype: Any,
  axis_name: str | None = None,
  resnet: dict[str, Any] | None = None,
  vit: dict[str, Any] | None = None,
) -> nn.Module:
  """Builds the encoder that a recipe's `encoder` section names; its arguments there come before the method's.

  Args:
    encoder: the section.
    method: the name of the method, for errors.
    image_size: of the first view, for a ViT's positions.
    dtype: of the computation.
    axis_name: for batch norm.
    resnet, vit: what the method sets for this family; None: the method does not take it.

  Raises:
    UserError: the name or an argument does not exist, or the method does not take this encoder.
  """
  arguments = dict(encoder)
  name = arguments.pop("name")
  if name not in ENCODERS:
    near = difflib.get_close_matches(name, ENCODERS, 1, 0)[0]
    raise UserError(f"encoder.name={name!r} does not exist; did you mean {near!r}? Known: {', '.join(ENCODERS)}.")
  settings: dict[str, Any] = dict(dtype=dtype)
  if name.startswith("resnet"):
    family, settings["axis_name"] = resnet, axis_name
  else:
    family, settings["image_size"] = vit, image_size
  if family is None:
    raise UserError(f"method {method} does not take the encoder {name!r}.")
  check_arguments("encoder", arguments, ENCODERS[name])
  return ENCODERS[name](**{**settings, **family, **arguments})
