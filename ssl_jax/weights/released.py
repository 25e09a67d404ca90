"""An encoder from a file or folder of weights alone: its shape from the arrays, what it sees from what lies beside."""

import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from ssl_jax.augment import EvaluationView
from ssl_jax.errors import UserError
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT, sincos_positions
from ssl_jax.weights import layouts, load

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16, 1536: 24}  # of the ViTs tiny to huge and DINOv2's giant
_OF_MOCO_V3 = 12  # heads of its ViTs of every width, which alone have positions that begin with the row
_FEATURES = {"token": "cls", "avg": "mean", "": "flat"}  # timm's names of them
_FILTERS = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class Released(NamedTuple):
  """An encoder and what it sees of an image.

  Attributes:
    encoder: a ViT or a ResNet of ours.
    variables: its variables, as NumPy arrays.
    view: what it sees of an image.
    channels: of the images.
    report: what was done, in lines for people.
  """

  encoder: nn.Module
  variables: dict[str, Any]
  view: EvaluationView
  channels: int
  report: tuple[str, ...]


def read(
  path: str | os.PathLike,
  *,
  heads: int | None = None,
  size: int | None = None,
  resize: int | None = None,
  mean: Sequence[float] = (),
  std: Sequence[float] = (),
) -> Released:
  """Reads whatever `load_weights` reads, but for workdirs, without being told the model.

  Args:
    path: a file or a folder. A folder's config.json and preprocessor_config.json say what arrays do not: a ViT's heads,
      and size, crop, mean and std of the images.
    heads: of a ViT; None: what config.json says, else those of the published ViT of this width.
    size: of the square that is seen; None: as the folder says.
    resize: to which the short side is brought before; None: as the folder says, else `size`.
    mean, std: one number a channel, for values in [0, 1]; empty: as the folder says.

  Raises:
    UserError: see `load_weights`; or something is not known and has to be given.
  """
  path = pathlib.Path(path)
  if not path.exists():
    raise UserError(f"--weights: {path} does not exist.")
  # A folder's description is not of any other file that lies in it.
  folder = path if path.is_dir() else path.parent if path.name in load.IN_FOLDER else None
  config, preprocessor = (_json(folder / name) if folder else {} for name in _BESIDE)
  lines: list[str] = []
  encoder, channels = _encoder(load.read_state(path), config, heads, lines)
  view = _view(path, config, preprocessor, channels, dict(size=size, resize=resize, mean=tuple(mean), std=tuple(std)))
  if preprocessor.get("do_resize", True) and not preprocessor.get("do_center_crop", True):
    lines.append("preprocessor_config.json distorts images to a square; here the short side is resized, and cropped")
  loaded = load.load_weights(path, encoder)
  return Released(encoder, loaded.variables, view, channels, (*loaded.report, *lines))


_BESIDE = ("config.json", "preprocessor_config.json")


def _json(path):
  try:
    return json.loads(path.read_text()) if path.is_file() else {}
  except ValueError as error:
    raise UserError(f"{path} is damaged ({error}).") from None


