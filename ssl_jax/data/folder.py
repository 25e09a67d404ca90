"""A folder of images, read in place: into one array where they fit and are of one size, one by one otherwise."""

import dataclasses
import os
import pathlib
import zlib
from typing import Any

import numpy as np

from ssl_jax.data.dataset import ALL_CORES, Dataset, Reading
from ssl_jax.data.image import ImageError, read_image, read_reduced
from ssl_jax.data.memory import InMemory
from ssl_jax.data.stream import Streamed
from ssl_jax.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")


@dataclasses.dataclass(frozen=True)
class Files:
  """Image files that are read one by one (see `stream.Images`).

  Attributes:
    root: the folder.
    names: paths in it.
    channels: of the arrays, see `read_image`.
  """

  root: str
  names: list[str]
  channels: int

  def __len__(self) -> int:
    return len(self.names)

  def read(self, i: int) -> np.ndarray:
    return read_image(os.path.join(self.root, self.names[i]), self.channels)

  def read_reduced(self, i: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
    return read_reduced(os.path.join(self.root, self.names[i]), self.channels, least)

  def label(self, i: int) -> int:
    return -1  # The data set knows them, by the folders.

  def name(self, i: int) -> str:
    return os.fsencode(self.names[i]).decode("utf-8", "backslashreplace")  # whatever bytes the name has

  def take(self, indices: np.ndarray) -> "Files":
    return Files(self.root, [self.names[i] for i in indices], self.channels)


def load_folder(
  folder: str | os.PathLike, split: str, *, channels: int = 3, max_bytes: int = 4 << 30, reading: Reading = ALL_CORES
) -> Dataset:
  """Finds the images of `folder/split/class/**` or, where there is no such split folder, `folder/class/**`.

  Hidden files and folders and other files than images are left out; links are followed. The order is that of the
  relative paths' bytes, so that it does not depend on the file system or the locale. Images in no class folder have no
  labels, and then none has.

  Args:
    folder: the root.
    split: "train", "test", or any folder in it.
    channels: 3, 1 or n, see `read_image`.
    max_bytes: the largest array to allocate.
    reading: how they are decoded where they are read one by one.

  Returns:
    Dataset: `InMemory` where all can be read, are of one size and fit in `max_bytes`, and `Streamed` otherwise.

  Raises:
    UserError: no folder or no images.
  """
  if channels < 1:
    raise UserError(f"data.channels must be at least 1, got {channels}.")
  root = pathlib.Path(folder).expanduser()
  if not root.is_dir():
    raise UserError(f"data.folder: there is no folder {root}.")
  if (root / split).is_dir():
    root = root / split
  elif split != "train":
    raise UserError(f"data.folder: {root} has no folder {split!r}.")
  names = find_images(root)
  if not names:
    raise UserError(f"data.folder: {root} holds no images ({', '.join(EXTENSIONS)}).")
  parts = [name.split(os.sep, 1) for name in names]
  classes = sorted({part[0] for part in parts if len(part) > 1}, key=os.fsencode)
  if any(len(part) == 1 for part in parts):
    classes = []  # Some images have no class folder: none has a label.
  number = {name: i for i, name in enumerate(classes)}
  labels = np.array([number.get(part[0], -1) for part in parts], np.int32)
  files = Files(str(root), names, channels)
  array = _in_memory(files, max_bytes)
  fingerprint = f"{len(names)} files, {zlib.crc32(os.fsencode('/'.join(names))):08x}"
  about: dict[str, Any] = dict(
    labels=labels, num_classes=len(classes), name=str(folder), split=split, classes=tuple(classes)
  )
  if array is None:  # whose crops are others
    return Streamed(images=files, fingerprint=f"{fingerprint}, one by one", reading=reading, **about)
  return InMemory(images=array, fingerprint=fingerprint, reading=reading, **about)


def find_images(root: pathlib.Path) -> list[str]:
  """The relative paths of all images under a folder, sorted by their bytes."""
  return [name for name in find_files(root) if is_image(name)]


def is_image(name: str) -> bool:
  """Whether a file's name ends as those of images do."""
  return name.lower().endswith(EXTENSIONS)


def find_files(root: pathlib.Path) -> list[str]:
  """The relative paths of all files under a folder that are not hidden, sorted by their bytes; links are followed."""
  names = []
  top, seen = str(root), {os.path.realpath(root)}
  for folder, folders, files in os.walk(top, followlinks=True):
    kept = []
    for name in sorted(folders):  # of two links to one folder the first counts
      real = os.path.realpath(os.path.join(folder, name))
      if not name.startswith(".") and real not in seen:  # a link may lead back up
        kept.append(name)
        seen.add(real)
    folders[:] = kept
    prefix = os.path.relpath(folder, top)
    for name in files:
      if not name.startswith("."):
        names.append(name if prefix == "." else os.path.join(prefix, name))
  return sorted(names, key=os.fsencode)


def _in_memory(files, max_bytes):
  """All images as one array; None where they do not fit, differ in size, or some cannot be read."""
  images = None
  for i in range(len(files)):
    try:
      pixels = files.read(i)
    except ImageError:
      return None
    if images is None:
      if pixels.nbytes * len(files) > max_bytes:
        return None
      images = np.empty((len(files), *pixels.shape), np.uint8)
    if pixels.shape != images.shape[1:]:
      return None
    images[i] = pixels
  return images
