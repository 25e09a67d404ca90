"""Optimizers and schedules of the recipes, put together from optax."""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ssl_jax.errors import UserError
from ssl_jax.settings import Setting, each, factors, flag, number, one_of, optional, patterns, positive, text, whole


class ParameterRules(NamedTuple):
  """Which parameters an optimizer treats differently: regular expressions that match a parameter's whole path.

  Attributes:
    no_decay: excluded from weight decay and from LARS's trust ratio.
    frozen: never trained.
    late: not trained in the first `late_epochs` epochs. While they are not trained, late and frozen parameters have no
      weight decay and no moments, like a PyTorch parameter without a gradient.
    held: their learning rate is 0 in the first `late_epochs` epochs, while their moments are updated (DINOv2).
    late_epochs: see `late` and `held`.
  """

  no_decay: tuple[str, ...] = ()
  frozen: tuple[str, ...] = ()
  late: tuple[str, ...] = ()
  held: tuple[str, ...] = ()
  late_epochs: int = 0


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
  """The peak learning rate: "linear" base * B / 256, "sqrt" base * sqrt(B), "none" base."""
  rules = {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}
  if scaling not in rules:
    raise UserError(f"lr.scaling must be one of {', '.join(rules)}, got {scaling!r}.")
  return base * rules[scaling]


def warmup_cosine(
  peak: float, warmup_steps: int, steps: int, end: float = 0.0, *, inclusive: bool = False
) -> optax.Schedule:
  """Linear from 0 over the warm-up, then a half cosine to `end` (learning_rate_schedule in the official SimCLR).

  With W warm-up steps of T: peak t / W for t < W, then end + (peak - end) (1 + cos(pi (t - W) / (T - W))) / 2.
  `inclusive` warms up by t / (W - 1), as the official DINO does: its last warm-up step already has the peak rate.

  Raises:
    UserError: the warm-up is not shorter than the run.
  """
  if warmup_steps >= steps:
    raise UserError(
      f"the warm-up is {warmup_steps} steps long and the run {steps}: lower lr.warmup_epochs or train for longer."
    )
  cosine = cosine_between(peak, end, steps - warmup_steps)
  if warmup_steps == 0:
    return cosine
  linear = optax.linear_schedule(0.0, peak, max(warmup_steps - inclusive, 1))
  return optax.join_schedules([linear, cosine], [warmup_steps])


def cosine_between(start: float, end: float, steps: int) -> optax.Schedule:
  """end + (start - end) (1 + cos(pi t / steps)) / 2, up or down."""
  cosine = optax.cosine_decay_schedule(1.0, steps)
  return lambda step: end + (start - end) * cosine(step)


