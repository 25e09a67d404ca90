"""An encoder as a folder that timm, transformers or torchvision loads, with the proof that features agree."""

import importlib.metadata
import importlib.util
import json
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ssl_jax import convert
from ssl_jax.augment import EvaluationView
from ssl_jax.errors import UserError
from ssl_jax.methods.mae import mask_from_noise
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT, sincos_positions
from ssl_jax.weights import layouts

TARGETS = ("timm", "hf", "torchvision", "safetensors")  # and "hf_mae", which has a decoder
TOLERANCE = 1e-4  # of the largest feature: float32 in another order of sums
_BICUBIC, _BILINEAR = 3, 2  # Pillow's numbers
_RESNETS = {  # (stages, bottleneck)
  ((2, 2, 2, 2), False): "resnet18",
  ((3, 4, 6, 3), False): "resnet34",
  ((3, 4, 6, 3), True): "resnet50",
  ((3, 4, 23, 3), True): "resnet101",
  ((3, 8, 36, 3), True): "resnet152",
}
_TIMM_VITS = {  # (dim, depth, heads, patch size); any other shape is one of these with `model_args`
  (192, 12, 3, 16): "vit_tiny_patch16_224",
  (384, 12, 6, 16): "vit_small_patch16_224",
  (384, 12, 6, 8): "vit_small_patch8_224",
  (768, 12, 12, 16): "vit_base_patch16_224",
  (768, 12, 12, 8): "vit_base_patch8_224",
  (1024, 24, 16, 16): "vit_large_patch16_224",
  (1280, 32, 16, 14): "vit_huge_patch14_224",
}


# Tokens and maps of the libraries as the features "flat", which keep positions apart.
_FLAT: dict[type, str] = {ViT: "[:, 1:].flatten(1)", ResNet: ".permute(0, 2, 3, 1).flatten(1)"}
_PARTS = ("resize", "registers", "layer_scale", "ffn")  # of a ViT, that the libraries' plain classes do not have


class Exported(NamedTuple):
  """What a folder gets.

  Attributes:
    target: one of TARGETS, or "hf_mae".
    state: the arrays of model.safetensors.
    config: config.json.
    preprocessor: preprocessor_config.json; None: config.json says it, or there is no library that reads it.
    usage: lines of Python that load it and use it.
    readers: the libraries that load it, the one that it is for first; none: only ours does.
  """

  target: str
  state: dict[str, np.ndarray]
  config: dict[str, Any]
  preprocessor: dict[str, Any] | None
  usage: str
  readers: tuple[str, ...]


def why_not(encoder: nn.Module, target: str, channels: int) -> str:
  """Why a library has no class for this encoder; empty: it has one."""
  if target == "safetensors":
    return ""
  if isinstance(encoder, ViT):
    if parts := [name for name in _PARTS if getattr(encoder, name) != getattr(ViT, name)]:
      return f"{target}'s class for a plain ViT has no {' or '.join(parts)}"
    if target == "hf" and encoder.features == "pooled":
      return "transformers' ViTModel has its norm before the pooling, and this encoder behind it"
    if target == "torchvision" and encoder.features != "cls":
      return f"torchvision's VisionTransformer gives the class token, and the features are {encoder.features!r}"
  elif not isinstance(encoder, ResNet):
    return f"no library has a class for {type(encoder).__name__}"
  else:
    if encoder.stem != "imagenet":
      return f"no library has a class for a ResNet with the stem {encoder.stem!r}"
    if encoder.project_first and not encoder.bottleneck:
      return "no library has basic blocks with a projection in the first one (project_first)"
    if target != "hf" and (encoder.width != 1 or (tuple(encoder.stages), encoder.bottleneck) not in _RESNETS):
      return f"{target} has no ResNet of stages={tuple(encoder.stages)}, width={encoder.width:g}"
  if target == "torchvision" and channels != 3:
    return f"torchvision's classes take 3 channels, and the images have {channels}"
  return ""


