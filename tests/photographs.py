"""Photographs that tests make."""

import numpy as np
import PIL.Image


def photograph(path, seed, size=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  width, height = size or rng.integers(24, 60, 2).tolist()
  coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
  PIL.Image.fromarray(coarse).resize((width, height)).save(path)