def make_schedule(lr: Any, batch_size: int, steps: int, steps_per_epoch: int) -> optax.Schedule:
  """The learning rate that a recipe's section `lr` describes.

  Its keys: base, scaling (see `scaled_learning_rate`), warmup_epochs, end; and optionally `inclusive`
  (see `warmup_cosine`), `by_epoch` (the rate changes between epochs only: MoCo v2) and `milestones` (epochs at which it
  falls to a tenth, in place of the cosine: MoCo v1).
  """
  peak = scaled_learning_rate(lr.base, batch_size, lr.scaling)
  if lr.get("milestones"):
    return optax.piecewise_constant_schedule(peak, {epoch * steps_per_epoch: 0.1 for epoch in lr.milestones})
  warmup_steps = round(lr.warmup_epochs * steps_per_epoch)
  schedule = warmup_cosine(peak, warmup_steps, steps, lr.end, inclusive=lr.get("inclusive", False))
  if lr.get("by_epoch"):
    return lambda step: schedule(step // steps_per_epoch * steps_per_epoch)
  return schedule


def path_name(path: Sequence[Any]) -> str:
  """A parameter's path as the rules see it: "encoder/layer1_0/conv1/kernel"."""
  return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def decayed(params: Any, no_decay: Sequence[str]) -> Any:
  """A tree of booleans: True where weight decay, and LARS's trust ratio, apply.

  Args:
    params: parameter tree.
    no_decay: regular expressions; a parameter whose whole path matches one of them is left out.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: not matches(path, no_decay), params)


def matches(path: Sequence[Any], patterns: Sequence[str]) -> bool:
  """Whether the whole path of a parameter matches one of the regular expressions."""
  return any(re.fullmatch(pattern, path_name(path)) for pattern in patterns)


def check_rules(rules: ParameterRules, params: Any) -> None:
  """Raises UserError if an expression of the recipe matches no parameter, which must be a mistake."""
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for key in ("no_decay", "frozen", "late", "held"):
    for pattern in getattr(rules, key):
      if not any(re.fullmatch(pattern, name) for name in names):
        raise UserError(f"{key}: {pattern!r} matches no parameter; the first is {names[0]!r}, the last {names[-1]!r}.")


def lars(
  learning_rate: optax.Schedule,
  mask: Any,
  *,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
  trust_coefficient: float = 0.001,
  lr_inside: bool = True,
) -> optax.GradientTransformation:
  """LARS (You et al., 2017, arXiv:1708.03888), in both forms of the official codes.

  With g' = g + weight_decay p and `ratio = trust_coefficient |p| / |g'|` (1 where either norm is 0):
  inside (SimCLR, lars_optimizer.py): v = momentum v + lr ratio g', p -= v;
  outside (BYOL, MoCo v3, MAE's probe, DINO): v = momentum v + ratio g', p -= lr v.
  They differ while the learning rate changes.

  Args:
    learning_rate: schedule.
    mask: boolean tree, or function of the parameters, of what decays and adapts; the rest gets plain momentum.
    weight_decay, momentum, trust_coefficient: as above.
    lr_inside: which form.
  """
  if lr_inside:
    masks = dict(weight_decay_mask=mask, trust_ratio_mask=mask)
    return optax.lars(learning_rate, weight_decay, trust_coefficient=trust_coefficient, momentum=momentum, **masks)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), mask),
    optax.trace(momentum),
    optax.scale_by_learning_rate(learning_rate),
  )


def sgd(
  learning_rate: optax.Schedule, mask: Any, *, weight_decay: float = 0.0, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
  """SGD with momentum and L2 decay as in PyTorch: v = momentum v + g + weight_decay p, p -= lr v."""
  return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, momentum, nesterov))


def clip_by_param_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales each gradient leaf to an L2 norm of at most `max_norm` (`clip_gradients` in the official DINO code)."""
  return optax.stateless_with_tree_map(lambda g, _: g * jnp.minimum(1.0, max_norm / (jnp.linalg.norm(g) + 1e-6)))


def clip_by_part_norm(max_norm: float) -> optax.GradientTransformation:
  """Scales the gradients of each part, encoder and heads, to a common L2 norm of at most `max_norm` (DINOv2).

  The parts are the entries of the parameter tree; the formula is that of PyTorch's `clip_grad_norm_`.
  """

  def clip(part):
    factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(part) + 1e-6))
    return jax.tree.map(lambda g: factor * g, part)

  return optax.stateless(lambda updates, _: {name: clip(part) for name, part in updates.items()})


_BLOCK = re.compile(r"encoder/blocks_(\d+)/")
_EMBEDDINGS = re.compile(r"encoder/(patch_embed/|cls_token|pos_embed|mask_token|register_tokens)")


def rate_factors(params: Any, layer_decay: float = 1.0, rates: Sequence[tuple[str, float]] = ()) -> Any:
  """What each parameter's learning rate is multiplied with: a tree of numbers, `layer_decay` and `rates` together.

  Layer-wise decay gives layer i of L + 1 the factor layer_decay^(L + 1 - i): the embeddings of `params["encoder"]` are
  layer 0, and its blocks are layers 1 to L. All else, its last norm and the heads, has the factor 1. `lr_decay.py` of
  facebookresearch/mae and `param_groups.py` of facebookresearch/dinov2 do the same.

  Args:
    params: parameter tree.
    layer_decay: see above; 1: none.
    rates: (regular expression, factor): the first that matches a parameter's whole path decides. Empty: none.

  Raises:
    UserError: the encoder has no blocks, an expression decides no parameter, or a parameter is matched by none.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  blocks = [int(found[1]) + 1 for name in names if (found := _BLOCK.match(name))]
  if layer_decay != 1 and not blocks:
    raise UserError(f"optimizer.layer_decay={layer_decay} needs an encoder with blocks, a ViT; take it out for others.")
  layers, undecided = max(blocks, default=0) + 1, {expression for expression, _ in rates}

  def factor(path, _):
    name = path_name(path)
    found = _BLOCK.match(name)
    layer = int(found[1]) + 1 if found else 0 if _EMBEDDINGS.match(name) else layers
    expression, rate = next(((x, rate) for x, rate in rates if re.fullmatch(x, name)), (None, 1.0))
    if rates and expression is None:
      raise UserError(f"no expression of optimizer.rates matches {name!r}: let the last pair be ('.*', 1.0).")
    undecided.discard(expression)
    return layer_decay ** (layers - layer) * rate

  multipliers = jax.tree_util.tree_map_with_path(factor, params)
  if undecided:
    raise UserError(
      f"optimizer.rates: {sorted(undecided)[0]!r} decides no parameter, since it matches none or comes after another "
      f"that does; the first parameter is {names[0]!r}, the last {names[-1]!r}."
    )
  return multipliers


def scale_by_rates(layer_decay: float, rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
  """Multiplies whole updates, weight decay included, by `rate_factors`: learning rates of parameter groups."""

  def init(params):
    rate_factors(params, layer_decay, rates)  # so that a mistake shows before anything is compiled
    return optax.EmptyState()

  def update(updates, state, params=None):
    del params
    return jax.tree.map(lambda rate, x: rate * x, rate_factors(updates, layer_decay, rates), updates), state

  return optax.GradientTransformation(init, update)


class HeadsFirst(NamedTuple):
  """The state of `heads_first`.

  Attributes:
    inner: the state of the wrapped optimizer.
    steps: how many are done.
    total: the sum of the losses of this window so far.
    before: the mean loss of the window before.
    begins: the step from which the encoder trains too.
  """

  inner: Any
  steps: jax.Array
  total: jax.Array
  before: jax.Array
  begins: jax.Array


def heads_first(
  optimizer: optax.GradientTransformation, most_steps: int, *, window: int = 200, flat: float = 0.01
) -> optax.GradientTransformationExtraArgs:
  """Trains everything but `params["encoder"]` until the loss is flat, then the encoder too.

  The loss is flat when its mean over `window` steps is less than a share `flat` below its mean over the window before.
  Until then, but for at most `most_steps` steps, the encoder's updates are zero, weight decay included, while its
  moments are collected. In step t after that the updates are multiplied by :math:`\\min(1, (t + 1) / w)`: a warm-up
  over w = `window` steps.

  All of it is in the state, and so in checkpoints. `update` takes the loss as `value`.
  """

  def init(params):
    return HeadsFirst(optimizer.init(params), jnp.int32(0), jnp.float32(0), jnp.float32(jnp.inf), jnp.int32(most_steps))

  def update(updates, state, params=None, *, value, **given):
    del given
    updates, inner = optimizer.update(updates, state.inner, params)
    share = jnp.clip((state.steps - state.begins + 1) / window, 0, 1)
    of_encoder = lambda path: path_name(path).startswith("encoder/")  # noqa: E731
    updates = jax.tree_util.tree_map_with_path(lambda path, x: share * x if of_encoder(path) else x, updates)
    steps, total = state.steps + 1, state.total + value
    ends, mean = steps % window == 0, total / window
    is_flat = ends & (steps < state.begins) & (state.before - mean < flat * jnp.abs(state.before))
    is_flat &= jnp.isfinite(state.before)
    begins = jnp.where(is_flat, steps, state.begins)
    return updates, HeadsFirst(inner, steps, jnp.where(ends, 0.0, total), jnp.where(ends, mean, state.before), begins)

  return optax.GradientTransformationExtraArgs(init, update)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"lars": lars, "sgd": sgd, "adamw": optax.adamw}
_OF_ALL = dict(
  name=text(required=True),
  weight_decay=number(),
  weight_decay_end=optional(number()),
  clip=optional(positive()),
  clip_part=optional(positive()),
  layer_decay=number(0, 1, ends="(]"),
  rates=factors(),
)
_MOMENTUM = number(0, 1, ends="[)")
# The keys of a recipe's section `optimizer`, by its name.
SETTINGS: dict[str, dict[str, Setting]] = {
  "lars": _OF_ALL | dict(momentum=_MOMENTUM, trust_coefficient=positive(), lr_inside=flag()),
  "sgd": _OF_ALL | dict(momentum=_MOMENTUM, nesterov=flag()),
  "adamw": _OF_ALL | dict(b1=_MOMENTUM, b2=_MOMENTUM, eps=positive()),
}
LR_SETTINGS = dict(  # of the section `lr`, see `make_schedule`
  base=positive(required=True),
  scaling=one_of("linear", "sqrt", "none", required=True),
  warmup_epochs=number(required=True),
  end=number(required=True),
  inclusive=flag(),
  by_epoch=flag(),
  milestones=optional(each(whole())),
)
RULE_SETTINGS = dict(no_decay=patterns(), frozen=patterns(), late=patterns(), held=patterns(), late_epochs=whole(0))


def make(
  optimizer: Any, rules: ParameterRules, learning_rate: optax.Schedule, steps: int, steps_per_epoch: int
) -> optax.GradientTransformation:
  """Builds the optimizer that a recipe's section `optimizer` describes.

  Args:
    optimizer: its name and arguments; `weight_decay_end` makes the decay a cosine over the run, `clip` clips each
      parameter's gradient and `clip_part` each part's, `layer_decay` and `rates` multiply parameters' learning rates
      (`rate_factors`).
    rules: which parameters it treats differently.
    learning_rate: schedule.
    steps, steps_per_epoch: of the run.

  Raises:
    TypeError: an argument does not exist; a recipe's keys are checked before (`config.check_values`).
    UserError: the name does not exist.
  """
  arguments = dict(optimizer)
  name, clip, decay_end = arguments.pop("name"), arguments.pop("clip", None), arguments.pop("weight_decay_end", None)
  layer_decay, rates = arguments.pop("layer_decay", 1.0), arguments.pop("rates", ())
  clip_part = arguments.pop("clip_part", None)
  if name not in OPTIMIZERS:
    raise UserError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
  weight_decay = arguments.setdefault("weight_decay", 0.0)  # optax.adamw has another default
  first = rules.late_epochs * steps_per_epoch

  def build(shift):
    """The optimizer of parameters that are trained from step `shift` on, where its own step count is 0."""
    if decay_end is not None:
      decay = cosine_between(weight_decay, decay_end, steps)
      arguments["weight_decay"] = lambda step: decay(step + shift)
    mask = functools.partial(decayed, no_decay=rules.no_decay)
    return OPTIMIZERS[name](lambda step: learning_rate(step + shift), mask=mask, **arguments)

  built = build(0)
  if rules.frozen or rules.late:
    parts = {
      "trained": built,
      "frozen": optax.set_to_zero(),
      "late": optax.conditionally_mask(build(first), lambda step: step >= first),
    }

    def label(path, _):
      return "frozen" if matches(path, rules.frozen) else "late" if matches(path, rules.late) else "trained"

    built = optax.partition(parts, lambda params: jax.tree_util.tree_map_with_path(label, params))
  if layer_decay != 1 or rates:
    built = optax.chain(built, scale_by_rates(layer_decay, rates))
  if rules.held:
    moving = optax.scale_by_schedule(lambda step: jnp.where(step >= first, 1.0, 0.0))
    held = functools.partial(jax.tree_util.tree_map_with_path, lambda path, _: matches(path, rules.held))
    built = optax.chain(built, optax.masked(moving, held))
  if clip_part is not None:
    built = optax.chain(clip_by_part_norm(clip_part), built)
  return built if clip is None else optax.chain(clip_by_param_norm(clip), built)
