"""The contract of a method: pure functions, in the order in which a training step calls them."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct
from jax import lax

from ssl_jax.augment import View
from ssl_jax.errors import UserError

AXIS = "batch"  # the mapped axis of the training step, over which the global batch is split


class Monitored(NamedTuple):
  """The inputs of the collapse monitors (`monitors.measure`). They do not affect training.

  Attributes:
    embedding: float [b, v, d], of one or two views of each example and of any norm; concatenated. A large batch is
      subsampled at even spacing (`parallel.combine`).
    marginal: float [K], the mean distribution over prototypes, averaged; None: the method has no prototypes.
  """

  embedding: jax.Array
  marginal: jax.Array | None = None


class Aux(NamedTuple):
  """A loss's auxiliary outputs, grouped by how they are combined over microbatches and devices.

  Attributes:
    metrics: scalars by name, averaged. "loss" is the paper's loss.
    averages: pytree, averaged: batch statistics, DINO's centre.
    examples: pytree of [b, ...] arrays, concatenated: MoCo's keys.
    monitored: see `Monitored`; None: there is nothing to monitor.
  """

  metrics: dict[str, jax.Array]
  averages: Any = ()
  examples: Any = ()
  monitored: Monitored | None = None


class Init(Protocol):
  def __call__(self, key: jax.Array, views: tuple[jax.Array, ...]) -> tuple[Any, Any]:
    """Creates (params, state); params["encoder"] is the backbone, in every method.

    `views` is what the step receives: one float32 [v, b, h, w, c] array per resolution; one example is enough.
    """
    ...


class Loss(Protocol):
  def __call__(
    self, params: Any, state: Any, views: tuple[jax.Array, ...], keys: jax.Array, step: jax.Array
  ) -> tuple[jax.Array, Aux]:
    """Returns (scalar to minimise, Aux). Pure; gradients flow to `params` only.

    `keys` are typed random keys [b], one per example; `step` is the int32 number of the step, for schedules.

    Each device calls it with its part of the batch, under the axis name that `from_config` received. Statistics of the
    global batch are collectives over that axis. Gradients are averaged over the devices by `lax.pmean`, so that a mean
    over examples needs nothing more, and a loss that is already the same on every device has the right gradient too.
    """
    ...


class LabelledLoss(Protocol):
  def __call__(
    self, params: Any, state: Any, views: tuple[jax.Array, ...], keys: jax.Array, step: jax.Array, labels: jax.Array
  ) -> tuple[jax.Array, Aux]:
    """As `Loss`, of a method that takes labels: int32 [b]."""
    ...


class Update(Protocol):
  def __call__(self, params: Any, state: Any, aux: Aux, step: jax.Array) -> Any:
    """Returns the next state, from the parameters after the optimizer's step and the combined Aux."""
    ...


class Encoder(Protocol):
  def __call__(self, params: Any, state: Any) -> dict[str, Any]:
    """Returns the variables that evaluation, export and pictures take: {"params": ..., "batch_stats": ...}."""
    ...


class Classifier(NamedTuple):
  """What a supervised objective classifies with.

  Attributes:
    network: a module, float images [b, h, w, c] -> float32 logits [b, K] as `network.apply(variables, images,
      train=False)`.
    variables: (params, state) -> its variables.
  """

  network: nn.Module
  variables: Encoder


class Pictures(Protocol):
  def __call__(self, params: Any, state: Any, images: jax.Array, keys: jax.Array) -> Any:
    """Visualises what the method does to `images`, float [n, h, w, c] as the encoder takes them; one key per image.

    Returns a NamedTuple whose fields are drawn side by side under their names: [n, h, w, c] like the images; colours,
    uint8 [n, h, w, 3]; or a tuple of maps [n, h, w] of any scale, each drawn as a heat map over the first field.
    """
    ...


