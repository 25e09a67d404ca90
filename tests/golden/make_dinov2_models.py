"""Made dinov2_models.npz by transformers 5.24, timm 1.0.31 and torch 2.14: the features of small models of DINOv2.

Weights are `named_weight(model/name, shape)` of the names that the libraries save, which are stored with their shapes.
"""

import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import timm
import torch
from named_weights import named_images, named_weight
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

SHAPE = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=3, image_size=16, patch_size=4)


def made(name, shapes, features):
  """What is stored of a model: `features` takes its weights by name and gives a model of tokens or features."""
  state = {key: named_weight(f"{name}/{key}", shape) for key, shape in shapes.items()}
  images = torch.from_numpy(named_images(name, (2, 16, 16, 3)).transpose(0, 3, 1, 2).copy())
  with torch.no_grad():
    output = features(state, images)
  about = {"names": np.array(list(shapes)), "shapes": np.array([str(list(shape)) for shape in shapes.values()])}
  return {f"{name}/{key}": value for key, value in about.items()} | {f"{name}/features": output.numpy()}


def by_transformers(name, model):
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "model.safetensors"
    model.save_pretrained(folder)
    shapes = {key: x.shape for key, x in safetensors.numpy.load_file(file).items()}

    def features(state, images):
      safetensors.numpy.save_file(state, file, metadata={"format": "pt"})
      return type(model).from_pretrained(folder).eval()(images).last_hidden_state[:, 0]

    return made(name, shapes, features)


def by_timm(name, function, **arguments):
  model = timm.create_model(function, num_classes=0, img_size=16, patch_size=4, embed_dim=24, **arguments).eval()

  def features(state, images):
    model.load_state_dict({key: torch.from_numpy(x) for key, x in state.items()})
    return model(images)

  return made(name, {key: tuple(x.shape) for key, x in model.state_dict().items()}, features)


if __name__ == "__main__":
  plain = Dinov2Model(Dinov2Config(**SHAPE))
  registers = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SHAPE, use_swiglu_ffn=True, num_register_tokens=3))
  found = by_transformers("dinov2", plain) | by_transformers("dinov2_with_registers", registers)
  timms = dict(depth=1, num_heads=3, reg_tokens=3, mlp_ratio=2 * 64 / 24)
  found |= by_timm("timm_reg", "vit_giant_patch14_reg4_dinov2", **timms)
  np.savez_compressed(pathlib.Path(__file__).parent / "dinov2_models.npz", **found)
