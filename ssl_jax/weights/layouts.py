"""The names and shapes of encoders in other libraries: Hugging Face's to timm's and back, channels, positions.

A state dict here has the names of the official files, which `convert` turns into ours, and arrays in PyTorch's layout.
timm's are the same, but for DINOv2's. Hugging Face's are those that its classes ViTModel, ViTMAEForPreTraining,
Dinov2Model, Dinov2WithRegistersModel and ResNetModel save.
"""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ssl_jax import convert
from ssl_jax.errors import UserError
from ssl_jax.models.vit import ViT, interpolate_positions, sincos_positions, swiglu_width

_VIT = {  # the official names and Hugging Face's, outside of the blocks
  "cls_token": "embeddings.cls_token",
  "pos_embed": "embeddings.position_embeddings",
  "mask_token": "embeddings.mask_token",
  "register_tokens": "embeddings.register_tokens",
  "patch_embed.proj": "embeddings.patch_embeddings.projection",
  "norm": "layernorm",
}
_BLOCK = {  # and in them
  "norm1": "layernorm_before",
  "norm2": "layernorm_after",
  "attn.proj": "attention.output.dense",
  "mlp.fc1": "intermediate.dense",
  "mlp.fc2": "output.dense",
}
_DINOV2_BLOCK = {  # and in DINOv2's
  "norm1": "norm1",
  "norm2": "norm2",
  "attn.proj": "attention.output.dense",
  "ls1": "layer_scale1",
  "ls2": "layer_scale2",
  "mlp.fc1": "mlp.fc1",
  "mlp.fc2": "mlp.fc2",
  "mlp.w12": "mlp.weights_in",
  "mlp.w3": "mlp.weights_out",
}
_LEAVES = {"weight": "weight", "bias": "bias", "gamma": "lambda1"}
_QKV = tuple(f"attention.attention.{part}" for part in ("query", "key", "value"))  # the thirds of attn.qkv's rows
_DECODER = {
  "mask_token": "mask_token",
  "decoder_pos_embed": "decoder_pos_embed",
  "decoder_embed": "decoder_embed",
  "decoder_norm": "decoder_norm",
  "decoder_pred": "decoder_pred",
}
_TORCHVISION = [  # the official names of a ViT and torchvision's
  (r"^cls_token$", "class_token"),
  (r"^patch_embed\.proj\.", "conv_proj."),
  (r"^pos_embed$", "encoder.pos_embedding"),
  (r"^norm\.", "encoder.ln."),
  (r"\bnorm(\d)\.", r"ln_\1."),
  (r"\battn\.qkv\.", "self_attention.in_proj_"),
  (r"\battn\.proj\.", "self_attention.out_proj."),
  (r"\bmlp\.fc1\.", "mlp.0."),
  (r"\bmlp\.fc2\.", "mlp.3."),
  (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
]
_TORCHVISION_BACK = [
  (r"^class_token$", "cls_token"),
  (r"^conv_proj\.", "patch_embed.proj."),
  (r"^encoder\.pos_embedding$", "pos_embed"),
  (r"^encoder\.ln\.", "norm."),
  (r"\bln_(\d)\.", r"norm\1."),
  (r"\bself_attention\.in_proj_", "attn.qkv."),
  (r"\bself_attention\.out_proj\.", "attn.proj."),
  (r"\bmlp\.(0|linear_1)\.", "mlp.fc1."),
  (r"\bmlp\.(3|linear_2)\.", "mlp.fc2."),
  (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
]
_RESNET = [
  (r"^conv1\.", "embedder.embedder.convolution."),
  (r"^bn1\.", "embedder.embedder.normalization."),
  (r"\bconv(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.convolution."),
  (r"\bbn(\d)\.", lambda m: f"layer.{int(m[1]) - 1}.normalization."),
  (r"\bdownsample\.0\.", "shortcut.convolution."),
  (r"\bdownsample\.1\.", "shortcut.normalization."),
  (r"^layer(\d)\.(\d+)\.", lambda m: f"encoder.stages.{int(m[1]) - 1}.layers.{m[2]}."),
]
_RESNET_BACK = [
  (r"^embedder\.embedder\.convolution\.", "conv1."),
  (r"^embedder\.embedder\.normalization\.", "bn1."),
  (r"\blayer\.(\d)\.convolution\.", lambda m: f"conv{int(m[1]) + 1}."),
  (r"\blayer\.(\d)\.normalization\.", lambda m: f"bn{int(m[1]) + 1}."),
  (r"\bshortcut\.convolution\.", "downsample.0."),
  (r"\bshortcut\.normalization\.", "downsample.1."),
  (r"^encoder\.stages\.(\d)\.layers\.(\d+)\.", lambda m: f"layer{int(m[1]) + 1}.{m[2]}."),
]


def vit_to_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The official names of a ViT -> ViTModel's; the fused query, key and value matrices are split."""
  return _to_hf(state, _VIT, _BLOCK, "blocks", "encoder.layer")


def dinov2_to_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """DINOv2's names -> those of Dinov2Model and Dinov2WithRegistersModel, as `vit_to_hf`."""
  return _to_hf(state, _VIT, _DINOV2_BLOCK, "blocks", "encoder.layer")


def decoder_to_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The official MAE's names of a decoder -> those of `decoder` in ViTMAEForPreTraining."""
  return _to_hf(state, _DECODER, _BLOCK, "decoder_blocks", "decoder_layers")


def _to_hf(state, outside, inside, blocks, layers):
  out = {}
  for name, value in state.items():
    if match := re.fullmatch(rf"{blocks}\.(\d+)\.(.+)\.({'|'.join(_LEAVES)})", name):
      number, part, leaf = match.groups()
      if part == "attn.qkv":
        for new, third in zip(_QKV, np.split(value, 3), strict=True):
          out[f"{layers}.{number}.{new}.{leaf}"] = third
      else:
        out[f"{layers}.{number}.{inside[part]}.{_LEAVES[leaf]}"] = value
    else:
      stem, dot, leaf = name.rpartition(".") if name not in outside else (name, "", "")
      out[outside[stem] + dot + leaf] = value
  return out


def vit_from_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `vit_to_hf` and `dinov2_to_hf`; names that they do not make stay as they are."""
  back, plain, dinov2, leaves = ({v: k for k, v in x.items()} for x in (_VIT, _BLOCK, _DINOV2_BLOCK, _LEAVES))
  inside = plain | dinov2
  out: dict[str, np.ndarray] = {}
  thirds: dict[tuple[str, str], dict[str, np.ndarray]] = {}
  for name, value in state.items():
    match = re.fullmatch(rf"encoder\.layer\.(\d+)\.(.+)\.({'|'.join(leaves)})", name)
    stem, _, leaf = name.rpartition(".")
    if match and match[2] in _QKV:
      thirds.setdefault((match[1], match[3]), {})[match[2]] = value
    elif match and match[2] in inside:
      out[f"blocks.{match[1]}.{inside[match[2]]}.{leaves[match[3]]}"] = value
    elif name in back:
      out[back[name]] = value
    elif stem in back:
      out[f"{back[stem]}.{leaf}"] = value
    else:
      out[name] = value
  for (number, leaf), parts in thirds.items():
    if len(parts) == 3:  # else qkv is missing, and said to be
      out[f"blocks.{number}.attn.qkv.{leaf}"] = np.concatenate([parts[part] for part in _QKV])
  return out


def vit_to_timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The official names of a ViT -> timm's, which are others for DINOv2's alone.

  timm has no mask token. Where there are registers it has no position of the class token: that is added to the token.
  """
  out = {re.sub(r"\.mlp\.w(12|3)\.", _fc_of, name): x for name, x in state.items() if name != "mask_token"}
  if "register_tokens" in out:
    positions = out["pos_embed"]
    out |= {"cls_token": out["cls_token"] + positions[:, :1], "pos_embed": np.ascontiguousarray(positions[:, 1:])}
    out["reg_token"] = out.pop("register_tokens")
  return out


def _fc_of(match):
  return ".mlp.fc1." if match[1] == "12" else ".mlp.fc2."


def vit_from_timm(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `vit_to_timm`, but that the position of the class token stays in it: what is read has 0 for it.

  Official files are read as they are. The numbers of a block are two where training saved it in chunks of blocks.
  """
  out = {re.sub(r"^blocks\.\d+\.(\d+\.)", r"blocks.\1", name): x for name, x in state.items()}
  if "reg_token" in out:
    out["register_tokens"] = out.pop("reg_token")
  positions = out.get("pos_embed", np.zeros(0))
  if positions.ndim == 3 and math.isqrt(positions.shape[1]) ** 2 == positions.shape[1]:  # patches alone
    out["pos_embed"] = np.concatenate([np.zeros_like(positions[:, :1]), positions], axis=1)
  first, last = (out.get(f"blocks.0.mlp.fc{i}.weight") for i in (1, 2))
  if first is not None and last is not None and len(first) == 2 * last.shape[-1]:  # both parts of a SwiGLU
    out = {name.replace(".mlp.fc1.", ".mlp.w12.").replace(".mlp.fc2.", ".mlp.w3."): x for name, x in out.items()}
  return out


def layout_of(names: Collection[str]) -> str:
  """Whose names these are of an encoder, in words; they are known to be some of those that are read."""
  registers = " with registers" if {"register_tokens", "embeddings.register_tokens"} & set(names) else ""
  if "reg_token" in names:
    return "timm's DINOv2 with registers, where the class token has its position in it"
  if any(re.match(r"encoder\.layer\.\d+\.layer_scale1\.", name) for name in names):
    return f"transformers' Dinov2{'WithRegisters' if registers else ''}Model"
  if registers or any(re.match(r"blocks\.[\d.]+\.(ls1|mlp\.w12)\.", name) for name in names):
    return f"DINOv2{registers}"
  whose = {
    "patch_embed.proj.weight": "DINO, MAE, MoCo v3 and timm",
    "embeddings.cls_token": "transformers' ViTModel",
    "conv_proj.weight": "torchvision's VisionTransformer",
    "conv1.weight": "torchvision and timm",
  }
  return next((whose[name] for name in whose if name in names), "transformers' ResNetModel")


def resnet_to_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """torchvision's names of a ResNet -> ResNetModel's."""
  return {_renamed(name, _RESNET): value for name, value in state.items()}


def resnet_from_hf(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `resnet_to_hf`; names that it does not make stay as they are."""
  return {_renamed(name, _RESNET_BACK): value for name, value in state.items()}


def vit_to_torchvision(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The official names of a ViT -> those of torchvision's VisionTransformer."""
  return {_renamed(name, _TORCHVISION): value for name, value in state.items()}


def vit_from_torchvision(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `vit_to_torchvision`; names that it does not make stay as they are."""
  return {_renamed(name, _TORCHVISION_BACK): value for name, value in state.items()}


def _renamed(name, rules):
  for pattern, replacement in rules:
    name = re.sub(pattern, replacement, name)
  return name


def whole_state(encoder: Any, variables: Mapping[str, Any], image_size: int | None = None) -> dict[str, np.ndarray]:
  """An encoder's state dict with all that its architecture has elsewhere, positions that we compute among it.

  Args:
    encoder: a ViT or a ResNet.
    variables: its variables.
    image_size: of the images, for a ViT: positions are those that the model has at this size; None: its own.

  Returns:
    float32 arrays by timm's and torchvision's names.
  """
  state = convert.to_torch({kind: tree for kind, tree in variables.items() if tree})
  if isinstance(encoder, ViT):
    grid = (image_size or encoder.image_size) // encoder.patch_size
    if encoder.positions == "learned":
      antialias = encoder.resize == "antialiased"
      positions = interpolate_positions(jnp.asarray(state["pos_embed"]), grid, grid, antialias=antialias)
      state["pos_embed"] = np.asarray(positions)
    else:
      state["pos_embed"] = sincos_positions(grid, grid, encoder.dim, encoder.positions == "row_first")
  return {name: np.ascontiguousarray(value, np.float32) for name, value in state.items()}


def with_channels(kernel: np.ndarray, channels: int) -> np.ndarray:
  """A first convolution [out, in, h, w] for images of other channels, as timm does it (`adapt_input_conv`).

  One channel: the sum over all, so that grey images give what they gave. Others: the three in turn, times 3 / channels.

  Raises:
    UserError: the file's is not for three channels and more than one are wanted.
  """
  if channels == kernel.shape[1]:
    return kernel
  kernel = np.asarray(kernel, np.float32)
  if channels == 1:
    return kernel.sum(axis=1, keepdims=True)
  if kernel.shape[1] != 3:
    raise UserError(f"weights of {kernel.shape[1]} channels cannot be made into {channels}: the rule is for three.")
  return kernel[:, np.arange(channels) % 3] * (3 / channels)


def vit_shape(state: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """The arguments of our ViT that a state dict under the official names shows; heads are none of them."""
  dim, _, _, patch = state["patch_embed.proj.weight"].shape
  depth = sum(re.fullmatch(r"blocks\.\d+\.norm1\.weight", name) is not None for name in state)
  shape: dict[str, Any] = dict(patch_size=patch, dim=dim, depth=depth, mlp_ratio=4)
  if (kernel := state.get("blocks.0.mlp.fc1.weight")) is not None:
    shape["mlp_ratio"] = len(kernel) / dim
  positions = state.get("pos_embed", np.zeros(0))
  if positions.ndim == 3:
    shape["image_size"] = grid_of(positions) * patch
  if (tokens := state.get("register_tokens")) is not None:
    shape["registers"] = tokens.shape[1]
  if "blocks.0.ls1.gamma" in state:
    shape["layer_scale"] = 1e-5  # as DINOv2 starts them
  if (kernel := state.get("blocks.0.mlp.w3.weight")) is not None:
    hidden = kernel.shape[1]
    shape |= dict(ffn="swiglu", mlp_ratio=4 if swiglu_width(dim, 4) == hidden else 1.5 * hidden / dim)
  return shape


def resize_of(state: Mapping[str, np.ndarray]) -> str:
  """How the official model with these weights resizes positions: DINOv2's with registers otherwise than all others."""
  return "antialiased" if {"register_tokens", "blocks.0.ls1.gamma"} <= state.keys() else "offset"


def facts(state: Mapping[str, np.ndarray]) -> str:
  """The model of ours that a state dict under the official or torchvision's names is of, as one would write it."""
  if (kernel := state.get("patch_embed.proj.weight")) is not None:
    if kernel.ndim != 4:
      return f"a ViT whose patch embedding {kernel.shape} is no convolution"
    shape = {key: repr(x) if isinstance(x, str) else f"{x:g}" for key, x in vit_shape(state).items()}
    return f"ViT({', '.join(f'{key}={value}' for key, value in shape.items())})"
  stages = [0] * 4
  for name in state:
    if match := re.fullmatch(r"layer([1-4])\.\d+\.conv1\.weight", name):
      stages[int(match[1]) - 1] += 1
  given = f"stages={tuple(n for n in stages if n)}"
  if "layer1.0.conv3.weight" in state:
    given += ", bottleneck=True"
  if "conv1.weight" in state and state["conv1.weight"].ndim == 4:
    out, channels, _, kernel = state["conv1.weight"].shape
    given += f", width={out / 64:g}, {'7x7' if kernel == 7 else f'{kernel}x{kernel}'} stem of {channels} channels"
  return f"ResNet({given})"


def grid_of(positions: np.ndarray) -> int:
  """Rows of patches of positions [1, 1 + g g, d]."""
  return math.isqrt(positions.shape[1] - 1)
