"""Crops on the host, of one image at its own resolution: those of training, and evaluation's centre."""

import math
from collections.abc import Sequence

import numpy as np

from ssl_jax.augment import EvaluationView, View, by_resolution
from ssl_jax.data.image import MAX_PIXELS, ImageError
from ssl_jax.data.resize import resized_crop
from ssl_jax.random_streams import CROP


def least_pixels(views: Sequence[View], reduced: bool) -> float:
  """How many pixels a reduced image must have, so that no view's smallest crop has fewer than the view; else inf."""
  return max(view.size**2 / view.scale[0] for view in views) if reduced else math.inf


def cut_views(
  pixels: np.ndarray, views: Sequence[View], entropy: tuple[int, ...], size: tuple[int, ...] = ()
) -> tuple[np.ndarray, ...]:
  """The crops of all views of one image [H, W, C]: a tuple of uint8 [v, size, size, C], one a resolution.

  `size` is the image's real height and width where `pixels` are reduced: the crops are of the same parts of it.
  """
  size = size or pixels.shape[:2]
  parts = -(-size[0] // pixels.shape[0])  # A pixel is of parts x parts of them; the last may be of fewer.
  crops = []
  for i, view in enumerate(views):
    rng = np.random.default_rng((*entropy, i, CROP))
    top, left, h, w = crop_box(rng, size, view.scale, view.ratio)
    box = top / parts, left / parts, h / parts, w / parts
    crops.append(resized_crop(pixels, box, (view.size, view.size), view.interpolation))
  return tuple(np.stack([crops[i] for i in indices]) for indices in by_resolution(views).values())


def crop_box(rng: np.random.Generator, image_size: tuple[int, ...], scale, ratio) -> tuple[int, int, int, int]:
  """(top, left, height, width) of torchvision's RandomResizedCrop; `augment.crop_box` is the device's."""
  height, width = image_size
  for _ in range(10):
    area = height * width * rng.uniform(*scale)
    aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
    w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
    if 0 < w <= width and 0 < h <= height:
      return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
  h, w = min(height, round(width / ratio[0])), min(width, round(height * ratio[1]))
  return (height - h) // 2, (width - w) // 2, max(h, 1), max(w, 1)


def shrunk(pixels: np.ndarray, side: int) -> np.ndarray:
  """An image of any size, uint8 [H, W, C], as one of at most `side` pixels on each side; a smaller one as it is."""
  scale = side / max(pixels.shape[:2])
  if scale >= 1:
    return pixels
  height, width = pixels.shape[:2]
  size = max(1, round(height * scale)), max(1, round(width * scale))
  return resized_crop(pixels, (0, 0, height, width), size, "bilinear")


def centre_crop(pixels: np.ndarray, view: EvaluationView) -> np.ndarray:
  """Short side to `view.resize`, then the centre of `view.size`, as torchvision's Resize and CenterCrop."""
  height, width = pixels.shape[:2]
  short = min(height, width)
  size = view.resize * height // short, view.resize * width // short
  if size[0] * size[1] > MAX_PIXELS:
    raise ImageError(f"too long: {width}x{height} pixels")
  resized = resized_crop(pixels, (0, 0, height, width), size, view.interpolation)
  top, left = (round((s - view.size) / 2) for s in size)
  return resized[top : top + view.size, left : left + view.size]
