"""Weights to and from PyTorch, strictly: state dicts under torchvision's names for a ResNet and timm's for a ViT."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from flax import traverse_util

from ssl_jax.errors import UserError

_LEAVES = {
  "cls_token": "cls_token",
  "pos_embed": "pos_embed",
  "mask_token": "mask_token",
  "register_tokens": "register_tokens",
  "gamma": "gamma",
  "weight_g": "weight_g",
  "weight_v": "weight_v",
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
# Our names and PyTorch's, where they differ: blocks, shortcuts, and the indices in a projector's Sequential of
# [linear, norm, ReLU] triples.
_NAMES: list[tuple[str, str | Callable[[re.Match], str]]] = [
  (r"layer(\d+)_(\d+)", r"layer\1.\2"),
  (r"blocks_(\d+)", r"blocks.\1"),
  (r"(fc|mlp)_(\d+)", r"\1.\2"),
  (r"downsample_conv", "downsample.0"),
  (r"downsample_bn", "downsample.1"),
  (r"(projector|predictor)\.linear(\d+)", lambda m: f"{m[1]}.{3 * int(m[2]) - 3}"),
  (r"(projector|predictor)\.bn(\d+)", lambda m: f"{m[1]}.{3 * int(m[2]) - 2}"),
]


def from_torch(
  state_dict: Mapping[str, Any],
  variables: Mapping[str, Any],
  *,
  prefix: str = "",
  rename: Mapping[str, str] | None = None,
  ignore: Sequence[str] = (),
) -> dict:
  """Converts a PyTorch state dict to the variables of one of our models.

  Args:
    state_dict: arrays (or CPU tensors) by PyTorch name. `num_batches_tracked` entries are ignored.
    variables: {"params": ..., "batch_stats": ...} of the model, as arrays or `jax.eval_shape` structures: names, shapes
      and dtypes to fill.
    prefix: what the names of this model begin with, e.g. "module.encoder_q."; other entries are ignored.
    rename: regular expressions over our dotted names and what the file has instead, e.g. {r"^encoder\\.": ""}.
    ignore: names in the file, after the prefix, that this model computes, e.g. ("pos_embed",) of fixed positions.

  Returns:
    A tree like `variables` with NumPy arrays: convolutions OIHW -> HWIO, matrices [out, in] -> [in, out].

  Raises:
    UserError: entries are missing, unexpected or of another shape; at most ten of each are named.
  """
  given = {
    name.removeprefix(prefix): np.asarray(value)
    for name, value in state_dict.items()
    if name.startswith(prefix) and not name.endswith("num_batches_tracked")
  }
  given = {name: value for name, value in given.items() if name not in ignore}
  wanted = {}
  for path, leaf in _flatten(variables).items():
    name = torch_name(path)
    for pattern, replacement in (rename or {}).items():
      name = re.sub(pattern, replacement, name)
    wanted[name] = path, leaf
  out, mismatched = {}, []
  for name in wanted.keys() & given.keys():
    path, leaf = wanted[name]
    value = _to_jax(path, given[name])
    if value.shape != leaf.shape:
      mismatched.append(f"{name}: file {given[name].shape}, model {_to_torch(path, np.empty(leaf.shape)).shape}")
    out[path] = value.astype(leaf.dtype)
  problems = [
    _list("missing from the state dict", wanted.keys() - given.keys()),
    _list("unexpected in the state dict", given.keys() - wanted.keys()),
    _list("of another shape", mismatched),
  ]
  if any(problems):
    raise UserError("the state dict does not fit the model. " + " ".join(filter(None, problems)))
  return traverse_util.unflatten_dict(out)


def to_torch(variables: Mapping[str, Any], *, prefix: str = "") -> dict[str, np.ndarray]:
  """The inverse of `from_torch`: {prefix + PyTorch name: array in PyTorch's layout}."""
  return {prefix + torch_name(path): _to_torch(path, np.asarray(v)) for path, v in _flatten(variables).items()}


def torch_name(path: tuple[str, ...]) -> str:
  """("params", "layer1_0", "conv1", "kernel") -> "layer1.0.conv1.weight"."""
  *modules, leaf = path[1:]
  name = ".".join([*modules, _LEAVES[leaf]])
  for pattern, replacement in _NAMES:
    name = re.sub(pattern, replacement, name)
  return name


def _flatten(variables):
  return traverse_util.flatten_dict(dict(variables))


def _to_jax(path, x):
  return x.transpose(2, 3, 1, 0) if x.ndim == 4 else x.T if _is_matrix(path, x) else x


def _to_torch(path, x):
  return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x.T if _is_matrix(path, x) else x


def _is_matrix(path, x):
  return x.ndim == 2 and path[-1] != "mask_token"  # DINOv2's is [1, dim] everywhere


def _list(what, names):
  names = sorted(names)
  more = f" and {len(names) - 10} more" if len(names) > 10 else ""
  return f"{len(names)} {what}: {', '.join(names[:10])}{more}." if names else ""