class Method(NamedTuple):
  """A self-supervised method, or a supervised objective, as its constructor returns it.

  Attributes:
    init, loss, update, encoder: see their protocols.
    separable: whether the loss of a batch is a mean over its examples, so that the training step may use gradient
      accumulation. Where it is not, the method encodes in microbatches itself (`in_chunks`).
    chance: value of metrics["loss"] for uninformative outputs at a given global batch size; None: there is none.
    pictures: see its protocol; None where there is nothing to draw.
    classifier: of an objective that takes labels; None: the loss sees none.
  """

  init: Init
  loss: Loss | LabelledLoss
  update: Update
  encoder: Encoder
  separable: bool
  chance: Callable[[int], float] | None = None
  pictures: Pictures | None = None
  classifier: Classifier | None = None

  @property
  def takes_labels(self) -> bool:
    return self.classifier is not None


class Context(NamedTuple):
  """What a method's `from_config` receives in addition to its own section of a recipe.

  Attributes:
    encoder: `encoder(resnet=..., vit=...)` builds the recipe's encoder with what the method sets for its family; None
      for a family that the method does not support (`models.make`).
    is_vit: whether that family is the ViT.
    views: the recipe's views.
    batch_size: global.
    channels: of the images.
    seed: of the run, for what is drawn for a whole batch (`augment.batch_key`).
    steps, steps_per_epoch: of the schedules.
    dtype: of the computation.
    microbatch: how many images of the global batch are encoded at once; None: all.
    axis_name: mapped axis over which the batch is split.
  """

  encoder: Callable[..., nn.Module]
  is_vit: bool
  views: Sequence[View]
  batch_size: int
  channels: int
  seed: int
  steps: int
  steps_per_epoch: int
  dtype: Any
  microbatch: int | None = None
  axis_name: str | None = AXIS


class FromConfig(Protocol):
  def __call__(self, settings: Any, context: Context) -> Method:
    """Builds the method from a recipe's `method` section: `from_config` of a method's module, which is found by name.

    Raises:
      UserError: a setting is wrong, or the method does not support the recipe's views or encoder.
    """
    ...


class MakeEncoder(Protocol):
  def __call__(self, settings: Any, context: Context) -> nn.Module:
    """Builds the encoder alone, as training has it, for evaluation: `make_encoder` of a method's module."""
    ...


def check_aux(aux: Any, batch_size: int) -> None:
  """Raises TypeError unless a loss's second output is an Aux as the training step needs it."""
  if not isinstance(aux, Aux):
    raise TypeError(f"a method's loss must return (scalar, Aux), got {type(aux).__name__} in place of the Aux.")
  shapes = {name: jnp.shape(x) for name, x in aux.metrics.items()}
  if "loss" not in shapes or any(shapes.values()):
    raise TypeError(f'Aux.metrics must be scalars with "loss" among them, got {shapes}.')
  if aux.monitored is not None:
    shape = jnp.shape(aux.monitored.embedding)
    if len(shape) != 3 or shape[0] != batch_size:
      raise TypeError(f"Aux.monitored.embedding must be [b, v, d] with b = {batch_size} examples, got {shape}.")


def check_update(new: Any, old: Any) -> None:
  """Raises TypeError unless a method's update returns a state like the one that it was given."""
  kinds = [jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x).name), state) for state in (new, old)]
  if kinds[0] != kinds[1]:
    raise TypeError(f"a method's update must return a state like the one it was given: {kinds[1]}, got {kinds[0]}.")


def check_two_views(name: str, views: Sequence[View]) -> None:
  """Raises UserError unless a recipe has two views of one size."""
  sizes = [view.size for view in views]
  if len(sizes) != 2 or sizes[0] != sizes[1]:
    raise UserError(f"{name} takes two views of one size, got sizes {sizes}.")


def check_two_images(name: str, batch_size: int) -> None:
  """Raises UserError for a batch of one image: it has no negatives, and batch norm makes it a constant."""
  if batch_size < 2:
    raise UserError(f"{name} needs a batch of at least two images, got batch_size={batch_size}.")


class Momentum(NamedTuple):
  """The momentum m of a momentum encoder's moving average: slow = m slow + (1 - m) fast.

  It is stored as 1 - m, which float32 cannot recover from an m near 1: after 99.8 % of 250,000 steps of a cosine from
  0.996, 1 - m computed from m is 50 % too large.

  Attributes:
    rate: 1 - m per step.
  """

  rate: optax.Schedule


