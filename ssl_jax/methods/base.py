"""The contract of a method: pure functions, in the order in which a training step calls them."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

AXIS = "batch"  # the mapped axis of the training step, over which the global batch is split


class Aux(NamedTuple):
  """What a loss hands on, by how it is combined over microbatches and devices.

  Attributes:
    metrics: scalars by name, averaged. "loss" is the paper's loss.
    averages: pytree, averaged: batch statistics.
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
    separable: whether the loss of a batch is a mean over its examples, so that chunks may be summed.
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
