"""Supervised objectives on an encoder: fine-tuning with labels, and a linear classifier on a frozen one.

Cross-entropy, with label smoothing, mixup and cutmix as the official MAE's fine-tuning has them from timm
(main_finetune.py of facebookresearch/mae; `Mixup` in timm/data/mixup.py, mode "batch"). There an image is mixed with
the one at the mirrored place of its device's batch, here with its neighbour, which in a batch in random order is as
random and does not depend on the devices that share the batch. Drop path is the encoder's.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from ssl_jax import augment, random_streams
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Aux, Classifier, Context, Method, of_encoder
from ssl_jax.models.heads import ClassifierNetwork, LinearClassifier, train_pass
from ssl_jax.models.vit import patch_xavier
from ssl_jax.settings import flag, number, optional, text, whole


@struct.dataclass
class SupervisedState:
  """An encoder that is not trained, {"encoder": parameters}, else {}; and running batch statistics by part."""

  frozen: Any
  batch_stats: Any


def soft_targets(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
  """One-hot rows float32 [b, classes] of labels int [b], of which every class gets an equal part of `smoothing`."""
  return jax.nn.one_hot(labels, classes) * (1 - smoothing) + smoothing / classes


def mix(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, mixup: float, cutmix: float
) -> tuple[jax.Array, jax.Array]:
  """Mixes every image and target with its neighbour's: by mixup or by cutmix, one of the two for the whole batch.

  Mixup (Zhang et al., 2017, arXiv:1710.09412): lam x + (1 - lam) x', lam from Beta(mixup, mixup). Cutmix (Yun et al.,
  2019, arXiv:1905.04899): a box of about (1 - lam) of the area is the neighbour's, and lam is then what is left of it;
  lam from Beta(cutmix, cutmix). Where both are positive, each is taken half of the time.

  Args:
    key: for the whole batch.
    images: float [b, h, w, c], b even: 0 is mixed with 1, 2 with 3.
    targets: float [b, K].
    mixup, cutmix: parameters of the distributions, not both 0; 0: not done.

  Returns:
    (images, targets), mixed.

  Raises:
    UserError: an odd number of images.
  """
  if len(images) % 2:
    raise UserError(
      f"mixup and cutmix mix pairs of images, got {len(images)} at once on a device: batch_size (and microbatch) must "
      "be a multiple of twice the number of devices."
    )
  switch_key, mixup_key, cutmix_key, place_key = jax.random.split(key, 4)
  by_mixup = jax.random.beta(mixup_key, mixup, mixup) if mixup else jnp.float32(1)
  by_cutmix = jax.random.beta(cutmix_key, cutmix, cutmix) if cutmix else jnp.float32(1)
  cuts = jax.random.uniform(switch_key) < (0.5 if mixup and cutmix else float(cutmix > 0))
  inside = cut_box(by_cutmix, jax.random.uniform(place_key, (2,)), (images.shape[1], images.shape[2]))
  # How much of a pixel stays its own: one number for all of them, or 0 inside the box and 1 outside.
  own = jnp.where(cuts, 1.0 - inside, by_mixup)
  share = jnp.where(cuts, 1 - jnp.mean(inside), by_mixup)
  own = own[None, :, :, None]
  return own * images + (1 - own) * _neighbours(images), share * targets + (1 - share) * _neighbours(targets)


def cut_box(lam: jax.Array, place: jax.Array, size: tuple[int, int]) -> jax.Array:
  """Cutmix's box as float32 [h, w], 1 inside: sqrt(1 - lam) of each side around a pixel, cut at the image's edges.

  `place` are uniforms [2] in [0, 1), of the middle's row and column (`rand_bbox` in timm/data/mixup.py).
  """
  inside = []
  for u, n in zip(place, size, strict=True):
    half = (n * jnp.sqrt(1 - lam)).astype(jnp.int32) // 2
    middle = jnp.minimum((u * n).astype(jnp.int32), n - 1)
    at = jnp.arange(n)
    inside.append((at >= middle - half) & (at < middle + half))
  return (inside[0][:, None] & inside[1][None, :]).astype(jnp.float32)


def _neighbours(x):
  return x.reshape(-1, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)


def supervised(
  network: ClassifierNetwork,
  *,
  label_smoothing: float = 0.0,
  mixup: float = 0.0,
  cutmix: float = 0.0,
  seed: int = 0,
) -> Method:
  """Builds a supervised objective; its loss takes labels int32 [b] as the last argument.

  Args:
    network: encoder and classifier. Where it does not train its encoder, that is in the state and not in the
      parameters: it has no gradient and no optimizer.
    label_smoothing: see `soft_targets`.
    mixup, cutmix: see `mix`; both 0: images are not mixed.
    seed: of the run, for what is drawn for a whole batch.
  """
  classes, drop_path = network.head.classes, getattr(network.encoder, "drop_path", 0)

  def variables(params, state):
    return {"params": {**params, **state.frozen}, "batch_stats": state.batch_stats}

  def dropped(keys):
    if not drop_path or not network.train_encoder:
      return {}

    def draw(key):  # of one example: independent of the batch and of the number of devices
      return jax.random.uniform(jax.random.fold_in(key, random_streams.DROP_PATH), (network.encoder.depth, 2))

    return {"uniforms": jnp.moveaxis(jax.vmap(draw)(keys), 0, -1)}  # [depth, 2, b]

  def init(key, views):
    made = network.init(key, views[0][0], train=True)
    params = dict(made["params"])
    frozen = {} if network.train_encoder else {"encoder": params.pop("encoder")}
    return params, SupervisedState(frozen, made.get("batch_stats", {}))

  def loss(params, state, views, keys, step, labels):
    images, targets = views[0][0], soft_targets(labels, classes, label_smoothing)  # [b, h, w, c], [b, K]
    if mixup or cutmix:
      images, targets = mix(augment.batch_key(seed, step), images, targets, mixup=mixup, cutmix=cutmix)
    given = variables(params, state)
    passed = train_pass(network, given["params"], given["batch_stats"], images, "classify", **dropped(keys))
    (logits, features), batch_stats = passed
    value = jnp.mean(optax.softmax_cross_entropy(logits, targets))
    correct = jnp.argmax(logits, axis=1) == jnp.argmax(targets, axis=1)  # the larger part of a mixed image
    metrics = {
      "loss": value,
      "accuracy": jnp.mean(correct),
      "feature_norm": jnp.mean(jnp.linalg.norm(features, axis=1)),
    }
    return value, Aux(metrics, averages=batch_stats)

  def update(params, state, aux, step):
    del params, step
    return state.replace(batch_stats=aux.averages)

  def encoder_variables(params, state):
    return of_encoder({**params, **state.frozen}, state.batch_stats)

  def chance(batch_size):
    del batch_size
    return math.log(classes)  # all classes alike, whatever the targets

  classifier = Classifier(network, variables)
  return Method(init, loss, update, encoder_variables, separable=True, chance=chance, classifier=classifier)


SETTINGS = dict(
  name=text(required=True),
  train_encoder=flag(required=True),
  classes=optional(whole(2)),  # none: as the data have
  labels=optional(text()),  # how many images have one: 10% of each class, or 25-per-class; none: all
  label_smoothing=number(0, 1, ends="[)"),
  mixup=number(),
  cutmix=number(),
  head=dict(init_std=number(), batch_norm=flag(), blocks=optional(whole()), mean_patches=flag()),
)


def from_config(settings: Any, context: Context) -> Method:
  """Builds the objective as a recipe's `method` section describes it."""
  if len(context.views) != 1:
    raise UserError(f"supervised takes one view, got {len(context.views)}.")
  if not settings.classes:
    raise UserError("method.classes is not known: it is a number, or the labels of the data tell it.")
  encoder, head = make_encoder(settings, context), dict(settings.head)
  blocks, mean_patches = head.pop("blocks", None), head.pop("mean_patches", False)
  if blocks and (not context.is_vit or encoder.features == "pooled"):
    raise UserError(f"method.head.blocks={blocks} takes class tokens after the last norm, which this encoder has not.")
  if blocks and blocks > encoder.depth:
    raise UserError(f"method.head.blocks={blocks} is more than the encoder's {encoder.depth} blocks.")
  if mean_patches and not blocks:
    raise UserError("method.head.mean_patches stands behind class tokens: give method.head.blocks too.")
  classifier = LinearClassifier(settings.classes, **head, axis_name=context.axis_name, dtype=context.dtype)
  network = ClassifierNetwork(encoder, classifier, blocks, mean_patches, settings.train_encoder)
  mixing = {key: settings.get(key, 0.0) for key in ("label_smoothing", "mixup", "cutmix")}
  return supervised(network, **mixing, seed=context.seed)


def make_encoder(settings: Any, context: Context) -> nn.Module:
  """The recipe's encoder; where no weights are loaded, a ViT starts as the official MAE's does."""
  del settings
  xavier = nn.initializers.xavier_uniform()
  return context.encoder(resnet={}, vit=dict(kernel_init=xavier, qkv_init=xavier, patch_init=patch_xavier))
