"""MoCo: contrast each query with its key, made by a slow copy of the encoder.

Versions 1 and 2 (He et al., 2020, arXiv:1911.05722; Chen et al., 2020, arXiv:2003.04297; facebookresearch/moco) are
`moco`: negatives from a queue of old keys, batch norm in small groups, keys shuffled between them. Version 3 (Chen et
al., 2021, arXiv:2104.02057; facebookresearch/moco-v3) is `moco_v3`: negatives from the batch, a predictor, both
directions. They are two algorithms, so each has its own section.

The official codes move the slow copy just before the keys are made; moving it after the step before is the same.
"""

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from ssl_jax import models, streams
from ssl_jax.errors import UserError
from ssl_jax.losses import info_nce
from ssl_jax.methods.base import AXIS, Aux, Method, in_chunks
from ssl_jax.models.heads import MoCoHead, Network, PredictorNetwork, Projector, unit, view_by_view, without_predictor

# ---- versions 1 and 2


@struct.dataclass
class MoCoState:
  """The key network, both networks' running batch statistics, and the queue.

  `queue` is float32 [K, d], unit rows; `queue_pointer` int32, the row that is written next; `queue_written` int32, how
  many rows hold keys, up to K: the others are still random.
  """

  key_params: Any
  batch_stats: Any
  key_batch_stats: Any
  queue: jax.Array
  queue_pointer: jax.Array
  queue_written: jax.Array


def moco(
  encoder: nn.Module,
  head: nn.Module,
  *,
  queue_size: int,
  temperature: float,
  key_rate: optax.Schedule,
  axis_name: str | None = None,
) -> Method:
  """Builds MoCo v1 or v2. views[0][0] are the queries, views[0][1] the keys.

  Args:
    encoder, head: modules called as `module(x, train=...)`; the encoder's batch norm has a group size.
    queue_size: K, any number.
    temperature: of `info_nce`.
    key_rate: 1 - m per step, the weight of the query network in the key network's average.
    axis_name: mapped axis over which the batch is split.
  """
  network = Network(encoder, head)

  def forward(params, batch_stats, images):
    variables = {"params": params, "batch_stats": batch_stats}
    z, changed = network.apply(variables, images, train=True, mutable=["batch_stats"])
    return z, changed.get("batch_stats", {})

  def init(key, views):
    network_key, queue_key = jax.random.split(key)[0], jax.random.fold_in(key, streams.QUEUE)
    z, variables = network.init_with_output(network_key, views[0][0], train=True)
    params, stats = variables["params"], variables.get("batch_stats", {})
    queue = unit(jax.random.normal(queue_key, (queue_size, z.shape[-1])))
    zero = jnp.int32(0)
    return params, MoCoState(jax.tree.map(jnp.copy, params), stats, stats, queue, zero, zero)

  def loss(params, state, views, keys, step):
    del step
    query_images, key_images = views[0]  # [2, b, h, w, c]
    query, batch_stats = forward(params, state.batch_stats, query_images)
    shuffled, mine = shuffle(keys, key_images, axis_name)
    key, key_stats = forward(state.key_params, state.key_batch_stats, shuffled)
    key = lax.stop_gradient(unit(gather(key, axis_name)[mine]))
    value = info_nce(query, key, state.queue, temperature=temperature, axis_name=axis_name)

    query = unit(lax.stop_gradient(query))
    hardest = jnp.max(query @ state.queue.T, axis=-1)
    metrics = {
      "loss": value,
      "contrastive_top1": 100 * jnp.mean(jnp.sum(query * key, axis=-1) > hardest),
      "queue_filled": state.queue_written / queue_size,  # the loss rises while keys replace random rows
    }
    averages = {"batch_stats": batch_stats, "key_batch_stats": key_stats}
    return value, Aux(metrics, averages, {"key": key, "embedding": jnp.stack([query, key], axis=1)})

  def update(params, state, aux, step):
    key_params = optax.incremental_update(params, state.key_params, key_rate(step + 1))
    keys = aux.examples["key"]  # of the global batch
    first = state.queue_pointer + max(len(keys) - queue_size, 0)
    rows = (first + jnp.arange(min(len(keys), queue_size))) % queue_size
    return state.replace(
      key_params=key_params,
      queue=state.queue.at[rows].set(keys[-queue_size:].astype(jnp.float32)),
      queue_pointer=(state.queue_pointer + len(keys)) % queue_size,
      queue_written=jnp.minimum(state.queue_written + len(keys), queue_size),
      **aux.averages,
    )

  def encoder_variables(params, state):
    return {"params": params["encoder"], "batch_stats": state.batch_stats.get("encoder", {})}

  def chance(batch_size):
    del batch_size
    return math.log(queue_size + 1)

  return Method(init, loss, update, encoder_variables, separable=True, chance=chance)


def shuffle(keys: jax.Array, images: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
  """Deals the images of the global batch out anew, so that a key's batch-norm group is not its query's.

  The order is that of one uniform number an example, so that it does not depend on the number of devices.

  Returns:
    (images [b, ...] to encode here, int [b]: where this device's own examples are found in the gathered results).
  """
  draws = gather(jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, streams.SHUFFLE)))(keys), axis_name)
  order = jnp.argsort(draws)
  first = lax.axis_index(axis_name) * len(images) if axis_name else 0
  here = first + jnp.arange(len(images))
  return gather(images, axis_name)[order[here]], jnp.argsort(order)[here]


