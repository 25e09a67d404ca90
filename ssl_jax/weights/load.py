"""Weights of official releases, other libraries and our own runs, into a model of ours."""

import collections
import functools
import json
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import convert
from ssl_jax.errors import UserError
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT, interpolate_positions, sincos_positions
from ssl_jax.weights import files, layouts

# An entry by which an encoder is found in a file, whatever stands before it, and what brings the names to timm's.
_LANDMARKS: dict[type, dict[str, Callable]] = {
  ViT: {
    "patch_embed.proj.weight": layouts.vit_from_timm,
    "embeddings.patch_embeddings.projection.weight": layouts.vit_from_hf,
    "conv_proj.weight": layouts.vit_from_torchvision,
  },
  ResNet: {
    "layer1.0.conv1.weight": dict,
    "encoder.stages.0.layers.0.layer.0.convolution.weight": layouts.resnet_from_hf,
  },
}
_ORDERS = ("row_first", "column_first")
_PREFERRED = ("teacher", "encoder_q", "base_encoder")  # what the papers of DINO and MoCo evaluate
_TRAINING_ONLY = ("optimizer", "scaler", "fp16_scaler", "amp", "scheduler", "lr_scheduler", "loss_scaler")
# First parts of names beside an encoder's own that belong to a head, a decoder or a classifier.
_BESIDE = {"fc", "head", "heads", "head_dist", "classifier", "pooler", "projector", "predictor"}
_BESIDE |= {"mask_token", "masked_embed"}
_MASK_TOKENS = ("mask_token", "embeddings.mask_token")  # DINOv2's [1, d], of the encoder; others are a decoder's
IN_FOLDER = (
  "model.safetensors",
  "model.safetensors.index.json",
  "pytorch_model.bin",
  "pytorch_model.bin.index.json",
)


class Loaded(NamedTuple):
  """What `load_weights` found.

  Attributes:
    variables: {"params": ..., "batch_stats": ...} of the model, as NumPy arrays: `model.apply(variables, ...)`.
    extra: all other arrays of the file by its own dotted names, in its own layout: heads, the other encoder, a queue,
      a centre, a classifier. `convert.from_torch(extra, shapes, prefix="teacher.head.")` makes a head of them. Of a
      run, the rest of its checkpoint by our names ("params.head.mlp_0.kernel", "state.center"), in our layout.
      An optimizer's state is left out.
    report: what was done, in lines for people.
  """

  variables: dict[str, Any]
  extra: dict[str, np.ndarray]
  report: tuple[str, ...]


def load_weights(
  path: str | os.PathLike,
  model: nn.Module,
  *,
  take: str | None = None,
  channels: int | None = None,
  resize_positions: bool = False,
) -> Loaded:
  """Loads an encoder's weights; no code of the file runs, and PyTorch is not needed.

  The encoder is recognised by its names, whatever stands before them: official files of DINO, DINOv2, MAE, MoCo v1, v2
  and v3, timm and torchvision, folders of Hugging Face (ViTModel, Dinov2Model, Dinov2WithRegistersModel, ViTMAEModel,
  ViTMAEForPreTraining, ResNetModel) and of timm, what `python -m ssl_jax export` wrote, and the workdir of a run.

  Args:
    path: a .safetensors, .pth, .pt or .bin file, or a folder.
    model: our ViT or ResNet. Its shape must be that of the file, every array of it, but for a mask token, which
      training alone uses: it is zeros, as DINOv2 begins, where the file has none, and in `extra` where the model has
      none.
    take: a part of the names that picks one of several encoders, such as "student"; None: what the papers evaluate,
      DINO's teacher, MoCo's query encoder, MoCo v3's base encoder.
    channels: of the images; None: as the file has it. Another number is made by timm's rule: one channel from the sum
      over the three, more from the three in turn, times 3 / channels.
    resize_positions: interpolate learned positions for the model's `image_size` once, here. Without it `image_size`
      must be the file's: the model interpolates for images of any size when it runs.

  Returns:
    Loaded.

  Raises:
    TypeError: the model is neither a ViT nor a ResNet of ours.
    UserError: the file cannot be read, holds no such encoder or several, or does not fit: what is missing, unexpected
      or of another shape is named. Nothing is left at random values.
  """
  kind = _kind_of(model)
  if kind is None:
    raise TypeError(f"model must be a ViT or a ResNet of ssl_jax, got {type(model).__name__}.")
  path = pathlib.Path(path)
  report: list[str] = []
  masked = kind is ViT and model.mask_token
  if (path / "checkpoints").is_dir():
    state, extra, name = _read_run(path, take, report, masked)
  else:
    state, extra, name = _read_encoder(path, kind, take, report, masked)
    config = json.loads(beside.read_text()) if (beside := path / "config.json").is_file() else {}
    _check_config(path, config, model, report)
    if "ssl_jax" not in config:
      _tell_resize(state, model, report)
  report.append(f"read {name}: {len(state)} arrays, {sum(x.size for x in state.values()):,} values")
  if masked and "mask_token" not in state:
    state["mask_token"] = np.zeros((1, model.dim), np.float32)
    report.append("mask token: there is none, and the model's is zeros, as DINOv2 begins")
  first, _ = _first_layer(model)
  if channels and first in state and state[first].shape[1] != channels:
    report.append(f"channels: {state[first].shape[1]} made into {channels} by timm's rule")
    state[first] = layouts.with_channels(state[first], channels)
  if kind is ViT:
    _fit_positions(state, model, resize_positions, report)
    _fit_norm(state, model, report)
  variables = _fit(state, model, str(path))
  report += [f"not loaded, in extra: {text}" for text in _groups(extra)]
  return Loaded(variables, extra, tuple(report))


