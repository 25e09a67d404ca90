"""Two steps of the paper's models at the paper's resolution, on a CPU: long, so only by hand (pytest -m slow)."""

import importlib.util
import pathlib

import jax
import numpy as np
import pytest
from test_all_methods import in_memory

from ssl_jax import build, parallel

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.mark.slow
@pytest.mark.parametrize(
  ("name", "batch", "encoder", "parameters"),
  [
    ("simclr_imagenet", 4, "resnet50", 23_508_032),
    ("byol_imagenet", 4, "resnet50", 23_508_032),
    ("mae_imagenet", 2, "vit_base", 85_647_360),  # timm's without its positions, which are fixed
    ("dino_imagenet", 2, "vit_small", 21_665_664),
  ],
)
def test_the_papers_model_takes_two_steps(name, batch, encoder, parameters, monkeypatch, mesh, optimised):
  spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = module.get_config()
  config.batch_size, config.steps, config.dtype = batch, 4, "float32"
  config.lr.warmup_epochs = 0
  images = np.random.default_rng(0).integers(0, 256, (8, 256, 256, 3), dtype=np.uint8)
  monkeypatch.setattr(build, "dataset", lambda config, split: in_memory(images, np.zeros(8, np.int32), split))
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(1))
  run = build.run(config)
  assert config.encoder.name == encoder
  assert sum(x.size for x in jax.tree.leaves(run.state.params["encoder"])) == parameters
  if name == "dino_imagenet":
    assert [view["size"] for view in config.views] == 2 * [224] + 8 * [96] and config.method.head.prototypes == 65536
  state = run.init()
  before = jax.device_get(state.params["encoder"])
  for step in range(2):
    batch_images = images[step * batch : (step + 1) * batch]
    state, row = run.train_step(state, parallel.put_batch(run.mesh, {"image": batch_images}))
    assert all(np.isfinite(x) for x in jax.device_get(row).values())
  moved = [
    np.any(a != b) for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(state.params["encoder"]), strict=True)
  ]
  assert np.mean(moved) > 0.5
