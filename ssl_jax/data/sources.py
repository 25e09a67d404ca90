"""What `python -m ssl_jax prepare` reads: a folder of images, and CIFAR's and ImageNet's published archives.

Nothing is unpacked to disk, and no more than one image (CIFAR: one of its files) is in memory.
"""

import collections
import dataclasses
import functools
import io
import itertools
import os
import pathlib
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from ssl_jax.data.folder import EXTENSIONS, find_split, split_folder
from ssl_jax.data.image import ImageError, page_count, read_image, value_range
from ssl_jax.data.tars import content, members
from ssl_jax.errors import UserError

CIFAR_AT = "https://www.cs.toronto.edu/~kriz/cifar.html"
_TRAIN_TAR, _VAL_TAR = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"


class Item(NamedTuple):
  """One image.

  Attributes:
    name: for messages and `skipped.txt`.
    image: the encoded bytes; None where it cannot be read.
    label: -1 where there is none.
    reason: why it cannot be read.
  """

  name: str
  image: bytes | None
  label: int
  reason: str = ""


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set to prepare.

  Attributes:
    splits: for each split, `read(start)`: its items from number `start` on, the same ones on every call.
    classes: names of the labels; empty: no labels.
    fingerprint: identifies the input: an interrupted preparation is resumed only if it has not changed.
    description: a sentence for dataset_info.json.
    size: (height, width) of all images; None where they differ.
    channels: of all images.
    homepage, citation, license: where it comes from, and on which terms.
    notes: what was left out of it, in words.

  Raises:
    UserError: label.labels.txt, which has a name a line, cannot hold a class's name, or two classes have one name.
  """

  splits: Mapping[str, Callable[[int], Iterator[Item]]]
  classes: list[str]
  fingerprint: str
  description: str
  size: tuple[int, int] | None = None
  channels: int = 3
  homepage: str = ""
  citation: str = ""
  license: str = ""
  notes: tuple[str, ...] = ()

  def __post_init__(self) -> None:
    for name, count in collections.Counter(self.classes).items():
      if not name or not name.isprintable() or name != name.strip():
        raise UserError(f"the class {name!r} has a name that label.labels.txt cannot hold: rename it.")
      if count > 1:
        raise UserError(f"{count} classes have the name {name!r}: rename them.")

  def features(self, encoding: str | None) -> Any:
    """TFDS's features, for images that are all `encoding`; None: some are JPEG and some PNG."""
    image = tfds.features.Image(shape=(*(self.size or (None, None)), self.channels), encoding_format=encoding)
    label = {"label": tfds.features.ClassLabel(names=self.classes)} if self.classes else {}
    return tfds.features.FeaturesDict({"image": image, **label})


def folder_source(root: pathlib.Path) -> Source:
  """The images that `load_folder` finds.

  If there is a folder train, val or test, those folders are the splits and everything beside them is left out;
  otherwise everything is "train".
  Classes are numbered over all splits together, in the byte order of their names. An image outside of any class folder
  has no label (-1).

  Raises:
    UserError: no folder, or no images.
  """
  if not root.is_dir():
    raise UserError(f"there is no folder {root}: name the folder that holds the images.")
  roots = {split: folder for split in ("train", "val", "test") if (folder := split_folder(root, split))}
  roots = roots or {"train": root}
  found = {split: find_split(root, folder) for split, folder in roots.items()}
  names = {split: x.names for split, x in found.items() if x.names}
  notes = [f"{split}: {note}" for split, x in found.items() for note in x.notes]
  notes += [f"{split}: no images, so the data set will have no such split" for split, x in found.items() if not x.names]
  if not names:
    raise UserError("; ".join([f"{root} holds no images ({', '.join(EXTENSIONS)})", *notes]))
  inside = {name.partition(os.sep)[0] for listed in names.values() for name in listed if os.sep in name}
  classes = sorted(inside, key=os.fsencode)
  number = {name: i for i, name in enumerate(classes)}
  crc = 0
  for split, listed in names.items():
    for name in listed:
      path = roots[split] / name
      size = path.stat().st_size if path.exists() else -1  # a broken symbolic link
      crc = zlib.crc32(os.fsencode(f"{split}/{name}\0{size}\0"), crc)

  def read(split, start):
    for name in itertools.islice(names[split], start, None):
      label = number[name.partition(os.sep)[0]] if os.sep in name else -1
      shown, path = f"{split}/{name}" if roots[split] != root else name, roots[split] / name
      try:
        if path.exists() and not path.is_file():
          raise OSError("not a file")  # Opening a named pipe would block for ever.
        yield check_image(shown, path.read_bytes(), label)
      except OSError as error:
        yield Item(shown, None, label, (error.strerror or str(error)).lower())

  splits = {split: functools.partial(read, split) for split in names}
  fingerprint = f"{sum(map(len, names.values()))} files, {crc:08x}"
  description = f"The images of the folder {root.name}."
  return Source(splits, classes, fingerprint, description, notes=tuple(notes))


