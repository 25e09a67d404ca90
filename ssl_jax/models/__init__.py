"""Flax linen modules: stateless, variables in and out."""

import difflib
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from ssl_jax.errors import UserError
from ssl_jax.models import heads as heads
from ssl_jax.models import resnet as resnet
from ssl_jax.models import vit as vit
from ssl_jax.settings import Setting, each, flag, number, one_of, optional, positive, text, whole

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


# The keys of a recipe's section `encoder`, by the family that its name begins with.
SETTINGS: dict[str, dict[str, Setting]] = {
  "resnet": dict(
    name=text(required=True),
    stages=each(whole()),
    bottleneck=flag(),
    width=positive(),
    stem=one_of("imagenet", "small", "patch"),
    features=one_of("pooled", "flat"),
    project_first=flag(),
    bn_group_size=optional(whole()),
  ),
  "vit": dict(
    name=text(required=True),
    patch_size=whole(required=True),
    dim=whole(),
    depth=whole(),
    heads=whole(),
    mlp_ratio=positive(),
    image_size=whole(),
    positions=one_of("learned", "row_first", "column_first"),
    resize=one_of("offset", "antialiased"),
    registers=whole(0),
    layer_scale=optional(positive()),
    ffn=one_of("mlp", "swiglu"),
    drop_path=number(0, 1, ends="[)"),
    init_std=positive(),
    features=one_of("cls", "mean", "flat", "pooled"),
    recompute=flag(),
  ),
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
    TypeError: an argument does not exist; a recipe's keys are checked before (`config.check_values`).
    UserError: the name does not exist, or the method does not take this encoder.
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
  return ENCODERS[name](**{**settings, **family, **arguments})
