"""Optimizers and schedules of the recipes, put together from optax."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax

from ssl_jax.errors import UserError


def scaled_learning_rate(base: float, batch_size: int, scaling: str) -> float:
  """The peak learning rate: "linear" base * B / 256, "sqrt" base * sqrt(B), "none" base."""
  rules = {"linear": batch_size / 256, "sqrt": batch_size**0.5, "none": 1.0}
  if scaling not in rules:
    raise UserError(f"lr.scaling must be one of {', '.join(rules)}, got {scaling!r}.")
  return base * rules[scaling]


def warmup_cosine(peak: float, warmup_steps: int, steps: int, end: float = 0.0) -> optax.Schedule:
  """Linear from 0 over the warm-up, then a half cosine to `end` (learning_rate_schedule in the official SimCLR).

  With W warm-up steps of T: peak t / W for t < W, then end + (peak - end) (1 + cos(pi (t - W) / (T - W))) / 2.

  Raises:
    UserError: the warm-up is not shorter than the run.
  """
  if warmup_steps >= steps:
    raise UserError(
      f"the warm-up is {warmup_steps} steps long and the run {steps}: lower lr.warmup_epochs or train for longer."
    )
  cosine = optax.cosine_decay_schedule(peak, steps - warmup_steps, end / peak if peak else 0.0)
  if warmup_steps == 0:
    return cosine
  return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup_steps), cosine], [warmup_steps])


def path_name(path: Sequence[Any]) -> str:
  """A parameter's path as the rules see it: "encoder/layer1_0/conv1/kernel"."""
  return "/".join(str(getattr(part, "key", getattr(part, "name", part))) for part in path)


def decayed(params: Any, no_decay: Sequence[str]) -> Any:
  """A tree of booleans: True where weight decay, and LARS's trust ratio, apply.

  Args:
    params: parameter tree.
    no_decay: regular expressions; a parameter whose whole path matches one of them is left out.

  Raises:
    UserError: an expression matches no parameter.
  """
  names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
  for pattern in no_decay:
    if not any(re.fullmatch(pattern, name) for name in names):
      raise UserError(f"no_decay: {pattern!r} matches no parameter; they are called {names[0]!r}, {names[-1]!r}.")
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not any(re.fullmatch(pattern, path_name(path)) for pattern in no_decay), params
  )


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

  With g' = g + weight_decay p and ratio = trust_coefficient |p| / |g'| (1 where either norm is 0):
  inside (SimCLR, lars_optimizer.py): v = momentum v + lr ratio g', p -= v;
  outside (BYOL, MoCo v3, MAE's probe, DINO): v = momentum v + ratio g', p -= lr v.
  They differ while the learning rate changes.

  Args:
    learning_rate: schedule.
    mask: boolean tree, or function of the parameters, of what decays and adapts; the rest gets plain momentum.
    weight_decay, momentum, trust_coefficient: as above.
    lr_inside: which form.
  """
  rate, velocity = optax.scale_by_learning_rate(learning_rate), optax.trace(momentum)
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask),
    optax.masked(optax.scale_by_trust_ratio(trust_coefficient=trust_coefficient), mask),
    *((rate, velocity) if lr_inside else (velocity, rate)),
  )


def sgd(
  learning_rate: optax.Schedule, mask: Any, *, weight_decay: float = 0.0, momentum: float = 0.9, nesterov: bool = False
) -> optax.GradientTransformation:
  """SGD with momentum and L2 decay as in PyTorch: v = momentum v + g + weight_decay p, p -= lr v."""
  return optax.chain(optax.add_decayed_weights(weight_decay, mask), optax.sgd(learning_rate, momentum, nesterov))


def adamw(
  learning_rate: optax.Schedule,
  mask: Any,
  *,
  weight_decay: float = 0.0,
  b1: float = 0.9,
  b2: float = 0.999,
  eps: float = 1e-8,
) -> optax.GradientTransformation:
  """AdamW with decoupled decay, scaled by the learning rate as in PyTorch."""
  return optax.adamw(learning_rate, b1, b2, eps, weight_decay=weight_decay, mask=mask)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {"lars": lars, "sgd": sgd, "adamw": adamw}


def from_config(config: Any, learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """Builds the optimizer that `config.optimizer` names; `config.no_decay` says what neither decays nor adapts."""
  arguments = dict(config.optimizer)
  name = arguments.pop("name")
  if name not in OPTIMIZERS:
    raise UserError(f"optimizer.name must be one of {', '.join(OPTIMIZERS)}, got {name!r}.")
  no_decay = tuple(config.no_decay)
  try:
    return OPTIMIZERS[name](learning_rate, lambda params: decayed(params, no_decay), **arguments)
  except TypeError as error:
    raise UserError(f"optimizer {name}: {error}.") from error