def make(
  encoder: nn.Module, variables: Any, view: EvaluationView, target: str, *, channels: int, facts: dict[str, Any]
) -> Exported:
  """Makes what a folder gets, for images as evaluation sees them.

  Args:
    encoder: a ViT or a ResNet.
    variables: its variables.
    view: what evaluation sees of an image: size, crop, interpolation, mean and std.
    target: one of TARGETS.
    channels: of the images.
    facts: of the run, for config.json's section `ssl_jax`.

  Raises:
    UserError: the library has no class for this encoder.
  """
  if reason := why_not(encoder, target, channels):
    raise UserError(f"{reason}: --to=safetensors writes the arrays alone.")
  state = layouts.whole_state(encoder, variables, view.size)
  if isinstance(encoder, ResNet) and target != "safetensors":  # PyTorch counts batches, and uses it nowhere
    counters = [name.replace("running_var", "num_batches_tracked") for name in state if name.endswith("running_var")]
    state |= {name: np.zeros((), np.int64) for name in counters}
  made = {"timm": _timm, "hf": _hf, "torchvision": _torchvision, "safetensors": _safetensors}[target]
  state, config, preprocessor, usage, readers = made(encoder, state, view, channels)
  config["ssl_jax"] = facts | {"encoder": shape_of(encoder), "channels": channels, "eval_view": view._asdict()}
  return Exported(target, state, config, preprocessor, usage, readers)


def make_mae(
  encoder: ViT, decoder: MAEDecoder, params: Any, view: EvaluationView, *, settings: Any, channels: int, facts: Any
) -> Exported:
  """A MAE with its decoder, as ViTMAEForPreTraining.

  Args:
    encoder, decoder: the modules.
    params: {"encoder", "decoder"}.
    view, channels, facts: see `make`.
    settings: the recipe's section `method`.
  """
  state = layouts.vit_to_hf(layouts.whole_state(encoder, {"params": params["encoder"]}, view.size))
  state = {f"vit.{name}": x for name, x in state.items()}
  grid = view.size // encoder.patch_size
  rest = convert.to_torch({"params": params["decoder"]})
  rest["decoder_pos_embed"] = sincos_positions(grid, grid, decoder.dim, row_first=False)
  state |= {f"decoder.{k}": np.ascontiguousarray(x, np.float32) for k, x in layouts.decoder_to_hf(rest).items()}
  config = vit_config(encoder, view, channels) | dict(architectures=["ViTMAEForPreTraining"], model_type="vit_mae")
  config |= dict(decoder_hidden_size=decoder.dim, decoder_num_hidden_layers=decoder.depth)
  config |= dict(decoder_num_attention_heads=decoder.heads, mask_ratio=settings.mask_ratio)
  config |= dict(
    decoder_intermediate_size=int(decoder.dim * decoder.mlp_ratio), norm_pix_loss=settings.normalize_target
  )
  config["ssl_jax"] = facts | {"encoder": shape_of(encoder), "channels": channels, "eval_view": view._asdict()}
  usage = (
    'model = transformers.ViTMAEForPreTraining.from_pretrained("FOLDER")\n'
    'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")\n'
    'patches = model(**processor(picture, return_tensors="pt")).logits  # of which most were removed at random'
  )
  return Exported("hf_mae", state, config, _preprocessor(view, channels), usage, ("transformers",))


