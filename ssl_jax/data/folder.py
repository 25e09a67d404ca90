"""A folder of images of one size, read into one array."""

import os
import pathlib

import numpy as np
import PIL.Image

from ssl_jax.data.dataset import Dataset, check_channels, to_pixels
from ssl_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


def load_folder(folder: str | os.PathLike, split: str, *, channels: int = 3) -> Dataset:
  """Reads `folder/split/class/**` or, where there is no such split folder, `folder/class/**` or `folder/*`.

  Hidden files and folders and other files than images are left out. The order is that of the relative paths' bytes, so
  that it does not depend on the file system or the locale. Images in no class folder have no labels.

  Args:
    folder: the root.
    split: "train", "test", or any folder in it.
    channels: 3 or 1, as for `load`.

  Returns:
    Dataset with images uint8 [n, H, W, channels].

  Raises:
    UserError: no folder, no images, an image that cannot be read, or images of different sizes.
  """
  check_channels(channels)
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise UserError(f"data.folder: there is no folder {root}.")
  if (root / split).is_dir():
    root = root / split
  elif split != "train":
    raise UserError(f"data.folder: {root} has no folder {split!r}.")
  paths = [p for p in root.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file()]
  names = [p.relative_to(root) for p in paths]
  names = sorted((n for n in names if not any(part.startswith(".") for part in n.parts)), key=os.fsencode)
  if not names:
    raise UserError(f"data.folder: {root} holds no images ({', '.join(EXTENSIONS)}).")
  images = None
  for i, name in enumerate(names):
    try:
      with PIL.Image.open(root / name) as image:
        pixels = to_pixels(image, channels)
    except (OSError, ValueError, SyntaxError) as error:
      raise UserError(f"data.folder: {root / name} cannot be read ({error}). Mend or remove it.") from error
    if images is None:
      images = np.empty((len(names), *pixels.shape), np.uint8)
    if pixels.shape != images.shape[1:]:
      raise UserError(
        f"data.folder: {root / name} is {pixels.shape[0]}x{pixels.shape[1]} and {root / names[0]} is "
        f"{images.shape[1]}x{images.shape[2]}: only images of one size are read now."
      )
    images[i] = pixels
  assert images is not None
  classes = sorted({n.parts[0] for n in names if len(n.parts) > 1}, key=os.fsencode)
  if any(len(n.parts) == 1 for n in names):
    classes = []  # Some images have no class folder: none has a label.
  labels = np.array([classes.index(n.parts[0]) if classes else -1 for n in names], np.int32)
  return Dataset(images, labels, len(classes), str(folder), split)
