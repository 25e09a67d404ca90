"""Fashion-MNIST (Xiao et al., 2017, arXiv:1708.07747) from its published files, without TensorFlow or a network."""

import functools
import gzip
import pathlib
import zlib

import numpy as np

from ssl_jax.data.sources import Item, Source, to_png
from ssl_jax.errors import UserError

PUBLISHED_AT = "https://github.com/zalandoresearch/fashion-mnist"
CLASSES = (
  "T-shirt/top",
  "Trouser",
  "Pullover",
  "Dress",
  "Coat",
  "Sandal",
  "Shirt",
  "Sneaker",
  "Bag",
  "Ankle boot",
)
_CITATION = """@article{xiao2017fashion,
  author = {Han Xiao and Kashif Rasul and Roland Vollgraf},
  title = {Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  journal = {arXiv preprint arXiv:1708.07747},
  year = {2017}
}"""


def fashion_mnist_source(
  folder: pathlib.Path, train_images: int | None = None, test_images: int | None = None
) -> Source:
  """The images of the four published IDX files, or the first of them, in the order of the files.

  Args:
    folder: with `{train,t10k}-{images-idx3,labels-idx1}-ubyte`, plain or `.gz`.
    train_images: how many of the 60,000 training images to take, from the first on; None takes all.
    test_images: the same for the 10,000 test images.

  Raises:
    UserError: a file is missing, is not what it should be, or holds too few images.
  """
  limits = {"train": ("train", train_images), "test": ("t10k", test_images)}
  loaded = {split: read_split(folder, prefix, limit) for split, (prefix, limit) in limits.items()}
  crc = 0
  for images, labels in loaded.values():
    crc = zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes(), crc))

  def read(split, start):
    images, labels = loaded[split]
    for i in range(start, len(images)):
      yield Item(f"{split} image {i}", to_png(images[i], smallest=True), int(labels[i]))

  taken = ", ".join(f"the first {limit:,} {split} images" for split, (_, limit) in limits.items() if limit is not None)
  return Source(
    {split: functools.partial(read, split) for split in loaded},
    list(CLASSES),
    f"{sum(len(labels) for _, labels in loaded.values())} images, {crc:08x}",
    "Fashion-MNIST: 28x28 grey images of Zalando's articles, ten classes." + (f" A subset: {taken}." if taken else ""),
    size=(28, 28),
    channels=1,
    homepage=PUBLISHED_AT,
    citation=_CITATION,
    license="MIT License, Copyright (c) 2017 Zalando SE, https://tech.zalando.com",
  )


def read_split(folder: pathlib.Path, prefix: str, limit: int | None = None) -> tuple[np.ndarray, np.ndarray]:
  """Reads one split of the published files.

  Args:
    folder: folder with the IDX files, plain or `.gz`.
    prefix: `"train"` or `"t10k"`.
    limit: how many examples to take, from the first on; None takes all.

  Returns:
    images uint8 [n, 28, 28] and labels uint8 [n].

  Raises:
    UserError: a file is missing or damaged, the two disagree, or they hold fewer than `limit` examples.
  """
  image_file, images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", dimensions=3)
  label_file, labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", dimensions=1)
  if images.shape[1:] != (28, 28):
    raise UserError(f"{image_file}: expected images of 28x28, got {images.shape[1]}x{images.shape[2]}.")
  if len(labels) != len(images):
    raise UserError(f"{label_file}: expected {len(images)} labels, one an image, got {len(labels)}.")
  if len(images) < max(1, limit or 0):
    raise UserError(f"{image_file}: expected at least {max(1, limit or 0)} images, got {len(images)}.")
  if labels.max() >= len(CLASSES):
    raise UserError(f"{label_file}: expected labels from 0 to {len(CLASSES) - 1}, got {labels.max()}.")
  return images[:limit], labels[:limit]


def _read_idx(folder, stem, *, dimensions):
  """Reads `stem` or `stem.gz`: magic number, sizes as big-endian int32, then the bytes."""
  path = next((p for p in (folder / f"{stem}.gz", folder / stem) if p.is_file()), None)
  if path is None:
    raise UserError(f"{folder}: expected the file {stem}.gz (or {stem}), and there is none. See {PUBLISHED_AT}.")
  try:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
  except (gzip.BadGzipFile, EOFError, zlib.error) as error:
    raise UserError(f"{path}: expected a gzip file, got a damaged one ({error}). Fetch it again.") from None
  header = 4 + 4 * dimensions
  magic = bytes([0, 0, 0x08, dimensions])  # 0x08: unsigned bytes
  if data[:4] != magic:
    raise UserError(f"{path}: expected the IDX magic number 0x{magic.hex()}, got 0x{data[:4].hex()}.")
  if len(data) < header:
    raise UserError(f"{path}: expected a header of {header} bytes, got {len(data)}. Fetch it again.")
  shape = tuple(int(n) for n in np.frombuffer(data, ">u4", count=dimensions, offset=4))
  expected = header + int(np.prod(shape, dtype=object))
  if len(data) != expected:
    raise UserError(f"{path}: expected {expected} bytes for the sizes {shape}, got {len(data)}. Fetch it again.")
  return path, np.frombuffer(data, np.uint8, offset=header).reshape(shape)