def write(exported: Exported, folder: pathlib.Path) -> None:
  """Writes the files of a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  safetensors.numpy.save_file(exported.state, folder / "model.safetensors", metadata={"format": "pt"})
  texts = {"config.json": exported.config, "preprocessor_config.json": exported.preprocessor}
  for name, content in texts.items():
    if content is not None:
      (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def prove(
  exported: Exported, folder: pathlib.Path, encoder: nn.Module, variables: Any, images: np.ndarray
) -> dict[str, float]:
  """Loads the folder as its users do and compares features.

  Args:
    exported: what was written.
    folder: where.
    encoder, variables: the original.
    images: float32 [n, size, size, C], normalised.

  Returns:
    {library with its version: the largest difference, relative to the largest feature}; empty where none of the
    libraries is installed.
  """
  with jax.default_matmul_precision("highest"):
    want = np.asarray(encoder.clone(dtype=jnp.float32).apply(variables, images, train=False))
  read: dict[str, Callable] = dict(timm=_by_timm, transformers=_by_transformers, torchvision=_by_torchvision)
  needs = {"torch", *exported.readers[:1]}  # transformers reads timm's folders where timm is
  found = {}
  for library in exported.readers:
    if all(importlib.util.find_spec(name) for name in {*needs, library}):
      got = _as_ours(read[library](exported, folder, images.transpose(0, 3, 1, 2).copy()), encoder.features)
      difference = np.max(np.abs(got - want)) / np.max(np.abs(want))
      found[f"{library} {importlib.metadata.version(library)}"] = float(difference)
  return found


def prove_mae(
  folder: pathlib.Path, encoder: ViT, decoder: MAEDecoder, params: Any, images: np.ndarray, mask_ratio: float
) -> dict[str, float]:
  """As `prove`, for a MAE with its decoder: the predicted patches, where the same ones are removed."""
  if not (importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")):
    return {}
  import torch
  import transformers

  grid = tuple(side // encoder.patch_size for side in images.shape[1:3])
  noise = np.random.default_rng(0).random((len(images), grid[0] * grid[1]), np.float32)
  visible, _, restore = mask_from_noise(jnp.asarray(noise), int(noise.shape[1] * (1 - mask_ratio)))
  with jax.default_matmul_precision("highest"):
    encode = encoder.clone(dtype=jnp.float32).apply
    tokens = encode({"params": params["encoder"]}, images, keep=visible, method="tokens")
    decode = decoder.clone(dtype=jnp.float32).apply
    want = np.asarray(decode({"params": params["decoder"]}, tokens, restore, grid))
  model = transformers.ViTMAEForPreTraining.from_pretrained(folder).eval()
  with torch.no_grad():
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    got = model(pixels, noise=torch.from_numpy(noise)).logits.numpy()
  difference = np.max(np.abs(got - want)) / np.max(np.abs(want))
  return {f"transformers {importlib.metadata.version('transformers')}": float(difference)}


def _timm(encoder, state, view, channels):
  if isinstance(encoder, ViT):
    shape = encoder.dim, encoder.depth, encoder.heads, encoder.patch_size
    name, width = _TIMM_VITS.get(shape, "vit_base_patch16_224"), encoder.dim
    pool = {"cls": "token", "mean": "avg", "flat": "", "pooled": "avg"}[encoder.features]
    args = dict(img_size=view.size, patch_size=encoder.patch_size, embed_dim=encoder.dim, depth=encoder.depth)
    # Without fc_norm=False timm's mean is taken before the last norm, which gives other features.
    args |= dict(num_heads=encoder.heads, mlp_ratio=encoder.mlp_ratio, global_pool=pool)
    args |= dict(fc_norm=encoder.features == "pooled")
    layers = dict(first_conv="patch_embed.proj", classifier="head", fixed_input_size=True)
  else:
    name, width = _RESNETS[tuple(encoder.stages), encoder.bottleneck], _width(encoder)
    pool = "avg" if encoder.features == "pooled" else ""
    args, layers = dict(global_pool=pool), dict(first_conv="conv1", classifier="fc")
  images = dict(input_size=[channels, view.size, view.size], interpolation=view.interpolation)
  images |= dict(crop_pct=_crop_share(view), crop_mode="center", mean=_mean(view, channels), std=_std(view, channels))
  config = dict(architecture=name, num_classes=0, num_features=width, global_pool=pool)
  config |= dict(model_args=args | dict(in_chans=channels), pretrained_cfg=images | dict(num_classes=0, **layers))
  picked = "" if encoder.features != "flat" else _FLAT[type(encoder)]
  usage = (
    'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
    "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
    f"features = model(transform(picture)[None]){picked}\n"
    'model = transformers.AutoModel.from_pretrained("FOLDER")  # the same by transformers, with timm installed'
  )
  return state, config, None, usage, ("timm", "transformers")


def _hf(encoder, state, view, channels):
  if isinstance(encoder, ViT):
    config = vit_config(encoder, view, channels) | dict(architectures=["ViTModel"], model_type="vit")
    picked = {"cls": "[:, 0]", "mean": "[:, 1:].mean(1)", "flat": _FLAT[ViT]}[encoder.features]
    usage = (
      'model = transformers.AutoModel.from_pretrained("FOLDER", add_pooling_layer=False)  # its pooler is not trained\n'
      'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")\n'
      f'features = model(**processor(picture, return_tensors="pt")).last_hidden_state{picked}'
    )
    state = layouts.vit_to_hf(state)
  else:
    width, block = int(64 * encoder.width), "bottleneck" if encoder.bottleneck else "basic"
    sizes = [width * 2**i * (4 if encoder.bottleneck else 1) for i in range(len(encoder.stages))]
    config = dict(architectures=["ResNetModel"], model_type="resnet", num_channels=channels, embedding_size=width)
    config |= dict(hidden_sizes=sizes, depths=list(encoder.stages), layer_type=block, hidden_act="relu")
    config |= dict(downsample_in_first_stage=False, downsample_in_bottleneck=False)
    pooled = "pooler_output.flatten(1)" if encoder.features == "pooled" else f"last_hidden_state{_FLAT[ResNet]}"
    usage = (
      'model = transformers.AutoModel.from_pretrained("FOLDER")\n'
      'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")\n'
      f'features = model(**processor(picture, return_tensors="pt")).{pooled}'
    )
    state = layouts.resnet_to_hf(state)
  return state, config, _preprocessor(view, channels), usage, ("transformers",)


def vit_config(encoder: ViT, view: EvaluationView, channels: int) -> dict[str, Any]:
  """The shape of a ViT as transformers' ViTConfig and ViTMAEConfig name it."""
  return dict(
    hidden_size=encoder.dim,
    num_hidden_layers=encoder.depth,
    num_attention_heads=encoder.heads,
    intermediate_size=int(encoder.dim * encoder.mlp_ratio),
    hidden_act="gelu",
    layer_norm_eps=1e-6,  # transformers' default is 1e-12
    image_size=view.size,
    patch_size=encoder.patch_size,
    num_channels=channels,
    qkv_bias=True,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
  )