def read_state(path: pathlib.Path, model: nn.Module | None = None) -> dict[str, np.ndarray]:
  """The arrays of the encoder in a file or folder under timm's and torchvision's names, as the file has them.

  Args:
    path: the file or folder.
    model: the encoder is one of its kind; None: of any.

  Raises:
    UserError: see `load_weights`.
  """
  return _read_encoder(path, _kind_of(model), None, [], False)[0]


def _kind_of(model):
  return next((kind for kind in _LANDMARKS if isinstance(model, kind)), None)


def _read_run(workdir, take, report, masked):
  from ssl_jax import restore  # imported late: it imports this module

  if take:
    raise UserError(f"take={take!r} picks from a file; of a run the encoder that it evaluates is loaded.")
  run = restore.restore_run(workdir)
  state = layouts.whole_state(*restore.with_mask_token(run))
  if not masked:
    state.pop("mask_token", None)  # it is in `extra`
  rest = {"params": {name: part for name, part in run.params.items() if name != "encoder"}, "state": run.state}
  leaves = jax.tree_util.tree_leaves_with_path(rest)
  extra = {jax.tree_util.keystr(keys, simple=True, separator="."): np.asarray(leaf) for keys, leaf in leaves}
  return state, extra, f"the encoder of step {run.step} of {workdir}, a run of {run.config.method.name}"


def _read_encoder(path, kind, take, report, masked):
  """(state dict of the encoder under the official names, the other arrays, where it was); `masked`: with mask token."""
  file = _file_of(path) if path.is_dir() else path
  tree = files.read(file)
  if left := [name for name in _TRAINING_ONLY if tree.pop(name, None) is not None]:
    report.append(f"left out: {', '.join(left)}")
  flat = {name: value for name, value in _flatten(tree).items() if not name.endswith("num_batches_tracked")}
  marks = {mark: rule for of, rules in _LANDMARKS.items() if kind in (None, of) for mark, rule in rules.items()}
  prefixes = {name.removesuffix(mark): mark for mark in marks for name in flat if _ends(name, mark)}
  prefix = _pick(file, kind, prefixes, take, flat)
  state, extra = {}, {}
  for name, value in flat.items():
    short = name.removeprefix(prefix)
    beside = _is_beside(short) and not (masked and short in _MASK_TOKENS and value.ndim == 2)
    mine = name.startswith(prefix) and not beside
    (state if mine else extra)[short if mine else name] = value
  where = f"{prefix}* of {file}" if prefix else str(file)
  return marks[prefixes[prefix]](state), extra, f"{where}, in the layout of {layouts.layout_of(state)}"


