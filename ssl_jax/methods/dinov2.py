"""DINOv2: DINO on class tokens, iBOT on masked patches, and embeddings that keep apart (Oquab et al., 2023).

arXiv:2304.07193; official code: facebookresearch/dinov2, train/ssl_meta_arch.py. On one device a step is the official
one; on many it is that of the global batch, where the official code masks, drops paths, looks for neighbours and
averages the patches' centre on each device by itself. iBOT (Zhou et al., 2022, arXiv:2111.07832) is the same without
the last of the three terms.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from flax import struct
from jax import lax

from ssl_jax import random_streams
from ssl_jax.block_masks import draw_masks, global_rank, most_masked
from ssl_jax.errors import UserError
from ssl_jax.losses import dino_center, distillation_loss, ibot_loss, koleo_loss, sinkhorn_knopp
from ssl_jax.methods.base import (
  Aux,
  Context,
  Method,
  Momentum,
  Monitored,
  check_two_images,
  cosine_momentum,
  in_chunks,
)
from ssl_jax.models.heads import DINOHead
from ssl_jax.models.vit import ViT
from ssl_jax.settings import number, one_of, size, span, temperature, text, weight, whole

MASK_SHARE, MASK_RATIOS = 0.5, (0.1, 0.5)  # the official defaults: of the global crops, and of the patches of one


@struct.dataclass
class DINOv2State:
  """The teacher {"encoder", "head"} and, with heads of their own, "patch_head"; the centres {"cls": [K], "patch": [K]}.

  With Sinkhorn-Knopp there are no centres. float32.
  """

  teacher_params: Any
  centers: dict[str, jax.Array]


class DINOv2Pictures(NamedTuple):
  """What `Method.pictures` shows: the teacher's patches, coloured by their first three principal components."""

  original: jax.Array
  patches: jax.Array


