"""That other libraries load what was exported, and give the same features."""

import importlib.metadata
import importlib.util
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from ssl_jax.methods.mae import mask_from_noise
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.models.vit import ViT
from ssl_jax.weights.export import PROGRAM, Exported

TOLERANCE = 1e-4  # of the largest feature: float32 in another order of sums


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
  read: dict[str, Callable] = dict(
    timm=_by_timm, transformers=_by_transformers, torchvision=_by_torchvision, jax=_by_jax
  )
  needs = {"torch" if exported.program is None else "jax", *exported.readers[:1]}  # transformers reads timm's by timm
  found = {}
  for library in exported.readers:
    if all(importlib.util.find_spec(name) for name in {*needs, library}):
      got = _as_ours(read[library](exported, folder, images.transpose(0, 3, 1, 2).copy()), encoder)
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


def _as_ours(outputs, encoder):
  """Tokens [b, 1 + registers + n, d], maps [b, C, h, w] or features [b, d] of a library, pooled as the encoder does."""
  if outputs.ndim == 2:
    return outputs
  if outputs.ndim == 4:
    maps = outputs.transpose(0, 2, 3, 1)
    return maps.mean((1, 2)) if encoder.features == "pooled" else maps.reshape(len(maps), -1)
  if encoder.features == "cls":
    return outputs[:, 0]
  patches = outputs[:, 1 + encoder.registers :]
  return patches.mean(1) if encoder.features == "mean" else patches.reshape(len(patches), -1)


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


def _by_jax(exported, folder, images):
  program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
  return np.asarray(program.call(jnp.asarray(images.transpose(0, 2, 3, 1))))


def _by_torchvision(exported, folder, images):
  import safetensors.torch
  import torch
  import torchvision

  model = getattr(torchvision.models, exported.config["architecture"])(**exported.config["arguments"])
  setattr(model, "fc" if hasattr(model, "fc") else "heads", torch.nn.Identity())
  model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"))
  with torch.no_grad():
    return model.eval()(torch.from_numpy(images)).numpy()