def _torchvision(encoder, state, view, channels):
  if isinstance(encoder, ResNet):
    name, head, arguments = _RESNETS[tuple(encoder.stages), encoder.bottleneck], "fc", {}
  else:
    state, name, head = layouts.vit_to_torchvision(state), "VisionTransformer", "heads"
    arguments = dict(image_size=view.size, patch_size=encoder.patch_size, num_layers=encoder.depth)
    arguments |= dict(num_heads=encoder.heads, hidden_dim=encoder.dim, mlp_dim=int(encoder.dim * encoder.mlp_ratio))
  usage = (
    f"model = torchvision.models.{name}({', '.join(f'{key}={value}' for key, value in arguments.items())})\n"
    f"model.{head} = torch.nn.Identity()\n"
    'model.load_state_dict(safetensors.torch.load_file("FOLDER/model.safetensors"))\n'
    "features = model.eval()(images)  # [b, C, size, size], normalised"
  )
  return state, dict(architecture=name, arguments=arguments), _preprocessor(view, channels), usage, ("torchvision",)


def _safetensors(encoder, state, view, channels):
  usage = (
    "from ssl_jax.models import resnet, vit\n\n"
    f"model = {in_python(encoder)}\n"
    'variables = ssl_jax.load_weights("FOLDER", model).variables\n'
    "features = model.apply(variables, images, train=False)  # images: [b, size, size, C], normalised"
  )
  return state, {}, None, usage, ()