def dinov2(
  encoder: ViT,
  head: DINOHead,
  patch_head: DINOHead | None = None,
  *,
  teacher_temperature: optax.Schedule,
  teacher_momentum: Momentum,
  sinkhorn: bool = False,
  student_temperature: float = 0.1,
  center_momentum: float = 0.9,
  patch_weight: float = 1.0,
  koleo_weight: float = 0.1,
  mask_share: float = MASK_SHARE,
  mask_ratios: Sequence[float] = MASK_RATIOS,
  axis_name: str | None = None,
  microbatch: int | None = None,
) -> Method:
  """Builds DINOv2. views[0] are the two global crops, the teacher's; the local ones, if there are any, are views[1].

  Args:
    encoder: a ViT with a mask token; `drop_path` is the rate of all its blocks.
    head: of the class tokens.
    patch_head: of the patches; None: they share `head`.
    teacher_temperature: per step.
    teacher_momentum: m, the weight of the teacher in its own average.
    sinkhorn: targets by `sinkhorn_knopp` in place of a softmax of the logits minus their centre.
    student_temperature, center_momentum: of the losses and of `dino_center`.
    patch_weight, koleo_weight: of the second and third term.
    mask_share, mask_ratios: see `draw_masks`.
    axis_name: mapped axis over which the batch is split.
    microbatch: see `in_chunks`.
  """

  def encode(params, parts):
    """Crops with their masks and factors -> (class tokens [V, b, d], the first resolution's patches [v, b, n, d])."""
    tokens = []
    for images, masked, factors in parts:
      merged = jax.tree.map(lambda x: rearrange(x, "v b ... -> (v b) ..."), (images, masked, factors))
      settings = dict(masked=merged[1], factors=merged[2] if factors is None else jnp.moveaxis(merged[2], 0, -1))
      output = encoder.apply({"params": params}, merged[0], method="tokens", **settings)
      tokens.append(rearrange(output, "(v b) t d -> v b t d", v=images.shape[0]))
    cls = jnp.concatenate([x[:, :, 0] for x in tokens])
    return (cls, tokens[0][:, :, 1 + encoder.registers :]), ()

  def project(params, cls, patches):
    """Logits [V, b, K] of the class tokens and [U, K] of the masked patches."""
    rows = rearrange(cls, "v b d -> (v b) d")
    if patch_head is None:  # in one pass
      logits = head.apply({"params": params["head"]}, jnp.concatenate([rows, patches]))
      logits, of_patches = logits[: len(rows)], logits[len(rows) :]
    else:
      logits = head.apply({"params": params["head"]}, rows)
      of_patches = patch_head.apply({"params": params["patch_head"]}, patches)
    return rearrange(logits, "(v b) k -> v b k", v=cls.shape[0]), of_patches

  def assign(logits, center, temperature, weights=None):
    """The teacher's targets for [N, K] logits."""
    if sinkhorn:
      return sinkhorn_knopp(logits, temperature=temperature, weights=weights, axis_name=axis_name)
    return jax.nn.softmax((_wide(logits) - center[None]) / temperature)

  def init(key, views):
    keys = jax.random.split(key, 3)
    params = {"encoder": encoder.init(keys[0], views[0][0], train=True)["params"]}
    row, heads = (
      jnp.zeros((1, encoder.dim)),
      {"head": head} if patch_head is None else {"head": head, "patch_head": patch_head},
    )
    params |= {name: module.init(keys[i], row)["params"] for i, (name, module) in enumerate(heads.items(), 1)}
    centers = {"cls": jnp.zeros(head.prototypes), "patch": jnp.zeros((patch_head or head).prototypes)}
    return params, DINOv2State(jax.tree.map(jnp.copy, params), {} if sinkhorn else centers)

  def loss(params, state, views, keys, step):
    globals_, patch = views[0], encoder.patch_size
    b, grid = len(keys), (globals_.shape[2] // patch, globals_.shape[3] // patch)
    masked = draw_masks(keys, grid, share=mask_share, ratios=mask_ratios, axis_name=axis_name)  # [2, b, n]
    picked, weights = pick(masked)
    factors = kept_paths(keys, encoder, [crops.shape[0] for crops in views], axis_name)
    parts = tuple(zip(views, (masked, None), factors, strict=False))
    chunks = functools.partial(in_chunks, microbatch=microbatch, axis_name=axis_name)
    (cls, patches), _ = chunks(functools.partial(encode, params["encoder"]), parts)
    (slow_cls, slow_patches), _ = chunks(
      functools.partial(encode, state.teacher_params["encoder"]), ((globals_, None, None),)
    )
    student = project(params, cls, _rows(patches)[picked])
    teacher = lax.stop_gradient(project(state.teacher_params, slow_cls, _rows(slow_patches)[picked]))

    temperature, centers = teacher_temperature(step), state.centers
    targets = assign(rearrange(teacher[0], "v b k -> (v b) k"), centers.get("cls"), temperature)
    targets = rearrange(targets, "(v b) k -> v b k", b=b)
    patch_targets = assign(teacher[1], centers.get("patch"), temperature, weights)
    dino = distillation_loss(student[0], targets, student_temperature=student_temperature)
    ibot = ibot_loss(student[1], patch_targets, weights, student_temperature=student_temperature)
    koleo = sum(koleo_loss(crop, axis_name=axis_name) for crop in cls[:2]) if koleo_weight else jnp.zeros(())
    value = dino + patch_weight * ibot + koleo_weight * koleo

    if centers:
      mean = _mean_of_masked(teacher[1], weights, axis_name)
      centers = {
        "cls": dino_center(centers["cls"], teacher[0], momentum=center_momentum, axis_name=axis_name),
        "patch": center_momentum * centers["patch"] + (1 - center_momentum) * mean,
      }
    entropy = jnp.mean(jnp.sum(jax.scipy.special.entr(targets), axis=-1))
    metrics = {
      "loss": value,
      "dino": dino,
      "ibot": ibot,
      "koleo": koleo,
      "kl": dino - entropy,  # what the student can reduce of the first term
      "teacher_temperature": jnp.asarray(temperature),
      "teacher_entropy": entropy / math.log(head.prototypes),  # 1: uniform, an uninformative teacher
    }
    embedding = rearrange(lax.stop_gradient(cls[:2]), "v b d -> b v d")
    return value, Aux(metrics, averages=centers, monitored=Monitored(embedding, jnp.mean(targets, axis=(0, 1))))

  def pick(masked):
    """Where the masked patches are in [(2 b n)], padded to a fixed number, and their weights, 0 for padding."""
    crops, patches = masked.shape[0] * masked.shape[1], masked.shape[2]
    of = crops * (1 if axis_name is None else lax.axis_size(axis_name))
    slots = most_masked(crops, of, patches, share=mask_share, ratios=mask_ratios)
    (picked,) = jnp.nonzero(masked.reshape(-1), size=max(slots, 1), fill_value=0)
    real = jnp.arange(len(picked)) < jnp.sum(masked)
    count = jnp.sum(masked, axis=-1).reshape(-1)[picked // patches]  # of the patch's crop
    return picked, jnp.where(real, 1 / (crops * jnp.maximum(count, 1)), 0)

  def update(params, state, aux, step):
    teacher_params = optax.incremental_update(params, state.teacher_params, teacher_momentum.rate(step))
    return DINOv2State(teacher_params, aux.averages)

  def encoder_variables(params, state):
    del params  # The paper evaluates the teacher.
    return {"params": {name: x for name, x in state.teacher_params["encoder"].items() if name != "mask_token"}}

  def pictures(params, state, images, keys):
    del params, keys
    tokens = encoder.apply({"params": state.teacher_params["encoder"]}, images, method="tokens")
    rows, columns = (side // encoder.patch_size for side in images.shape[1:3])
    scores = principal_components(_wide(tokens[:, -rows * columns :]), 3)
    low, high = (f(scores, axis=(0, 1), keepdims=True) for f in (jnp.min, jnp.max))
    colors = jnp.round(255 * (scores - low) / jnp.maximum(high - low, 1e-12)).astype(jnp.uint8)
    colors = rearrange(colors, "n (h w) c -> n h w c", h=rows)
    return DINOv2Pictures(images, jnp.repeat(jnp.repeat(colors, encoder.patch_size, 1), encoder.patch_size, 2))

  return Method(init, loss, update, encoder_variables, separable=False, pictures=pictures)


def kept_paths(keys: jax.Array, encoder: ViT, views: Sequence[int], axis_name: str | None) -> list[jax.Array | None]:
  """What each branch of each block is multiplied with: float [v, b, depth, 2] for each resolution's v crops.

  Of the n = v B crops of a resolution in the global batch, a random max(int(n (1 - rate)), 1) keep a branch, whose
  output is then multiplied by n over that number: `drop_add_residual_stochastic_depth_list` in layers/block.py. The
  official code draws among the crops of a device, and computes a branch for those alone.
  """
  if not encoder.drop_path:
    return [None] * len(views)

  def draw(key, view):
    key = jax.random.fold_in(jax.random.fold_in(key, random_streams.DROP_PATH), view)
    return jax.random.uniform(key, (encoder.depth, 2))

  u = jax.vmap(jax.vmap(draw, (0, None)), (None, 0))(keys, jnp.arange(sum(views)))  # [V, b, depth, 2]
  factors: list[jax.Array | None] = []
  first = 0
  for v in views:
    rank, n = global_rank(u[first : first + v], axis_name)
    kept = max(int(n * (1 - encoder.drop_path)), 1)
    factors.append(jnp.where(rank < kept, n / kept, 0.0))
    first += v
  return factors


def principal_components(x: jax.Array, count: int) -> jax.Array:
  """The scores [n, p, count] of all rows of [n, p, d] along their axes of largest variance, of a fixed sign."""
  centred = x - jnp.mean(x, axis=(0, 1), keepdims=True)
  with jax.default_matmul_precision("highest"):
    _, axes = jnp.linalg.eigh(jnp.einsum("npd,npe->de", centred, centred))
    axes = axes[:, ::-1][:, :count]  # eigh sorts the eigenvalues in ascending order
    largest = jnp.argmax(jnp.abs(axes), axis=0, keepdims=True)
    return centred @ (axes * jnp.sign(jnp.take_along_axis(axes, largest, axis=0)))


def _mean_of_masked(logits, weights, axis_name):
  """The mean of [U, K] over the rows that are not padding, on all devices."""
  real = weights[:, None] != 0
  total, count = jnp.sum(jnp.where(real, _wide(logits), 0), axis=0), jnp.sum(real)
  if axis_name is not None:
    total, count = lax.psum((total, count), axis_name)
  return total / jnp.maximum(count, 1)


def _rows(patches):
  return rearrange(patches, "v b n d -> (v b n) d")


def _wide(x):
  return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


_HEAD = dict(layers=whole(1, 1000), hidden=size(), bottleneck=size(), prototypes=size(2))
SETTINGS = dict(
  name=text(required=True),
  targets=one_of("centered", "sinkhorn", required=True),
  teacher_temperature=temperature(required=True),
  teacher_temperature_start=temperature(required=True),
  teacher_temperature_warmup_epochs=number(required=True),
  student_temperature=temperature(required=True),
  teacher_momentum=number(0, 1, required=True),
  center_momentum=number(0, 1),
  patch_weight=weight(),
  koleo_weight=weight(),
  mask_share=number(0, 1, ends="(]"),
  mask_ratios=span(0, 1),
  head=_HEAD,
  patch_head=_HEAD,  # without keys: the patches share the class tokens' head
)


def check_masks(settings: Any, crops: int, patches: int) -> None:
  """Raises UserError for settings under which no patch can be masked: the loss of the patches would be 0 for ever."""
  share, ratios = settings.get("mask_share", MASK_SHARE), settings.get("mask_ratios", MASK_RATIOS)
  if int(share * crops) == 0:
    raise UserError(f"method.mask_share={share} of {crops} global crops masks none: take a larger share or batch.")
  if int(ratios[1] * patches) == 0:
    raise UserError(f"method.mask_ratios={tuple(ratios)} of {patches} patches mask none: take larger ones.")


def from_config(settings: Any, context: Context) -> Method:
  """Builds DINOv2 as a recipe's `method` section describes it."""
  check_two_images("dinov2", context.batch_size)
  sizes = [view.size for view in context.views]
  if sizes[:2] != sizes[:1] * 2 or len(set(sizes)) > 2 or sizes.count(sizes[0]) != 2:
    raise UserError(f"dinov2 takes two global views of one size and local views of another, got sizes {sizes}.")
  encoder = make_encoder(settings, context)
  check_masks(settings, 2 * context.batch_size, (sizes[0] // encoder.patch_size) ** 2)
  start, end = settings.teacher_temperature_start, settings.teacher_temperature
  warm = round(settings.teacher_temperature_warmup_epochs * context.steps_per_epoch)

  def teacher_temperature(step):
    return start + (end - start) * jnp.minimum(step / max(warm - 1, 1), 1) if warm else jnp.full((), end)

  wide = jnp.promote_types(context.dtype, jnp.float32)  # nearest neighbours can be closer than half precision resolves
  head = functools.partial(DINOHead, train_gain=True, dtype=context.dtype)
  optional = ("center_momentum", "patch_weight", "koleo_weight", "mask_share", "mask_ratios")
  return dinov2(
    encoder.clone(mask_token=True, norm_dtype=wide),
    head(**settings.head),
    head(**settings.patch_head) if settings.patch_head else None,
    teacher_temperature=teacher_temperature,
    teacher_momentum=cosine_momentum(settings.teacher_momentum, context.steps),
    sinkhorn=settings.targets == "sinkhorn",
    student_temperature=settings.student_temperature,
    **{key: settings[key] for key in optional if key in settings},
    axis_name=context.axis_name,
    microbatch=context.microbatch,
  )


def make_encoder(settings: Any, context: Context) -> Any:
  """The recipe's encoder with the official initialisation, for evaluation: training adds the mask token."""
  del settings
  return context.encoder(vit=dict(token_init=jax.nn.initializers.normal(1e-6)))
