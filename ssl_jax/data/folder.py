"""A folder of images, read in place: into one array where they fit and are of one size, one by one otherwise.

What is read one by one, and what takes the place of a file that cannot be read, is in `data.stream`.
"""

import collections
import dataclasses
import os
import pathlib
import zlib
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.data.dataset import ALL_CORES, Dataset, Reading, in_short, in_words, split_named
from ssl_jax.data.image import ImageError, Window
from ssl_jax.data.memory import LARGEST, InMemory
from ssl_jax.data.stream import Images, Streamed, file_print
from ssl_jax.errors import NoSplit, UserError

SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test"})
OTHER_PROGRAMS = frozenset({"@eaDir", "$RECYCLE.BIN", "__MACOSX", "lost+found", "System Volume Information"})
EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy")


@dataclasses.dataclass(frozen=True)
class Files(Images):
  """Image files that are read one by one.

  Attributes:
    root: the folder.
    names: paths in it.
    channels, window: of the arrays, see `image.read_image`.
  """

  root: str
  names: list[str]
  channels: int
  window: Window | None = None

  def __len__(self) -> int:
    return len(self.names)

  def source(self, i: int) -> str:
    return os.path.join(self.root, self.names[i])

  def label(self, i: int) -> int:
    return -1  # The data set knows them, by the folders.

  def name(self, i: int) -> str:
    return os.fsencode(self.names[i]).decode("utf-8", "backslashreplace")  # whatever bytes the name has

  def contents(self) -> str:
    return "\n".join(f"{self.name(i)} {file_print(self.source(i))}" for i in range(len(self)))

  def take(self, indices: np.ndarray) -> "Files":
    return dataclasses.replace(self, names=[self.names[i] for i in indices])


def load_folder(
  folder: str | os.PathLike,
  split: str,
  *,
  channels: int = 3,
  max_bytes: int = 512 << 20,
  window: Window | None = None,
  reading: Reading = ALL_CORES,
) -> Dataset:
  """Finds the images of `folder/split/class/**` or, where there is no such split folder, `folder/class/**`.

  Hidden files and folders and other files than images are left out; links are followed. The order is that of the
  relative paths' bytes, so that it does not depend on the file system or the locale. Images in no class folder have no
  label. `Dataset.notes` says what was left out.

  Args:
    folder: the root.
    split: "train", "test", or any folder in it.
    channels: 3, 1 or n, see `read_image`.
    max_bytes: the largest array to allocate.
    window: for values of more than 8 bits, see `read_image`; None: measured on a sample of the images.
    reading: how they are decoded where they are read one by one.

  Returns:
    Dataset: `InMemory` where all can be read, are of one small size and fit in `max_bytes`, and `Streamed` otherwise.

  Raises:
    UserError: no folder or no images.
  """
  if channels < 1:
    raise UserError(f"data.channels must be at least 1, got {channels}.")
  root, found = _found(folder, split)
  names = found.names
  parts = [name.split(os.sep, 1) for name in names]
  classes = sorted({part[0] for part in parts if len(part) > 1}, key=os.fsencode)
  number = {name: i for i, name in enumerate(classes)}
  labels = np.array([number[part[0]] if len(part) > 1 else -1 for part in parts], np.int32)
  files = Files(str(root), names, channels)
  measured = files.measured()
  files = dataclasses.replace(files, window=window or measured)
  array = _in_memory(files, max_bytes)
  fingerprint = f"{len(names)} files, {zlib.crc32(os.fsencode('/'.join(names))):08x}"
  about: dict[str, Any] = dict(
    labels=labels,
    num_classes=len(classes),
    name=str(folder),
    split=split,
    classes=tuple(classes),
    window=files.window,
    notes=(*found.notes, *in_words(window, measured)),
  )
  if array is None:  # whose crops are others
    return Streamed(images=files, fingerprint=f"{fingerprint}, one by one", reading=reading, **about)
  return InMemory(images=array, fingerprint=fingerprint, reading=reading, **about)


def files_of(folder: str | os.PathLike, split: str, *, channels: int = 3, window: Window | None = None) -> Files:
  """The image files that `load_folder` finds, none of them read. Raises as it does."""
  root, found = _found(folder, split)
  return Files(str(root), found.names, channels, window)


def _found(folder, split):
  """(the folder of a split, the images in it)."""
  top = pathlib.Path(os.path.expanduser(folder))
  if not top.is_dir():
    raise UserError(f"data.folder: there is no folder {top}.")
  if "[" in split:
    raise UserError(f"a folder of images has no slices, and {split!r} is one: name a folder in {top}.")
  root = split_folder(top, split)
  if root is None and split != "train":
    raise NoSplit(f"data.folder: {top} has no folder {split!r}.")
  root = root or top
  found = find_split(top, root)
  if not found.names:
    raise UserError("; ".join([f"data.folder: {root} holds no images ({', '.join(EXTENSIONS)})", *found.notes]))
  return root, found


def overlap(folder: str | os.PathLike, one: str, other: str) -> bool:
  """Whether two splits of a folder share images: they are one folder, or one is in the other."""
  top, roots = pathlib.Path(os.path.expanduser(folder)), []
  for split in (one, other):
    root = split_folder(top, split) if top.is_dir() else None
    if root is None and split != "train":
      return False  # there is none, which is told where it is loaded
    roots.append(os.path.realpath(root or top))
  return os.path.commonpath(roots) in roots


