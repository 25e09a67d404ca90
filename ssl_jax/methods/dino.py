"""DINO: match the teacher's distribution over prototypes from other crops (Caron et al., 2021, algorithm 1).

arXiv:2104.14294; official code: facebookresearch/dino, main_dino.py. The teacher sees the global crops only, has no
drop path, and follows the student after each optimizer step. Crops of one resolution go through one forward pass, all
of them through one call of the head.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct
from jax import lax

from ssl_jax import random_streams
from ssl_jax.errors import UserError
from ssl_jax.losses import dino_center, dino_loss
from ssl_jax.methods.base import Aux, Context, Method, Momentum, Monitored, cosine_momentum
from ssl_jax.models.heads import DINOHead, train_pass
from ssl_jax.settings import flag, number, size, temperature, text, whole


@struct.dataclass
class DINOState:
  """The teacher {"encoder", "head"}, the centre [K], and both encoders' running batch statistics; float32."""

  teacher_params: Any
  center: jax.Array
  batch_stats: Any
  teacher_batch_stats: Any


class DINOPictures(NamedTuple):
  """What `Method.pictures` shows: the class token's attention in the teacher's last block, one [n, h, w] per head."""

  original: jax.Array
  attention: tuple[jax.Array, ...]


def dino(
  encoder: nn.Module,
  head: DINOHead,
  *,
  teacher_temperature: optax.Schedule,
  teacher_momentum: Momentum,
  student_temperature: float = 0.1,
  center_momentum: float = 0.9,
) -> Method:
  """Builds DINO. views[0] are the global crops, the teacher's; the local ones are views[1].

  Args:
    encoder: called as `encoder(x, train=...)`; a ViT with a drop path rate also gets `uniforms`.
    head: called as `head(features)`.
    teacher_temperature: per step.
    teacher_momentum: m, the weight of the teacher in its own average.
    student_temperature, center_momentum: of `dino_loss` and `dino_center`. The loop averages the centre over devices.
  """

  def forward(params, batch_stats, views, keys=None):
    """A tuple of [v, b, h, w, c] -> (logits [V, b, K], features [V, b, d], batch statistics)."""
    features, count = [], 0
    for crops in views:
      v = crops.shape[0]
      dropped = {} if keys is None else drop_path_uniforms(keys, count, v)
      images = rearrange(crops, "v b h w c -> (v b) h w c")
      output, batch_stats = train_pass(encoder, params["encoder"], batch_stats, images, **dropped)
      features.append(rearrange(output, "(v b) d -> v b d", v=v))
      count += v
    stacked = jnp.concatenate(features)
    logits = head.apply({"params": params["head"]}, rearrange(stacked, "v b d -> (v b) d"))
    return rearrange(logits, "(v b) k -> v b k", v=count), stacked, batch_stats

  def drop_path_uniforms(keys, first, views):
    if not getattr(encoder, "drop_path", 0):
      return {}

    def draw(key, view):  # of one example's view: independent of the batch and of the number of devices
      key = jax.random.fold_in(jax.random.fold_in(key, random_streams.DROP_PATH), view)
      return jax.random.uniform(key, (encoder.depth, 2))

    u = jax.vmap(jax.vmap(draw, (0, None)), (None, 0))(keys, first + jnp.arange(views))  # [v, b, depth, 2]
    return {"uniforms": rearrange(u, "v b depth two -> depth two (v b)")}

  def init(key, views):
    encoder_key, head_key = jax.random.split(key)
    features, variables = encoder.init_with_output(encoder_key, views[0][0], train=True)
    logits, head_variables = head.init_with_output(head_key, features)
    params = {"encoder": variables["params"], "head": head_variables["params"]}
    stats = variables.get("batch_stats", {})
    return params, DINOState(jax.tree.map(jnp.copy, params), jnp.zeros(logits.shape[-1]), stats, stats)

  def loss(params, state, views, keys, step):
    student, features, batch_stats = forward(params, state.batch_stats, views, keys)
    teacher, _, teacher_stats = forward(state.teacher_params, state.teacher_batch_stats, views[:1])
    teacher = lax.stop_gradient(teacher)
    temperature = teacher_temperature(step)
    value = dino_loss(
      student, teacher, state.center, student_temperature=student_temperature, teacher_temperature=temperature
    )
    center = dino_center(state.center, teacher, momentum=center_momentum)
    log_p = jax.nn.log_softmax((teacher.astype(jnp.float32) - state.center[None, None]) / temperature)
    entropy = -jnp.mean(jnp.sum(jnp.exp(log_p) * log_p, axis=-1))
    metrics = {
      "loss": value,
      "teacher_temperature": jnp.asarray(temperature),
      "teacher_entropy": entropy / math.log(head.prototypes),  # 1: uniform, an uninformative teacher
      "kl": value - entropy,  # the loss without the teacher's own entropy, which the student cannot reduce
      "center_norm": jnp.linalg.norm(state.center),
    }
    averages = {"center": center, "batch_stats": batch_stats, "teacher_batch_stats": teacher_stats}
    embedding = rearrange(lax.stop_gradient(features[:2]), "v b d -> b v d")
    return value, Aux(metrics, averages, monitored=Monitored(embedding, jnp.mean(jnp.exp(log_p), axis=(0, 1))))

  def update(params, state, aux, step):
    teacher_params = optax.incremental_update(params, state.teacher_params, teacher_momentum.rate(step))
    return state.replace(teacher_params=teacher_params, **aux.averages)

  def encoder_variables(params, state):
    del params  # The paper evaluates the teacher.
    return {"params": state.teacher_params["encoder"], "batch_stats": state.teacher_batch_stats}

  def chance(batch_size):
    del batch_size
    return math.log(head.prototypes)

  def pictures(params, state, images, keys):
    del params, keys
    attention = encoder.apply({"params": state.teacher_params["encoder"]}, images, method="attention")
    rows, columns = (side // encoder.patch_size for side in images.shape[1:3])
    maps = rearrange(attention[:, :, 0, -rows * columns :], "n heads (h w) -> heads n h w", h=rows, w=columns)
    maps = jnp.repeat(jnp.repeat(maps, encoder.patch_size, axis=2), encoder.patch_size, axis=3)
    return DINOPictures(images, tuple(maps))

  picture = pictures if hasattr(encoder, "attention") else None  # a ResNet has none
  return Method(init, loss, update, encoder_variables, separable=True, chance=chance, pictures=picture)


SETTINGS = dict(
  name=text(required=True),
  teacher_temperature=temperature(required=True),
  teacher_temperature_start=temperature(required=True),
  teacher_temperature_warmup_epochs=whole(0, required=True),
  student_temperature=temperature(required=True),
  teacher_momentum=number(0, 1, required=True),
  center_momentum=number(0, 1, required=True),
  head=dict(layers=whole(1, 1000), hidden=size(), bottleneck=size(), prototypes=size(2), train_gain=flag()),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds DINO as a recipe's `method` section describes it."""
  sizes = [view.size for view in context.views]
  if len(sizes) < 2 or sizes[0] != sizes[1] or len(set(sizes)) > 2 or sizes.count(sizes[0]) != 2:
    raise UserError(f"dino takes two global views of one size and local views of another, got sizes {sizes}.")
  warm = settings.teacher_temperature_warmup_epochs
  ramp = [
    settings.teacher_temperature_start
    + (settings.teacher_temperature - settings.teacher_temperature_start) * i / max(warm - 1, 1)
    for i in range(warm)
  ]
  temperatures = jnp.array([*ramp, settings.teacher_temperature])

  def teacher_temperature(step):  # by epoch, as in the official code
    return temperatures[jnp.minimum(step // context.steps_per_epoch, warm)]

  return dino(
    make_encoder(settings, context),
    DINOHead(**settings.head, dtype=context.dtype),
    teacher_temperature=teacher_temperature,
    teacher_momentum=cosine_momentum(settings.teacher_momentum, context.steps),
    student_temperature=settings.student_temperature,
    center_momentum=settings.center_momentum,
  )


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder with the official initialisation, for training and for evaluation."""
  del settings
  return context.encoder(resnet={}, vit={})