def check_image(name: str, encoded: bytes, label: int) -> Item:
  """Keeps JPEG and PNG as they are; converts other formats to PNG by `read_image`, where nothing of them is lost."""
  try:
    pixels = read_image(encoded)
    if encoded.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
      return Item(name, encoded, label)
    if (pages := page_count(encoded)) > 1:
      raise ImageError(f"{pages} pages, of which one would be kept: train on the folder itself")
    if value_range(encoded) is not None:
      raise ImageError("more than 8 bits, which would be lost: save it as a 16-bit PNG, or train on the folder itself")
    return Item(name, to_png(pixels), label)
  except ImageError as error:
    advice = ": train on the folder itself, with --config.data.channels" if "channels, not" in str(error) else ""
    return Item(name, None, label, f"{error}{advice}")


def to_png(pixels: np.ndarray, *, smallest: bool = False) -> bytes:
  """uint8 [h, w] or [h, w, 3] as PNG; `smallest`: compressed as far as PNG can, which takes longer."""
  png = io.BytesIO()
  PIL.Image.fromarray(pixels).save(png, format="png", optimize=smallest)
  return png.getvalue()


def cifar_source(name: str, source: pathlib.Path) -> Source:
  """CIFAR-10 or CIFAR-100 from the published python archive, in the order of its files. CIFAR-100's labels are fine.

  Args:
    name: "cifar10" or "cifar100".
    source: the archive, or the folder that holds it.

  Raises:
    UserError: it is missing or damaged. Also while it is read: one of its files has unexpected contents.
  """
  if name == "cifar10":
    archive, inside, meta, key = "cifar-10-python.tar.gz", "cifar-10-batches-py", "batches.meta", "label"
    files = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
  else:
    archive, inside, meta, key = "cifar-100-python.tar.gz", "cifar-100-python", "meta", "fine_label"
    files = {"train": ["train"], "test": ["test"]}
  path = source / archive if source.is_dir() else source
  if not path.is_file():
    raise UserError(f"there is no file {path}: download {archive} from {CIFAR_AT} and pass it as --from.")

  def load(file):
    try:
      with tarfile.open(path) as tar:
        found = tar.extractfile(f"{inside}/{file}")
        return load_pickle(found)  # extractfile gives None for a folder, which ends in the except below too.
    except Exception as error:  # A damaged pickle can raise any exception.
      reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
      raise UserError(
        f"{path}: {inside}/{file} cannot be read ({reason}). Download it again from {CIFAR_AT}."
      ) from error

  def read(split, start):
    for file in files[split]:
      batch = load(file)
      images, labels = batch.get("data"), batch.get(f"{key}s")
      shape = getattr(images, "shape", None)
      valid = isinstance(images, np.ndarray) and images.dtype == np.uint8 and shape[1:] == (3072,)
      if not valid or not isinstance(labels, list) or len(labels) != len(images):
        raise UserError(f"{path}: {inside}/{file} should hold data uint8 [n, 3072] and {key}s [n], got data {shape}.")
      for i in range(min(start, len(images)), len(images)):
        if not isinstance(labels[i], int) or not 0 <= labels[i] < len(classes):
          raise UserError(f"{path}: {inside}/{file} should hold labels below {len(classes)}, got {labels[i]!r}.")
        pixels = images[i].reshape(3, 32, 32).transpose(1, 2, 0)
        yield Item(f"{file}/{i}", to_png(np.ascontiguousarray(pixels)), labels[i])
      start = max(0, start - len(images))

  names = load(meta).get(f"{key}_names")
  if not isinstance(names, list) or not names:
    raise UserError(f"{path}: {inside}/{meta} should hold {key}_names. Download it again from {CIFAR_AT}.")
  classes = [name.decode() if isinstance(name, bytes) else str(name) for name in names]
  splits = {split: functools.partial(read, split) for split in files}
  description = f"{'CIFAR-10' if name == 'cifar10' else 'CIFAR-100'} (Krizhevsky, 2009): 32x32 colour images."
  return Source(splits, classes, _file_print(path), description, (32, 32), homepage=CIFAR_AT)