def gather(x, axis_name):
  return lax.all_gather(x, axis_name, tiled=True) if axis_name else x


# ---- version 3


@struct.dataclass
class MoCoV3State:
  """The momentum network (encoder and projector), and both networks' running batch statistics; float32."""

  momentum_params: Any
  batch_stats: Any
  momentum_batch_stats: Any


def moco_v3(
  encoder: nn.Module,
  projector: nn.Module,
  predictor: nn.Module,
  *,
  temperature: float,
  momentum_rate: optax.Schedule,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds MoCo v3.

  Args:
    encoder, projector, predictor: modules called as `module(x, train=...)`.
    temperature: T of `info_nce`; each direction's loss is multiplied by 2 T, as in the official code.
    momentum_rate: 1 - m per step.
    axis_name: mapped axis over which the batch is split; the keys of all devices are the negatives.
    microbatch: see `in_chunks`.
  """
  network = PredictorNetwork(encoder, projector, predictor)

  def init(key, views):
    variables = network.init(key, views[0][0], train=True)
    params, stats = variables["params"], variables.get("batch_stats", {})
    momentum_params = jax.tree.map(jnp.copy, without_predictor(params))
    return params, MoCoV3State(momentum_params, stats, without_predictor(stats))

  def loss(params, state, views, keys, step):
    del keys, step
    online = functools.partial(view_by_view, network, params, state.batch_stats, None)
    slow = functools.partial(view_by_view, network, state.momentum_params, state.momentum_batch_stats, "project")
    (projection, prediction), batch_stats = in_chunks(online, views[0], microbatch, axis_name)  # [2, b, h, w, c]
    target, momentum_stats = in_chunks(slow, views[0], microbatch, axis_name)

    def direction(query, key):
      return 2 * temperature * info_nce(query, key, temperature=temperature, axis_name=axis_name)

    value = direction(prediction[0], target[1]) + direction(prediction[1], target[0])
    averages = {"batch_stats": batch_stats, "momentum_batch_stats": momentum_stats}
    embedding = jnp.stack(list(projection), axis=1)
    return value, Aux({"loss": value}, averages, {"embedding": embedding})

  def update(params, state, aux, step):
    rate = momentum_rate(step + 1)
    momentum_params = optax.incremental_update(without_predictor(params), state.momentum_params, rate)
    return state.replace(momentum_params=momentum_params, **aux.averages)

  def encoder_variables(params, state):
    return {"params": params["encoder"], "batch_stats": state.batch_stats.get("encoder", {})}

  def chance(batch_size):
    return 4 * temperature * math.log(batch_size)

  return Method(init, loss, update, encoder_variables, separable=False, chance=chance)


# ---- recipes


def from_config(config: Any, steps: int, steps_per_epoch: int) -> Method:
  """Builds MoCo as a recipe describes it; `config.method.version` is 1, 2 or 3."""
  del steps_per_epoch
  settings = config.method
  sizes = [view["size"] for view in config.views]
  if len(sizes) != 2 or sizes[0] != sizes[1]:
    raise UserError(f"moco takes two views of one size, got sizes {sizes}.")
  dtype = jnp.dtype(config.dtype)
  if settings.version in (1, 2):
    head = MoCoHead(settings.version, settings.get("hidden"), settings.features, dtype)
    return moco(
      make_encoder(config),
      head,
      queue_size=settings.queue_size,
      temperature=settings.temperature,
      key_rate=optax.constant_schedule(1 - settings.momentum),
      axis_name=AXIS,
    )
  if settings.version != 3:
    raise UserError(f"method.version must be 1, 2 or 3, got {settings.version}.")
  # The released ViTs end every MLP in a plain batch norm, the ResNet's predictor in none.
  common = dict(hidden=settings.hidden, features=settings.features, axis_name=AXIS, dtype=dtype)
  is_vit = config.encoder.name.startswith("vit")
  projector = Projector(layers=3 if is_vit else 2, last_norm="plain", kernel_init=models.heads.torch_uniform, **common)
  predictor = Projector(last_norm="plain" if is_vit else None, kernel_init=models.heads.torch_uniform, **common)
  # m(e) = 1 - (1 - m0) (1 + cos(pi e / E)) / 2
  rate = optax.cosine_decay_schedule(1 - settings.momentum, steps)
  return moco_v3(
    make_encoder(config),
    projector,
    predictor,
    temperature=settings.temperature,
    momentum_rate=rate,
    axis_name=AXIS,
    microbatch=config.microbatch,
  )


def make_encoder(config: Any) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  if config.method.version < 3:
    return models.make(config, resnet=dict(bn_group_size=config.method.bn_group_size))
  xavier = nn.initializers.xavier_uniform()
  vit = dict(positions="row_first", kernel_init=xavier, qkv_init=models.vit.qkv_xavier, frozen_patch_embed=True)
  vit |= dict(patch_bias=False, patch_init=models.vit.patch_xavier, token_init=nn.initializers.normal(1e-6))
  return models.make(config, axis_name=AXIS, resnet=dict(last_scale_init=nn.initializers.zeros), vit=vit)
