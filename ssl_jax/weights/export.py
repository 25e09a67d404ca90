"""An encoder as a folder that timm, transformers or torchvision loads."""

import importlib.util
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from ssl_jax import convert
from ssl_jax.augment import EvaluationView
from ssl_jax.errors import UserError
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.models.resnet import ResNet
from ssl_jax.models.vit import ViT, sincos_positions, swiglu_width
from ssl_jax.weights import layouts

TARGETS = ("timm", "hf", "torchvision", "safetensors")  # and "hf_mae", which has a decoder, and "stablehlo"
PROGRAM = "features.stablehlo"
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
_TIMM_DINOV2 = {(384, 12, 6): "small", (768, 12, 12): "base", (1024, 24, 16): "large"}  # likewise
_DINOV2 = ("registers", "layer_scale", "ffn")  # parts of a ViT, which the libraries' classes for DINOv2 alone have
_PARTS = ("resize", "mask_token", *_DINOV2)  # that a plain ViT does not have
_MAPS = ".permute(0, 2, 3, 1).flatten(1)"  # the libraries' maps as the features "flat", which keep positions apart


class Exported(NamedTuple):
  """What a folder gets.

  Attributes:
    target: one of TARGETS, "hf_mae" or "stablehlo".
    state: the arrays of model.safetensors, or of the program.
    config: config.json.
    preprocessor: preprocessor_config.json; None: config.json says it, or there is no library that reads it.
    usage: lines of Python that load it and use it.
    readers: the libraries that load it, the one that it is for first; none: only ours does.
    left_out: the encoder's arrays that this layout has no place for.
    program: what `jax.export.deserialize` takes, in place of model.safetensors.
  """

  target: str
  state: dict[str, np.ndarray]
  config: dict[str, Any]
  preprocessor: dict[str, Any] | None
  usage: str
  readers: tuple[str, ...]
  left_out: tuple[str, ...] = ()
  program: bytes | None = None


def why_not(encoder: nn.Module, target: str, channels: int) -> str:
  """Why a library has no class for this encoder; empty: it has one."""
  if target == "safetensors":
    return ""
  if isinstance(encoder, ViT):
    parts = [name for name in _DINOV2 if getattr(encoder, name) != getattr(ViT, name)]
    if target == "torchvision" and parts:
      return f"torchvision's VisionTransformer has no {' or '.join(parts)}"
    if target == "hf" and parts and encoder.layer_scale is None:
      return "transformers' Dinov2Model has layer_scale, and this encoder has none"
    if target == "hf" and parts and encoder.mlp_ratio != int(encoder.mlp_ratio):
      return f"transformers' Dinov2Model takes a whole mlp_ratio, and this encoder has {encoder.mlp_ratio:g}"
    if target == "hf" and encoder.features == "pooled":
      return "transformers' models have their norm before the pooling, and this encoder behind it"
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
  left_out = []
  holds_mask_token = target == "safetensors" or (target == "hf" and _is_dinov2(encoder))
  if "mask_token" in state and not holds_mask_token:
    left_out.append("mask_token")
    encoder, _ = encoder.clone(mask_token=False), state.pop("mask_token")
  if isinstance(encoder, ResNet) and target != "safetensors":  # PyTorch counts batches, and uses it nowhere
    counters = [name.replace("running_var", "num_batches_tracked") for name in state if name.endswith("running_var")]
    state |= {name: np.zeros((), np.int64) for name in counters}
  made = {"timm": _timm, "hf": _hf, "torchvision": _torchvision, "safetensors": _safetensors}[target]
  state, config, preprocessor, usage, readers = made(encoder, state, view, channels)
  config["ssl_jax"] = facts | {"encoder": shape_of(encoder), "channels": channels, "eval_view": view._asdict()}
  return Exported(target, state, config, preprocessor, usage, readers, tuple(left_out))


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