def _encoder(state: Mapping[str, np.ndarray], config, heads, lines) -> tuple[nn.Module, int]:
  """The model that a state dict under timm's or torchvision's names is of, and the channels of its images."""
  ours = (config.get("ssl_jax") or {}).get("encoder") or {}
  if "patch_embed.proj.weight" not in state:
    kernel = state["conv1.weight"]
    stages = [0] * 4
    for name in state:
      if match := re.fullmatch(r"layer([1-4])\.\d+\.conv1\.weight", name):
        stages[int(match[1]) - 1] += 1
    bottleneck = "layer1.0.conv3.weight" in state
    shape: dict[str, Any] = dict(bottleneck=bottleneck, width=kernel.shape[0] / 64)
    shape |= dict(stem="imagenet" if kernel.shape[-1] == 7 else "small")
    shape |= dict(project_first=not bottleneck and "layer1.0.downsample.0.weight" in state)
    return ResNet(**{**shape, **ours, "stages": tuple(n for n in stages if n)}), kernel.shape[1]

  shape = layouts.vit_shape(state)
  dim, channels = state["patch_embed.proj.weight"].shape[:2]
  arguments = config.get("model_args") or {}
  pool = _FEATURES.get(arguments.get("global_pool", config.get("global_pool")), "cls")
  shape |= dict(features=ours.get("features", pool))
  if "image_size" in shape:
    positions = state["pos_embed"]
    shape |= dict(positions=_kind_of_positions(positions, layouts.grid_of(positions), dim))
  elif ours:
    shape |= dict(image_size=ours["image_size"], positions=ours["positions"])
  shape |= dict(resize=ours.get("resize", "offset") if ours else layouts.resize_of(state))
  told = ours.get("heads") or config.get("num_attention_heads") or arguments.get("num_heads")
  known = _OF_MOCO_V3 if shape.get("positions") == "row_first" else _HEADS.get(dim)
  heads = heads or told
  if not heads and not known:
    raise UserError(f"a ViT of width {dim} may have any number of heads, and nothing says how many: give --heads=N.")
  if not heads:
    lines.append(f"heads: {known}, as in the published models of width {dim}; --heads=N sets others")
  return ViT(**shape, heads=heads or known or 1), channels


def _kind_of_positions(positions, grid, dim):
  for kind in ("row_first", "column_first"):
    table = dim % 4 == 0 and sincos_positions(grid, grid, dim, kind == "row_first")
    if table is not False and positions.shape == table.shape and np.allclose(positions, table, atol=0.01):
      return kind
  return "learned"


def _view(path, config, preprocessor, channels, given) -> EvaluationView:
  """What the encoder sees: what is given, before what the folder says."""
  found: dict[str, Any] = {}
  images = config.get("pretrained_cfg") or {}
  if ours := (config.get("ssl_jax") or {}).get("eval_view"):
    found = {key: tuple(value) if isinstance(value, list) else value for key, value in ours.items()}
  elif preprocessor.get("image_mean"):
    size, crop = preprocessor.get("size") or {}, preprocessor.get("crop_size") or {}
    size, crop = (x if isinstance(x, dict) else {"height": x} for x in (size, crop))
    resize = size.get("shortest_edge") or size.get("height")
    found = dict(size=crop.get("height") if preprocessor.get("do_center_crop") else resize, resize=resize)
    found |= dict(mean=tuple(preprocessor["image_mean"]), std=tuple(preprocessor["image_std"]))
    found |= dict(interpolation=_FILTERS.get(preprocessor.get("resample", 2), "bilinear"))
  elif images.get("mean"):
    size = images["input_size"][1]
    found = dict(size=size, resize=int(size / images.get("crop_pct", 1)), interpolation=images["interpolation"])
    found |= dict(mean=tuple(images["mean"]), std=tuple(images["std"]))
  found |= {key: value for key, value in given.items() if value}
  if given["size"] and not given["resize"]:
    found["resize"] = given["size"]
  missing = [key for key in ("size", "mean", "std") if not found.get(key) and not ours]
  if missing:
    flags = dict(size="--size=224", mean="--mean=0.485,0.456,0.406", std="--std=0.229,0.224,0.225")
    raise UserError(
      f"what {path} was trained to see is not known, since no preprocessor_config.json lies beside it: give "
      f"{' '.join(flags[key] for key in missing)}, or the numbers that are right for it."
    )
  for key in ("mean", "std"):
    if len(found[key]) not in ((0, channels) if ours else (channels,)):
      raise UserError(f"--{key} must be {channels} numbers, one a channel of the weights, got {found[key]}.")
  if found.get("interpolation", "bicubic") not in _FILTERS.values():
    raise UserError(f"{path} wants the interpolation {found['interpolation']!r}; there are bilinear and bicubic.")
  if found["size"] > found["resize"]:
    raise UserError(f"a centre crop of size={found['size']} does not fit in resize={found['resize']}.")
  return EvaluationView(**found)