def split_folder(top: pathlib.Path, split: str) -> pathlib.Path | None:
  """The folder of a split; None where there is none, or where a folder of that name is a class.

  A class may be called train, val or test (COCO and CIFAR-100 have trains). Such a folder is a split if another split
  stands beside it, or no other folder does, or it has folders inside. Any other name is taken as given.
  """
  split = split_named(split, [x.name for x in top.iterdir() if x.is_dir()])
  folder = top / split
  if not folder.is_dir():
    return None
  others = [x.name for x in top.iterdir() if x.is_dir() and x.name != split and not _is_others(x.name)]
  if split not in SPLITS or not others or not SPLITS.isdisjoint(others):
    return folder
  return folder if any(x.is_dir() and not _is_others(x.name) for x in folder.iterdir()) else None


def find_split(top: pathlib.Path, root: pathlib.Path) -> "Found":
  """The images of a split's folder `root`, `top` itself or one in it; and what is left out or has no class."""
  found = find_files(root)
  names, notes = [name for name in found.names if is_image(name)], list(found.notes)
  if others := collections.Counter(os.path.splitext(name)[1] for name in found.names if not is_image(name)):
    kinds = in_short([f"{count:,} {ending or 'without an ending'}" for ending, count in others.most_common()])
    notes.append(f"left out: files whose names are not those of images ({kinds})")
  with_images = {name.partition(os.sep)[0] for name in names if os.sep in name}
  if empty := [name for name in _class_folders(top, root) if name not in with_images]:
    notes.append(f"class folders without images: {len(empty):,} ({in_short(empty)})")
  same = collections.Counter(name.lower() for name in with_images)
  if alike := sorted(name for name in with_images if same[name.lower()] > 1):
    notes.append(f"classes whose names differ in capitals alone: {in_short(alike)}")
  stray = sum(os.sep not in name for name in names)
  if 0 < stray < len(names):
    notes.append(f"{_images(stray)} without a class folder: evaluation leaves them out")
  if root != top and (beside := _images_beside(top, root)):
    notes.append(
      f"left out: {_images(sum(beside.values()))} beside the folder {root.name!r} (in {in_short(list(beside))})"
    )
  return Found(names, notes)


def _class_folders(top, root):
  """The names of a split's class folders, images in them or not."""
  folders = sorted(x.name for x in root.iterdir() if x.is_dir() and not _is_others(x.name))
  return [name for name in folders if root != top or name not in SPLITS]


def _is_others(name):
  """Whether a folder's name is that of hidden things, or of other programs' thumbnails and remains."""
  return name.startswith(".") or name in OTHER_PROGRAMS


def _images_beside(top, root):
  """{folder: number of images} of what lies beside a split and is in no other one."""
  counts = {}
  for x in sorted(top.iterdir()):
    if x.is_dir() and x != root and x.name not in SPLITS and not _is_others(x.name):
      counts[x.name] = sum(map(is_image, find_files(x).names))
  counts["."] = sum(x.is_file() and is_image(x.name) for x in top.iterdir())
  return {name: count for name, count in counts.items() if count}


def _images(count):
  return f"{count:,} image{'' if count == 1 else 's'}"


def is_image(name: str) -> bool:
  """Whether a file's name ends as those of images do."""
  return name.lower().endswith(EXTENSIONS)


class Found(NamedTuple):
  """Relative paths of files, sorted by their bytes, and in words what was left out."""

  names: list[str]
  notes: list[str]


def find_files(root: pathlib.Path) -> Found:
  """All files under a folder that are not hidden or another program's; links are followed."""
  names: list[str] = []
  others: dict[str, int] = {}
  unlisted: list[OSError] = []
  top, seen = str(root), {os.path.realpath(root)}
  for folder, folders, files in os.walk(top, followlinks=True, onerror=unlisted.append):
    kept = []
    for name in sorted(folders):  # of two links to one folder the first counts
      path = os.path.join(folder, name)
      real = os.path.realpath(path)
      if name in OTHER_PROGRAMS:
        others[name] = others.get(name, 0) + sum(is_image(x) for _, _, inner in os.walk(path) for x in inner)
      elif not name.startswith(".") and real not in seen:  # a link may lead back up
        kept.append(name)
        seen.add(real)
    folders[:] = kept
    prefix = os.path.relpath(folder, top)
    for name in files:
      if not name.startswith("."):
        names.append(name if prefix == "." else os.path.join(prefix, name))
  notes = []
  if count := sum(others.values()):
    notes.append(f"left out: {_images(count)} in folders of other programs ({in_short(list(others))})")
  if unlisted:
    first = unlisted[0]
    notes.append(f"folders that cannot be listed: {len(unlisted):,}, such as {first.filename} ({first.strerror})")
  return Found(sorted(names, key=os.fsencode), notes)


def _in_memory(files, max_bytes):
  """All images as one array; None where they do not fit, differ in size, or some cannot be read."""
  images = None
  for i in range(len(files)):
    try:
      pixels = files.read(i)
    except ImageError:
      return None
    if images is None:
      if pixels.nbytes > LARGEST or pixels.nbytes * len(files) > max_bytes:
        return None
      images = np.empty((len(files), *pixels.shape), np.uint8)
    if pixels.shape != images.shape[1:]:
      return None
    images[i] = pixels
  return images
