"""MoCo v1 and v2: contrast each query with its key among a queue of old keys, made by a momentum encoder.

He et al., 2020, arXiv:1911.05722, algorithm 1; Chen et al., 2020, arXiv:2003.04297; official code:
facebookresearch/moco. Batch norm normalises small groups of examples, and keys are shuffled between groups (shuffling
BN). Version 3 is another algorithm: `moco_v3.py`.

The official code updates the momentum encoder just before it computes the keys; updating it at the end of the previous
step, as here, is equivalent.
"""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from ssl_jax import random_streams
from ssl_jax.losses import info_nce
from ssl_jax.methods import moco_v3
from ssl_jax.methods.base import (
  Aux,
  Context,
  Method,
  Momentum,
  Monitored,
  check_two_views,
  constant_momentum,
  of_encoder,
)
from ssl_jax.models.heads import MoCoHead, Network, train_pass, unit
from ssl_jax.settings import number, one_of, size, temperature, text, whole


@struct.dataclass
class MoCoState:
  """The key network (momentum encoder), both networks' running batch statistics, and the queue.

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
  momentum: Momentum,
  axis_name: str | None = None,
) -> Method:
  """Builds MoCo v1 or v2. views[0][0] are the queries, views[0][1] the keys.

  Args:
    encoder, head: modules called as `module(x, train=...)`; the encoder's batch norm has a group size.
    queue_size: K; it need not be a multiple of the batch size.
    temperature: of `info_nce`.
    momentum: m, the weight of the key network in its own average.
    axis_name: mapped axis over which the batch is split.
  """
  network = Network(encoder, head)

  def init(key, views):
    network_key, queue_key = jax.random.split(key)[0], jax.random.fold_in(key, random_streams.QUEUE)
    z, variables = network.init_with_output(network_key, views[0][0], train=True)
    params, stats = variables["params"], variables.get("batch_stats", {})
    queue = unit(jax.random.normal(queue_key, (queue_size, z.shape[-1])))
    zero = jnp.int32(0)
    return params, MoCoState(jax.tree.map(jnp.copy, params), stats, stats, queue, zero, zero)

  def loss(params, state, views, keys, step):
    del step
    query_images, key_images = views[0]  # [2, b, h, w, c]
    query, batch_stats = train_pass(network, params, state.batch_stats, query_images)
    shuffled, mine = shuffle(keys, key_images, axis_name)
    key, key_stats = train_pass(network, state.key_params, state.key_batch_stats, shuffled)
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
    return value, Aux(metrics, averages, examples=key, monitored=Monitored(jnp.stack([query, key], axis=1)))

  def update(params, state, aux, step):
    key_params = optax.incremental_update(params, state.key_params, momentum.rate(step + 1))
    keys = aux.examples  # of the global batch
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
    return of_encoder(params, state.batch_stats)

  def chance(batch_size):
    del batch_size
    return math.log(queue_size + 1)

  return Method(init, loss, update, encoder_variables, separable=True, chance=chance)


def shuffle(keys: jax.Array, images: jax.Array, axis_name: str | None) -> tuple[jax.Array, jax.Array]:
  """Shuffles the images of the global batch (shuffling BN), so that a key's batch-norm group is not its query's.

  Examples are sorted by one uniform number each, so that the order does not depend on the number of devices.

  Returns:
    (images [b, ...] to encode here, int [b]: the indices of this device's own examples in the gathered results).
  """
  draws = gather(
    jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, random_streams.SHUFFLE)))(keys), axis_name
  )
  order = jnp.argsort(draws)
  first = lax.axis_index(axis_name) * len(images) if axis_name else 0
  here = first + jnp.arange(len(images))
  return gather(images, axis_name)[order[here]], jnp.argsort(order)[here]


def gather(x, axis_name):
  return lax.all_gather(x, axis_name, tiled=True) if axis_name else x


SETTINGS = dict(
  name=text(required=True),
  version=one_of(1, 2, 3, required=True),
  temperature=temperature(required=True),
  momentum=number(0, 1, required=True),
  hidden=size(),
  features=size(required=True),
  queue_size=size(),  # of versions 1 and 2, and so is the next
  bn_group_size=whole(),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds MoCo as a recipe's `method` section describes it; its `version` is 1, 2 or 3."""
  if settings.version == 3:
    return moco_v3.from_config(settings, context)
  check_two_views("moco", context.views)
  return moco(
    make_encoder(settings, context),
    MoCoHead(settings.version, settings.get("hidden"), settings.features, context.dtype),
    queue_size=settings.queue_size,
    temperature=settings.temperature,
    momentum=constant_momentum(settings.momentum),
    axis_name=context.axis_name,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  if settings.version == 3:
    return moco_v3.make_encoder(settings, context)
  return context.encoder(resnet=dict(bn_group_size=settings.bn_group_size))