def _file_of(folder):
  there = [name for name in IN_FOLDER if (folder / name).is_file()]
  names = there or sorted(x.name for x in folder.iterdir() if x.suffix in (".safetensors", ".pth", ".pt", ".bin"))
  if not there and len(names) != 1:
    raise UserError(
      f"{folder} holds {', '.join(names) or 'no weight file'}: give one file, a folder with {IN_FOLDER[0]}, or the "
      "workdir of a run, which has checkpoints."
    )
  return folder / names[0]


def _flatten(tree: Mapping[Any, Any], prefix: str = "") -> dict[str, np.ndarray]:
  out: dict[str, np.ndarray] = {}
  for key, value in tree.items():
    if isinstance(value, Mapping):
      out |= _flatten(value, f"{prefix}{key}.")
    elif isinstance(value, np.ndarray):
      out[f"{prefix}{key}"] = value
  return out


def _pick(file, kind, prefixes, take, flat):
  """What stands before the names of the encoder to load."""
  if not prefixes:
    other = [x.__name__ for x, marks in _LANDMARKS.items() if any(_ends(name, mark) for name in flat for mark in marks)]
    holds = f"a {other[0]}" if other else f"names that begin with {', '.join(dict.fromkeys(map(_first, flat)))[:200]}"
    raise UserError(f"{file} holds no {kind.__name__ if kind else 'ViT or ResNet'} that is known here, but {holds}.")
  names = list(prefixes)
  if take:
    names = [name for name in names if take in name.split(".")]
  elif len(names) > 1:
    names = [name for word in _PREFERRED for name in names if word in name.split(".")][:1]
  if len(names) != 1 and list(prefixes) == [""]:
    raise UserError(f"{file} holds one encoder, with nothing in front of its names: leave take out, got {take!r}.")
  if len(names) != 1:
    raise UserError(
      f"{file} holds the encoders {', '.join(f'{name}*' for name in prefixes)}: name one by a part of its names, "
      f"take={next(iter(prefixes)).split('.')[0]!r}" + (f", got {take!r}." if take else ".")
    )
  return names[0]


def _ends(name, landmark):
  return f".{name}".endswith(f".{landmark}")


def _first(name):
  return name.partition(".")[0]


def _is_beside(name):
  return _first(name) in _BESIDE or name.startswith("decoder") or name == "embeddings.mask_token"


def _check_config(path, config, model, report):
  """Raises UserError for what a folder's config.json says of the computation and names and shapes do not show."""
  kind, wants = config.get("model_type"), {}
  if isinstance(model, ViT):  # as transformers, timm and torchvision, and we, call the heads
    wants = dict.fromkeys(("num_attention_heads", "num_heads", "heads"), model.heads) | {"hidden_act": "gelu"}
  elif kind == "resnet":
    wants = {"hidden_act": "relu", "downsample_in_bottleneck": False}
  ours = config.get("ssl_jax") or {}
  config = config | (config.get("model_args") or {}) | (config.get("arguments") or {}) | (ours.get("encoder") or {})
  for key, want in wants.items():
    if config.get(key, want) != want:
      raise UserError(f"{path / 'config.json'} says {key}={config[key]!r}, and the model has {want!r}.")
  epsilon = config.get("layer_norm_eps", 1e-12 if kind in ("vit", "vit_mae") else 1e-6)
  if isinstance(model, ViT) and epsilon != 1e-6:
    report.append(f"config.json says layer_norm_eps {epsilon:g}, ours is 1e-6, as in the official DINO and MAE")


def _tell_resize(state, model, report):
  """Tells that the model resizes learned positions otherwise than the official one with these weights."""
  rule = layouts.resize_of(state)
  if isinstance(model, ViT) and model.layer_scale is not None and model.resize != rule:
    which = "with" if rule == "antialiased" else "without"
    report.append(
      f"positions: for images of another size than {model.image_size} DINOv2's models {which} registers have "
      f"resize={rule!r}, and this one has {model.resize!r}"
    )


