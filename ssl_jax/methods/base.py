"""The contract of a method: pure functions, in the order in which a training step calls them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

AXIS = "batch"  # the mapped axis of the training step, over which the global batch is split


class Aux(NamedTuple):
  """What a loss hands on, by how it is combined over microbatches and devices.

  Attributes:
    metrics: scalars by name, averaged. "loss" is the paper's loss.
    averages: pytree, averaged: batch statistics. "marginal" [K], where there is one, is the mean distribution over
      prototypes, whose entropy is a collapse monitor.
    examples: pytree of [b, ...] arrays, concatenated. "embedding" [b, v, d], of one or two views of each example and of
      any norm, feeds the collapse monitors.
  """

  metrics: dict[str, jax.Array]
  averages: Any = ()
  examples: Any = ()


class Init(Protocol):
  def __call__(self, key: jax.Array, views: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Creates (params, state); params["encoder"] is the backbone, in every method.

    `views` is what the step gets: one float32 [v, b, h, w, c] array a resolution; one example is enough.
    """
    ...


class Loss(Protocol):
  def __call__(
    self, params: Any, state: Any, views: tuple[jax.Array, ...], keys: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, Aux]:
    """Returns (scalar to minimise, Aux). Pure; gradients flow to `params` only.

    `keys` are typed random keys [b], one an example; `step` is the int32 number of the step, for schedules.
    """
    ...


class Update(Protocol):
  def __call__(self, params: Any, state: Any, aux: Aux, step: jax.Array) -> Any:
    """Returns the next state, from the parameters after the optimizer's step and the combined Aux."""
    ...


class Encoder(Protocol):
  def __call__(self, params: Any, state: Any) -> dict[str, Any]:
    """Returns the variables that evaluation, export and pictures take: {"params": ..., "batch_stats": ...}."""
    ...


class Pictures(Protocol):
  def __call__(self, params: Any, state: Any, images: jax.Array, keys: jax.Array) -> Any:
    """Shows what the method does to `images`, float [n, h, w, c] as the encoder's, with one key an image.

    Returns a NamedTuple whose fields are drawn side by side under their names: [n, h, w, c] like the images, or a tuple
    of maps [n, h, w] of any scale, each drawn as heat over the first field.
    """
    ...


class Method(NamedTuple):
  """A self-supervised method, as its constructor returns it.

  Attributes:
    init, loss, update, encoder: see their protocols.
    separable: whether the loss of a batch is a mean over its examples, so that the training step may take the gradient
      of one microbatch after the other. Where it is not, the method encodes by microbatches itself (`in_chunks`).
    chance: value of metrics["loss"] for uninformative outputs at a given global batch size.
    pictures: see its protocol; None where there is nothing to see.
  """

  init: Init
  loss: Loss
  update: Update
  encoder: Encoder
  separable: bool
  chance: Callable[[int], float]
  pictures: Pictures | None = None


def in_chunks(
  encode: Callable[[jax.Array], tuple[Any, Any]], views: jax.Array, microbatch: int | None, axis_name: str | None
) -> tuple[Any, Any]:
  """Encodes all images, but `microbatch` of the global batch at a time, so that a loss sees the whole batch exactly.

  Chunks are encoded one after the other and again in the backward pass: only one chunk's activations exist at once.
  Batch norm normalises within a chunk, and the running statistics average the chunks'.

  Args:
    encode: views [v, m, h, w, c] -> (outputs, averages): pytrees of [v, m, ...] and of what is averaged.
    views: float [v, b, h, w, c] of this device.
    microbatch: a multiple of the number of devices; None: all at once.
    axis_name: mapped axis over which the batch is split.

  Returns:
    (outputs [v, b, ...], averages).
  """
  if microbatch is None:
    return encode(views)
  m = microbatch // (lax.axis_size(axis_name) if axis_name else 1)
  outputs, averages = lax.map(jax.checkpoint(encode), rearrange(views, "v (n m) h w c -> n v m h w c", m=m))
  outputs = jax.tree.map(lambda x: rearrange(x, "n v m ... -> v (n m) ..."), outputs)
  return outputs, jax.tree.map(lambda x: jnp.mean(x, axis=0), averages)
