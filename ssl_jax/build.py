"""From a config to the method and the encoder of a run: methods and models are handed their own sections here."""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from ssl_jax import config as configs
from ssl_jax import methods, models
from ssl_jax.methods.base import AXIS, Context, Method


def context(config: Any, steps: int, steps_per_epoch: int, axis_name: str | None = AXIS) -> Context:
  """What the method of a recipe gets beside its own section."""
  views, dtype = configs.views(config), jnp.dtype(config.dtype)
  settings = dict(method=config.method.name, image_size=views[0].size, dtype=dtype, axis_name=axis_name)
  return Context(
    encoder=functools.partial(models.make, config.encoder, **settings),
    is_vit=config.encoder.name.startswith("vit"),
    views=views,
    channels=config.data.channels,
    steps=steps,
    steps_per_epoch=steps_per_epoch,
    dtype=dtype,
    microbatch=config.microbatch,
    axis_name=axis_name,
  )


def method(config: Any, steps: int, steps_per_epoch: int, axis_name: str | None = AXIS) -> tuple[Method, nn.Module]:
  """The method of a recipe, and its encoder for evaluation."""
  module, given = methods.find(config.method.name), context(config, steps, steps_per_epoch, axis_name)
  return module.from_config(config.method, given), module.make_encoder(config.method, given)