def shape_of(encoder: nn.Module) -> dict[str, Any]:
  """The attributes of a ViT or ResNet that its weights and features depend on."""
  names = ["patch_size", "dim", "depth", "heads", "mlp_ratio", "image_size", "positions", "features"]
  if isinstance(encoder, ResNet):
    names = ["stages", "bottleneck", "width", "stem", "features", "project_first"]
  else:
    names += [name for name in _PARTS if getattr(encoder, name) != getattr(ViT, name)]
  return {name: getattr(encoder, name) for name in names}


def in_python(encoder: nn.Module) -> str:
  """The module as Python that makes it."""
  home = "vit.ViT" if isinstance(encoder, ViT) else "resnet.ResNet"
  return f"{home}({', '.join(f'{name}={value!r}' for name, value in shape_of(encoder).items())})"


def _width(encoder):
  return int(64 * encoder.width) * 2 ** (len(encoder.stages) - 1) * (4 if encoder.bottleneck else 1)


def _preprocessor(view, channels):
  return dict(
    image_processor_type="BitImageProcessor",
    do_resize=True,
    size={"shortest_edge": view.resize},
    resample=_BICUBIC if view.interpolation == "bicubic" else _BILINEAR,
    do_center_crop=True,
    crop_size={"height": view.size, "width": view.size},
    do_rescale=True,
    rescale_factor=1 / 255,
    do_normalize=True,
    image_mean=_mean(view, channels),
    image_std=_std(view, channels),
    do_convert_rgb=channels == 3,
  )


def _mean(view, channels) -> Sequence[float]:
  return list(view.mean) or [0.0] * channels


def _std(view, channels) -> Sequence[float]:
  return list(view.std) or [1.0] * channels


def _crop_share(view):
  """timm's crop_pct, from which it computes the side to resize to as floor(size / crop_pct)."""
  share = view.size / view.resize
  return share if math.floor(view.size / share) == view.resize else math.nextafter(share, 0)


def _as_ours(outputs, features):
  """Tokens [b, 1 + n, d], maps [b, C, h, w] or features [b, d] of a library, pooled as the encoder does."""
  if outputs.ndim == 2:
    return outputs
  if outputs.ndim == 4:
    maps = outputs.transpose(0, 2, 3, 1)
    return maps.mean((1, 2)) if features == "pooled" else maps.reshape(len(maps), -1)
  if features == "cls":
    return outputs[:, 0]
  return outputs[:, 1:].mean(1) if features == "mean" else outputs[:, 1:].reshape(len(outputs), -1)


def _by_timm(exported, folder, images):
  import timm
  import torch

  model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
  with torch.no_grad():
    return model(torch.from_numpy(images)).numpy()


def _by_transformers(exported, folder, images):
  import torch
  import transformers

  given = dict(add_pooling_layer=False) if exported.config.get("model_type") == "vit" else {}
  model = transformers.AutoModel.from_pretrained(folder, **given).eval()
  with torch.no_grad():
    outputs = model(torch.from_numpy(images))
  if exported.target == "timm" and outputs.pooler_output is not None:
    return outputs.pooler_output.numpy()
  return outputs.last_hidden_state.numpy()


def _by_torchvision(exported, folder, images):
  import safetensors.torch
  import torch
  import torchvision

  model = getattr(torchvision.models, exported.config["architecture"])(**exported.config["arguments"])
  setattr(model, "fc" if hasattr(model, "fc") else "heads", torch.nn.Identity())
  model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
  with torch.no_grad():
    return model.eval()(torch.from_numpy(images)).numpy()