def constant_momentum(m: float) -> Momentum:
  """The same momentum in every step (MoCo v1, v2: He et al., 2020, arXiv:1911.05722, eq. 2).

  Args:
    m: in [0, 1].

  Raises:
    UserError: m is not in [0, 1].
  """
  _check_momentum(m)
  return Momentum(optax.constant_schedule(1 - m))


def cosine_momentum(first: float, steps: int) -> Momentum:
  """m(t) = 1 - (1 - m0) (1 + cos(pi t / T)) / 2, from m0 to 1 (BYOL: Grill et al., 2020, arXiv:2006.07733).

  MoCo v3 and DINO have the same schedule.

  Args:
    first: m0, in [0, 1].
    steps: T, at least 1.

  Raises:
    UserError: m0 is not in [0, 1].
    ValueError: T is below 1.
  """
  _check_momentum(first)
  return Momentum(optax.cosine_decay_schedule(1 - first, steps))  # optax checks T


def _check_momentum(m):
  if not 0 <= m <= 1:  # also true for NaN
    raise UserError(f"a momentum must be in [0, 1], got {m}.")


@struct.dataclass
class OneNetworkState:
  """The state of `one_network`: running batch statistics, {"encoder": ..., "projector": ..., ...}, float32."""

  batch_stats: Any


def one_network(init: Callable, loss: Callable, *, separable: bool, chance: Callable | None = None) -> Method:
  """Builds a method that has one network and nothing beside it: no slow copy, no queue, no centre.

  Args:
    init: (key, views) -> variables of the network, as a module's `init` returns them.
    loss: (params, batch_stats, views, step) -> (scalar to minimise, Aux with the new batch_stats as `averages`).
    separable, chance: see `Method`.
  """

  def init_state(key, views):
    variables = init(key, views)
    return variables["params"], OneNetworkState(variables.get("batch_stats", {}))

  def loss_of_state(params, state, views, keys, step):
    del keys  # no dropout
    return loss(params, state.batch_stats, views, step)

  def update(params, state, aux, step):
    del params, step
    return state.replace(batch_stats=aux.averages)

  def encoder(params, state):
    return of_encoder(params, state.batch_stats)

  return Method(init_state, loss_of_state, update, encoder, separable, chance)


def of_encoder(params: Any, batch_stats: Any) -> dict[str, Any]:
  """The encoder's variables out of a network's parameters and batch statistics."""
  return {"params": params["encoder"], "batch_stats": batch_stats.get("encoder", {})}


def in_chunks(
  encode: Callable[[Any], tuple[Any, Any]], views: Any, microbatch: int | None, axis_name: str | None
) -> tuple[Any, Any]:
  """Encodes all images, `microbatch` of the global batch at a time, for an exact loss of the whole batch (GradCache).

  Chunks are encoded one after the other and again in the backward pass: only one chunk's activations exist at once.
  Batch norm normalises within a chunk, and the running statistics average the chunks'.

  Args:
    encode: views [v, m, h, w, c] -> (outputs, averages): pytrees of [v, m, ...] and of values to average.
    views: float [v, b, h, w, c] of this device, or a pytree of [v, b, ...], such as one array per resolution.
    microbatch: a multiple of the number of devices; None: all at once.
    axis_name: mapped axis over which the batch is split.

  Returns:
    (outputs [v, b, ...], averages).
  """
  if microbatch is None:
    return encode(views)
  m = microbatch // (lax.axis_size(axis_name) if axis_name else 1)
  chunks = jax.tree.map(lambda x: rearrange(x, "v (n m) ... -> n v m ...", m=m), views)
  outputs, averages = lax.map(jax.checkpoint(encode), chunks)
  outputs = jax.tree.map(lambda x: rearrange(x, "n v m ... -> v (n m) ..."), outputs)
  return outputs, jax.tree.map(lambda x: jnp.mean(x, axis=0), averages)