def make_program(
  encoder: nn.Module, variables: Any, view: EvaluationView, *, channels: int, facts: dict[str, Any]
) -> Exported:
  """The encoder with its weights as a program of StableHLO, which jax alone runs, on CPUs, CUDA's GPUs and TPUs.

  It maps float32 [b, size, size, C], normalised, for any b to the features, float32 [b, d], in float32 throughout.

  Args:
    encoder, variables, view, channels, facts: see `make`.

  Raises:
    UserError: flatbuffers is not installed, by which jax writes and reads such files.
  """
  if importlib.util.find_spec("flatbuffers") is None:
    raise UserError("--to=stablehlo needs flatbuffers here: pip install flatbuffers.")
  encoder, arrays = encoder.clone(dtype=jnp.float32), jax.tree.map(np.asarray, variables)
  (b,) = jax.export.symbolic_shape("b")
  images = jax.ShapeDtypeStruct((b, view.size, view.size, channels), jnp.float32)
  with jax.default_matmul_precision("highest"):
    features = jax.jit(lambda images: encoder.apply(arrays, images, train=False))
    program = jax.export.export(features, platforms=("cpu", "cuda", "tpu"))(images)
  state = layouts.whole_state(encoder, variables, view.size)
  left_out = ("mask_token",) if state.pop("mask_token", None) is not None else ()
  config: dict[str, Any] = dict(program=PROGRAM, jax=jax.__version__)
  config["ssl_jax"] = facts | {"encoder": shape_of(encoder), "channels": channels, "eval_view": view._asdict()}
  usage = (
    f'with open("FOLDER/{PROGRAM}", "rb") as file:\n  program = jax.export.deserialize(bytearray(file.read()))\n'
    f"features = program.call(images)  # float32 [b, {view.size}, {view.size}, {channels}], normalised"
  )
  return Exported("stablehlo", state, config, None, usage, ("jax",), left_out, bytes(program.serialize()))


def write(exported: Exported, folder: pathlib.Path) -> None:
  """Writes the files of a folder."""
  folder.mkdir(parents=True, exist_ok=True)
  if exported.program is None:
    safetensors.numpy.save_file(exported.state, folder / "model.safetensors", metadata={"format": "pt"})
  else:
    (folder / PROGRAM).write_bytes(exported.program)
  texts = {"config.json": exported.config, "preprocessor_config.json": exported.preprocessor}
  for name, content in texts.items():
    if content is not None:
      (folder / name).write_text(json.dumps(content, indent=2) + "\n")


def _is_dinov2(encoder):
  """Whether it takes the libraries' classes for DINOv2 to hold it."""
  return isinstance(encoder, ViT) and any(getattr(encoder, name) != getattr(ViT, name) for name in _DINOV2)


def _timm(encoder, state, view, channels):
  if isinstance(encoder, ViT):
    name, own = _timm_vit(encoder)
    width, state = encoder.dim, layouts.vit_to_timm(state)
    pool = {"cls": "token", "mean": "avg", "flat": "", "pooled": "avg"}[encoder.features]
    args = dict(img_size=view.size, patch_size=encoder.patch_size, embed_dim=encoder.dim, depth=encoder.depth)
    # Without fc_norm=False timm's mean is taken before the last norm, which gives other features.
    args |= dict(num_heads=encoder.heads, global_pool=pool, fc_norm=encoder.features == "pooled") | own
    layers = dict(first_conv="patch_embed.proj", classifier="head", fixed_input_size=True)
  else:
    name, width = _RESNETS[tuple(encoder.stages), encoder.bottleneck], _width(encoder)
    pool = "avg" if encoder.features == "pooled" else ""
    args, layers = dict(global_pool=pool), dict(first_conv="conv1", classifier="fc")
  images = dict(input_size=[channels, view.size, view.size], interpolation=view.interpolation)
  images |= dict(crop_pct=_crop_share(view), crop_mode="center", mean=_mean(view, channels), std=_std(view, channels))
  config = dict(architecture=name, num_classes=0, num_features=width, global_pool=pool)
  config |= dict(model_args=args | dict(in_chans=channels), pretrained_cfg=images | dict(num_classes=0, **layers))
  picked = (
    "" if encoder.features != "flat" else _MAPS if isinstance(encoder, ResNet) else f"{_patches(encoder)}.flatten(1)"
  )
  usage = (
    'model = timm.create_model("local-dir:FOLDER", pretrained=True).eval()\n'
    "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))\n"
    f"features = model(transform(picture)[None]){picked}\n"
    'model = transformers.AutoModel.from_pretrained("FOLDER")  # the same by transformers, with timm installed'
  )
  return state, config, None, usage, ("timm", "transformers")


