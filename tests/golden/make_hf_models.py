"""Made hf_models.npz by transformers 5.24 and torch 2.13: small random models, as they save themselves, and outputs."""

import pathlib
import tempfile

import numpy as np
import safetensors.numpy
import torch
from named_weights import named_images
from transformers import ResNetConfig, ResNetModel, ViTConfig, ViTModel

SHAPE = (2, 16, 16, 3)


def arrays(name, model):
  for parameter in model.parameters():
    torch.nn.init.normal_(parameter, 0.1, 0.3)
  for key, value in model.named_buffers():
    if key.endswith("running_mean"):
      value.normal_(0, 0.1)
    elif key.endswith("running_var"):
      value.uniform_(0.5, 1.5)
  model.eval()
  with tempfile.TemporaryDirectory() as folder, torch.no_grad():
    model.save_pretrained(folder)
    state = safetensors.numpy.load_file(pathlib.Path(folder) / "model.safetensors")
    images = torch.from_numpy(named_images(name, SHAPE).transpose(0, 3, 1, 2).copy())
    output = model(images)
  pooled = output.last_hidden_state[:, 0] if name == "vit" else output.pooler_output.flatten(1)
  return {f"{name}/{key}": value for key, value in state.items()} | {f"{name}_features": pooled.numpy()}


if __name__ == "__main__":
  torch.manual_seed(0)
  shape = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96)
  vit = ViTConfig(**shape, image_size=16, patch_size=4, layer_norm_eps=1e-6)
  resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
  made = arrays("vit", ViTModel(vit)) | arrays("resnet", ResNetModel(resnet))
  np.savez_compressed(pathlib.Path(__file__).parent / "hf_models.npz", **made)