class _Unpickler(pickle.Unpickler):
  """Builds arrays, lists and scalars. A pickle may call any function by its name: all names but these are refused."""

  ALLOWED = (
    ("numpy.core.multiarray", "_reconstruct"),  # as Python 2 wrote it
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
  )

  def find_class(self, module, name):
    if (module, name) not in self.ALLOWED:
      raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
    return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def load_pickle(file: Any) -> dict[str, Any]:
  """A dictionary of arrays, lists and scalars that Python 2 or 3 pickled. Other bytes can raise any exception."""
  content = _Unpickler(file, encoding="bytes").load()
  return {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}


def imagenet_source(folder: pathlib.Path, val_labels: pathlib.Path | None) -> Source:
  """ImageNet-1k from its two tar files, in their order; labels are the indices of the sorted wnids, as TFDS's are.

  Args:
    folder: holds ILSVRC2012_img_train.tar and, for a split "validation", ILSVRC2012_img_val.tar.
    val_labels: a file with one `filename wnid` per line; or one wnid per line, for the images in the order of their
      names. The path "none" leaves the validation images out. Their tar file itself holds no labels.

  Raises:
    UserError: a file is missing or has unexpected contents.
  """
  train, val = folder / _TRAIN_TAR, folder / _VAL_TAR
  if not train.is_file():
    raise UserError(f"there is no file {train}: --from must be the folder with {_TRAIN_TAR} (and {_VAL_TAR}).")
  wnids = sorted(pathlib.Path(member.name).stem for _, member in members(train) if member.name.endswith(".tar"))
  if not wnids or not all(re.fullmatch(r"n\d{8}", wnid) for wnid in wnids):
    raise UserError(f"{train} should hold one tar file a class (n01440764.tar, ...): download it again.")
  number = {wnid: i for i, wnid in enumerate(wnids)}

  def read_train(start):
    seen = 0
    for tar, member in members(train):
      wnid = pathlib.Path(member.name).stem
      for inner, image in members(train, tar.extractfile(member)):
        seen += 1
        if seen > start:
          yield check_image(f"{wnid}/{image.name}", content(train, inner, image), number[wnid])

  splits: dict[str, Callable[[int], Iterator[Item]]] = {"train": read_train}
  fingerprint = _file_print(train)
  if val.is_file() and str(val_labels) != "none":
    if val_labels is None:
      raise UserError(
        f"{val} holds no labels: pass --val_labels=FILE with 'filename wnid' a line (or one wnid a line, in the order "
        "of the names), or --val_labels=none to leave its images out."
      )
    labels = _val_labels(val, val_labels, number)

    def read_val(start):
      for i, (tar, member) in enumerate(members(val)):
        if i >= start:
          name = pathlib.Path(member.name).name
          yield check_image(name, content(val, tar, member), labels[name])

    splits["validation"] = read_val
    fingerprint += f"; {_file_print(val)}; {zlib.crc32(repr(labels).encode()):08x}"
  elif val_labels is not None and str(val_labels) != "none":
    raise UserError(f"--val_labels is given, and there is no file {val}: put it there, or leave --val_labels out.")
  description = "ImageNet-1k (Russakovsky et al., 2015): the images of ILSVRC2012."
  return Source(splits, wnids, fingerprint, description, homepage="https://image-net.org")


def _val_labels(val, file, number):
  """{file name: label} of the validation images."""
  names = sorted(pathlib.Path(member.name).name for _, member in members(val))
  try:
    lines = [line.split() for line in file.read_text().splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f"--val_labels: {file} cannot be read ({error}).") from None
  if all(len(line) == 1 for line in lines):
    if len(lines) != len(names):
      raise UserError(f"--val_labels: {file} should have {len(names)} lines, one an image of {val}, got {len(lines)}.")
    lines = [[name, *line] for name, line in zip(names, lines, strict=True)]
  for i, line in enumerate(lines, 1):
    if len(line) != 2 or line[1] not in number:
      raise UserError(
        f"--val_labels: line {i} of {file} should be a wnid of {_TRAIN_TAR} as n01440764, or 'filename wnid', got "
        f"{' '.join(line)!r}. The devkit's numbers are not wnids: its meta.mat translates them."
      )
  labels = {pathlib.PurePosixPath(name).name: number[wnid] for name, wnid in lines}
  missing = [name for name in names if name not in labels]
  if missing:
    raise UserError(f"--val_labels: {file} has no line for {missing[0]}, and {len(missing)} are missing in all.")
  return {name: labels[name] for name in names}


def _file_print(path):
  return f"{path.name}, {path.stat().st_size} bytes"