def _fit_positions(state, model, resize, report):
  """Drops fixed positions that the model computes itself, and interpolates learned ones where that is asked for."""
  positions = state.get("pos_embed")
  if positions is None or positions.ndim != 3 or positions.shape[2] != model.dim:
    return  # told with the other shapes
  there, wanted = layouts.grid_of(positions), model.image_size // model.patch_size
  if positions.shape[1] != 1 + there * there:
    raise UserError(f"the file's positions {positions.shape} are not of a class token and a square of patches.")
  if model.positions != "learned":
    orders = {order: sincos_positions(there, there, model.dim, order == "row_first") for order in _ORDERS}
    # Fixed ones may have been rounded to half precision; learned ones are far from any table.
    same = [
      order for order, table in orders.items() if np.allclose(np.asarray(positions, np.float32), table, atol=0.01)
    ]
    if model.positions not in same:
      what = f"fixed {same[0]}" if same else "learned"
      raise UserError(f"the file's positions are {what}: give the model positions={(same or ['learned'])[0]!r}.")
    del state["pos_embed"]
    report.append(f"positions: the file's are the model's own, {model.positions}")
  elif there != wanted and not resize:
    raise UserError(
      f"the file's positions are for {there * model.patch_size} pixels, {there}x{there} patches {positions.shape}, the "
      f"model's for image_size={model.image_size}, {wanted}x{wanted} {(1, 1 + wanted**2, model.dim)}. Keep "
      f"image_size={there * model.patch_size}: the model interpolates for images of any size. Or give "
      "resize_positions=True to do it once, now."
    )
  elif there != wanted:
    antialias = model.resize == "antialiased"
    resized = interpolate_positions(jnp.asarray(positions, jnp.float32), wanted, wanted, antialias=antialias)
    state["pos_embed"] = np.asarray(resized)
    report.append(f"positions: interpolated from {there}x{there} to {wanted}x{wanted} patches")


def _fit_norm(state, model, report):
  """Puts a new norm behind the pooling in place of the last one, where the model has it there and the file has not."""
  if model.features == "pooled" and "norm.weight" in state and "fc_norm.weight" not in state:
    state["fc_norm.weight"] = np.ones_like(state.pop("norm.weight"))
    state["fc_norm.bias"] = np.zeros_like(state.pop("norm.bias"))
    report.append("the last norm is left out: the one behind the pooling, fc_norm, begins anew")


def _fit(state, model, where):
  """The variables of the model out of a state dict, or a UserError that says what does not fit and why."""
  first, side = _first_layer(model)
  kernel = state.get(first)
  channels = kernel.shape[1] if kernel is not None and kernel.ndim == 4 else 3
  init = functools.partial(model.init, train=False)
  shapes = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, side, side, channels)))
  given = layouts.facts(state)
  try:
    variables = convert.from_torch(state, shapes)
  except UserError as error:
    mine = layouts.facts(convert.to_torch(jax.tree.map(lambda x: np.empty(x.shape), shapes)))
    text = f"{where} holds {given}, and the model is {mine}: {error}"
    if "fc_norm.weight" in state:
      text += " A norm behind the pooling (fc_norm) is a fine-tuned classifier's: give the model features='pooled'."
    if "pos_embed" not in state and getattr(model, "positions", "") == "learned":
      text += " Without positions in the file, they are fixed: positions='row_first' (MoCo v3) or 'column_first' (MAE)."
    raise UserError(text) from error
  if whole := [name for name, value in state.items() if np.asarray(value).dtype.kind in "biu"]:
    raise UserError(f"{where} has whole numbers where weights belong, in {', '.join(whole[:10])}: was it quantised?")
  if broken := [name for name, value in state.items() if not np.all(np.isfinite(np.asarray(value, np.float32)))]:
    raise UserError(f"{where} has values that are not finite, in {', '.join(broken[:10])}.")
  return variables


def _first_layer(model):
  """(the name of the layer that sees the images, a side of images that the model takes)."""
  return ("patch_embed.proj.weight", model.image_size) if isinstance(model, ViT) else ("conv1.weight", 32)


def _groups(extra):
  """What is in `extra`, by the parts before the last two of its names."""
  counts = collections.Counter(".".join(name.split(".")[:2]) for name in extra)
  return [f"{name}.*, {count} arrays" if count > 1 else name for name, count in counts.items()]