def _timm_vit(encoder):
  """(the name of timm's function for a ViT, the arguments that are not all ViTs')."""
  if not _is_dinov2(encoder):
    shape = encoder.dim, encoder.depth, encoder.heads, encoder.patch_size
    return _TIMM_VITS.get(shape, "vit_base_patch16_224"), dict(mlp_ratio=encoder.mlp_ratio)
  # The class of a feed-forward network is no argument that JSON holds: only the giant's functions have SwiGLU.
  size = "giant" if encoder.ffn == "swiglu" else _TIMM_DINOV2.get((encoder.dim, encoder.depth, encoder.heads), "base")
  # 0 is no LayerScale for timm as None is, which transformers' wrapper of timm would take for the function's own.
  args = dict(mlp_ratio=encoder.mlp_ratio, init_values=encoder.layer_scale or 0.0)
  if encoder.ffn == "swiglu":  # timm computes the width of both parts as int(dim * mlp_ratio)
    width = 2 * swiglu_width(encoder.dim, encoder.mlp_ratio)
    ratio = width / encoder.dim
    args["mlp_ratio"] = ratio if int(encoder.dim * ratio) == width else math.nextafter(ratio, math.inf)
  if encoder.registers:
    args |= dict(reg_tokens=encoder.registers, no_embed_class=True)
  return f"vit_{size}_patch14_{'reg4_' if encoder.registers else ''}dinov2", args


def _hf(encoder, state, view, channels):
  if isinstance(encoder, ViT):
    picked = {"cls": "[:, 0]", "mean": f"{_patches(encoder)}.mean(1)", "flat": f"{_patches(encoder)}.flatten(1)"}
    config, load = vit_config(encoder, view, channels), 'transformers.AutoModel.from_pretrained("FOLDER")'
    if _is_dinov2(encoder):
      state, config = _dinov2(encoder, state, config)
    else:
      state, config = layouts.vit_to_hf(state), config | dict(architectures=["ViTModel"], model_type="vit")
      load = f"{load[:-1]}, add_pooling_layer=False)  # its pooler is not trained"
    usage = (
      f"model = {load}\n"
      'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")\n'
      f'features = model(**processor(picture, return_tensors="pt")).last_hidden_state{picked[encoder.features]}'
    )
  else:
    width, block = int(64 * encoder.width), "bottleneck" if encoder.bottleneck else "basic"
    sizes = [width * 2**i * (4 if encoder.bottleneck else 1) for i in range(len(encoder.stages))]
    config = dict(architectures=["ResNetModel"], model_type="resnet", num_channels=channels, embedding_size=width)
    config |= dict(hidden_sizes=sizes, depths=list(encoder.stages), layer_type=block, hidden_act="relu")
    config |= dict(downsample_in_first_stage=False, downsample_in_bottleneck=False)
    pooled = "pooler_output.flatten(1)" if encoder.features == "pooled" else f"last_hidden_state{_MAPS}"
    usage = (
      'model = transformers.AutoModel.from_pretrained("FOLDER")\n'
      'processor = transformers.AutoImageProcessor.from_pretrained("FOLDER")\n'
      f'features = model(**processor(picture, return_tensors="pt")).{pooled}'
    )
    state = layouts.resnet_to_hf(state)
  return state, config, _preprocessor(view, channels), usage, ("transformers",)


def _dinov2(encoder, state, config):
  """(arrays, config) of Dinov2Model or Dinov2WithRegistersModel, out of those of a ViTModel."""
  config = config | dict(architectures=["Dinov2Model"], model_type="dinov2", use_mask_token=encoder.mask_token)
  config |= dict(mlp_ratio=int(encoder.mlp_ratio), use_swiglu_ffn=encoder.ffn == "swiglu")
  config |= dict(layerscale_value=encoder.layer_scale)
  del config["intermediate_size"]
  if encoder.registers:  # this class always has a mask token
    state = {"mask_token": np.zeros((1, encoder.dim), np.float32)} | state
    config |= dict(architectures=["Dinov2WithRegistersModel"], model_type="dinov2_with_registers")
    config |= dict(num_register_tokens=encoder.registers)
    del config["use_mask_token"]
  return layouts.dinov2_to_hf(state), config


def _patches(encoder):
  return f"[:, {1 + encoder.registers}:]"


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
