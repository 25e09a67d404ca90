"""Data sets that TFDS has prepared as ArrayRecord files, read without TensorFlow."""

import dataclasses
import difflib
import functools
import math
import os
import pathlib
import re
import shlex
from typing import Any

import numpy as np
import PIL.Image
import tensorflow_datasets as tfds

from ssl_jax.data.dataset import ALL_CORES, Dataset, Reading, check_channels, in_words, split_named, to_pixels
from ssl_jax.data.image import ImageError, Window, read_image
from ssl_jax.data.memory import LARGEST, InMemory
from ssl_jax.data.stream import Images, Streamed, file_print
from ssl_jax.errors import NoSplit, UserError

BUILTIN = pathlib.Path(__file__).parent / "builtin"
_ARCHIVES = {
  "cifar10": "--from=cifar-10-python.tar.gz",
  "cifar100": "--from=cifar-100-python.tar.gz",
  "imagenet2012": "--from=FOLDER --val_labels=FILE",
}
_READ_AT_ONCE = 1024  # One call per record takes three times as long.


def load(
  name: str,
  split: str,
  *,
  data_dir: str | os.PathLike | None = None,
  channels: int = 3,
  max_bytes: int = 4 << 30,
  window: Window | None = None,
  reading: Reading = ALL_CORES,
) -> Dataset:
  """Opens a split of any image data set that TFDS has prepared in ArrayRecord form.

  The feature `image` must be a uint8 `tfds.features.Image`, or a `Tensor` of one fixed size. The feature
  `label`, if it is one integer per image, gives the labels.

  Args:
    name: `"cifar10"`, `"cifar10:3.0.2"`, `"name/config"` or `"name/config:1.0.0"`. Without a version, the
      highest one in ArrayRecord form.
    split: a split of it, or a TFDS slice such as `"train[:10000]"`.
    data_dir: folder that holds `name/version`. None: the package's own folder if `name` is built in, else
      `$TFDS_DATA_DIR`, else `~/tensorflow_datasets`.
    channels: 3 (grey images are repeated) or 1 (colours become ITU-R 601 luma, rounded as Pillow's mode L).
    max_bytes: the largest array to allocate.
    window: for values of more than 8 bits, see `read_image`; None: measured on a sample of the images.
    reading: how images are decoded where they are streamed.

  Returns:
    Dataset, in the order on disk: `InMemory` where the images are of one small size and fit in `max_bytes`, and
    `Streamed` otherwise.

  Raises:
    UserError: the set, the version or the split is not there, is not in ArrayRecord form, was not prepared to
      the end, is empty, names more or fewer classes than it has, or is of arrays that do not fit in `max_bytes`. Each
      message says what to do.
  """
  check_channels(channels)
  builder, prepare = _find(name, data_dir)
  split = split_named(split, builder.info.splits)
  n = _count(builder, name, split)
  height, width = _image_size(builder, name)
  check_files(builder, split, prepare)
  label = dict(builder.info.features.items()).get("label")
  # A ClassLabel is an integer scalar too. Other types (a caption, a list) are not classes that a k-NN can predict.
  labelled = label is not None and label.shape == () and np.issubdtype(label.np_dtype, np.integer)
  names = _class_names(builder, label, prepare) if labelled else ()
  encoded = isinstance(builder.info.features["image"], tfds.features.Image)
  needed = n * height * width * channels if height and width else math.inf
  notes: dict[str, Any] = {}
  if encoded:
    records = Records(str(builder.data_dir), split, channels, labelled, n)
    measured = records.measured()
    notes["notes"] = tuple(in_words(window, measured))
    notes["window"] = window = window or measured
    records = dataclasses.replace(records, window=window)
  if encoded and (needed > max_bytes or height * width * channels > LARGEST):
    num_classes = (getattr(label, "num_classes", None) or 1) if labelled else 0
    known = None if labelled else np.full(n, -1, np.int32)
    about: dict[str, Any] = dict(num_classes=num_classes, name=name, split=split, reading=reading, class_names=names)
    return Streamed(images=records, labels=known, **about, **notes)
  if needed > max_bytes:
    most = max_bytes // (height * width * channels)
    raise UserError(
      f"{name} {split!r} needs {needed:,} bytes ({n:,} arrays of {height}x{width}x{channels}), max_bytes is "
      f"{max_bytes:,}: only encoded images are streamed. Take at most {most:,}, as 'train[:{most}]' does, or raise "
      "max_bytes."
    )

  images, labels = np.empty((n, height, width, channels), np.uint8), np.full(n, -1, np.int32)
  for i, (image, example) in enumerate(_decoded(builder, split, n, channels, window, prepare)):
    if image.shape != images.shape[1:]:
      raise UserError(
        f"{name} {split!r}: image {i} is {image.shape[0]}x{image.shape[1]}, where its features.json says "
        f"{height}x{width}."
      )
    images[i] = image
    if labelled:
      labels[i] = example["label"]
  num_classes = (getattr(label, "num_classes", None) or int(labels.max()) + 1) if labelled else 0
  about = dict(labels=labels, num_classes=num_classes, name=name, split=split, reading=reading, class_names=names)
  return InMemory(images=images, **about, **notes)


@dataclasses.dataclass(frozen=True)
class Records(Images):
  """Encoded images of a prepared split that are read one by one.

  Attributes:
    folder: of the prepared version.
    split: as for `load`.
    channels, window: of the arrays, see `image.read_image`.
    labelled: whether the feature `label` is a class.
    size: number of images.
    indices: their indices in the split; None: all.
  """

  folder: str
  split: str
  channels: int
  labelled: bool
  size: int
  indices: np.ndarray | None = None
  window: Window | None = None

  def __len__(self) -> int:
    return self.size

  def source(self, i: int) -> bytes:
    try:
      return self.records[self.place(i)]["image"]
    except Exception as error:  # ArrayRecord and protobuf can raise any exception on damaged bytes.
      raise ImageError(f"damaged record ({_brief(error)})") from error

  def label(self, i: int) -> int:
    return int(self.records[self.place(i)]["label"]) if self.labelled else -1

  def name(self, i: int) -> str:
    return f"record {self.place(i)} of {self.split}"

  def contents(self) -> str:
    files = [f"{path.name} {file_print(path)}" for path in sorted(pathlib.Path(self.folder).iterdir())]
    return "\n".join([*files, self.split, repr(self.indices if self.indices is None else self.indices.tolist())])

  def take(self, indices: np.ndarray) -> "Records":
    chosen = indices if self.indices is None else self.indices[indices]
    return dataclasses.replace(self, size=len(chosen), indices=chosen)

  def place(self, i: int) -> int:
    return int(i if self.indices is None else self.indices[i])

  @functools.cached_property
  def records(self) -> Any:
    decoders = {"image": tfds.decode.SkipDecoding()}
    builder = open_prepared(pathlib.Path(self.folder))
    return builder.as_data_source(self.split, decoders=decoders, file_format="array_record")

  def __reduce__(self) -> Any:  # Each process opens readers of its own.
    return Records, (self.folder, self.split, self.channels, self.labelled, self.size, self.indices, self.window)


def open_prepared(folder: pathlib.Path, prepare: str = "prepare it again") -> Any:
  """Opens a prepared version folder as a read-only TFDS builder.

  Args:
    folder: `data_dir/name/version` or `data_dir/name/config/version`.
    prepare: how to prepare it again, for the error texts.

  Returns:
    tfds.core.DatasetBuilder. `check_files` checks whether its record files are there.

  Raises:
    UserError: the metadata is missing or cannot be read.
  """
  missing = [f for f in ("dataset_info.json", "features.json") if not (folder / f).is_file()]
  if missing and (folder / "manifest.json").is_file():  # by `python -m ssl_jax prepare`
    raise UserError(
      f"{folder} has no {missing[0]}: give its `python -m ssl_jax prepare` command again, which mends it."
    )
  if missing:
    raise UserError(f"{folder} has no {missing[0]}: its preparation was interrupted. Delete it and {prepare}")
  try:
    # By folder, not by name: `tfds.builder(name)` prefers a registered class, maybe of another version.
    return tfds.builder_from_directory(folder)
  except Exception as error:  # JSON, protobuf and import errors, of TFDS's choice.
    raise UserError(
      f"{folder} cannot be opened ({_brief(error)}). If its metadata is damaged, delete it and {prepare}"
    ) from error


def check_files(builder: Any, split: str, prepare: str = "prepare it again") -> None:
  """Raises UserError unless every ArrayRecord file that `split` needs is there and is not empty."""
  for needed in builder.info.splits[split].file_instructions:
    path = pathlib.Path(needed.filename)
    if not path.is_file() or not path.stat().st_size:
      raise UserError(
        f"{path.parent} lacks {path.name}: its preparation or copy was interrupted. Delete the folder and {prepare}"
      )


def overlap(name: str, one: str, other: str, *, data_dir: str | os.PathLike | None = None) -> bool:
  """Whether two splits of a prepared data set, or slices of them, share records. Raises as `load` does."""
  builder, _ = _find(name, data_dir)
  spans = []
  for split in (one, other):
    split = split_named(split, builder.info.splits)
    _count(builder, name, split)  # which tells that there is none
    files = builder.info.splits[split].file_instructions
    spans.append([(x.filename, x.skip, x.examples_in_shard if x.take < 0 else x.skip + x.take) for x in files])
  return any(a[0] == b[0] and a[1] < b[2] and b[1] < a[2] for a in spans[0] for b in spans[1])


def is_array_record(builder: Any) -> bool:
  """Whether a prepared data set holds ArrayRecord files, the form that is read without TensorFlow."""
  return "array_record" in {f.value for f in builder.info.available_file_formats()}


def _find(name, data_dir):
  """Opens the version of `name` that `load` describes. Returns its builder, and how to prepare it again."""
  parsed = re.fullmatch(r"(\w[\w.-]*)(?:/(\w[\w.+-]*))?(?::(\d+\.\d+\.\d+))?", name)
  if not parsed:
    raise UserError(f"a data set is named as name, name:1.2.3, name/config or name/config:1.2.3, got {name!r}.")
  dataset, config, version = parsed.groups()
  if "://" in str(data_dir):
    raise UserError(f"data_dir must be a folder on this machine (mount or copy it), got {data_dir}.")
  if data_dir is not None:
    root = pathlib.Path(os.path.expanduser(data_dir))
  elif (BUILTIN / dataset).is_dir():
    root = BUILTIN
  else:
    root = pathlib.Path(os.path.expanduser(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")))

  folder = root / dataset / (config or "")
  versions = _versions(folder)
  if not versions and not config:
    configs = sorted(d.name for d in _folders(folder) if _versions(d))
    if len(configs) > 1:
      names = ", ".join(f"{dataset}/{c}" for c in configs)
      raise UserError(f"{dataset} in {root} has several configurations, name one of them: {names}.")
    if configs:
      config, folder = configs[0], folder / configs[0]
      versions = _versions(folder)
  full_name = f"{dataset}/{config}" if config else dataset
  prepare = prepare_command(full_name, root)
  if version and versions and version not in versions:
    raise UserError(f"{dataset} in {root} has no version {version}, only {', '.join(versions)}.")
  if not versions:
    unfinished = sorted(folder.glob("incomplete.*"))
    if unfinished and unfinished[0].name.startswith("incomplete.shards_"):  # by `python -m ssl_jax prepare`
      raise UserError(
        f"the preparation of {name!r} in {unfinished[0]} was interrupted, or still runs: give the same "
        "`python -m ssl_jax prepare` command again, and it goes on."
      )
    if unfinished:
      raise UserError(
        f"the preparation of {name!r} was interrupted, or still runs. If it does not: delete {unfinished[0]} "
        f"and {prepare}"
      )
    raise UserError(_not_found(name, dataset, root, prepare))
  for candidate in [version] if version else versions:
    builder = open_prepared(folder / candidate, prepare)
    if is_array_record(builder):
      return builder, prepare
  found = builder.info.file_format.value
  raise UserError(
    f"{name!r} in {root} is prepared as {found} only, which needs TensorFlow to read. "
    f"To have it as array_record, in another data_dir, {prepare_command(full_name, f'{root}_array_record')}"
  )


def prepare_command(name: str, data_dir: str | os.PathLike) -> str:
  """The command that prepares `name`, for an error text: this package's if it has one, else TFDS's with TensorFlow."""
  if name in ("fashion_mnist", "fashion_mnist_mini"):
    return f"prepare it: python -m ssl_jax prepare {name} --data_dir={shlex.quote(str(data_dir))}"
  if name in _ARCHIVES:
    given = f"{name} {_ARCHIVES[name]} --data_dir={shlex.quote(str(data_dir))}"
    return f"prepare it from what its authors publish: python -m ssl_jax prepare {given}"
  return (
    "prepare it, in an environment of its own: "
    "pip install tensorflow-cpu tensorflow-datasets importlib_resources pillow && "
    f"python -c \"import tensorflow_datasets as t; t.builder('{name}', data_dir='{data_dir}', "
    "file_format='array_record').download_and_prepare()\""
  )


def _not_found(name, dataset, root, prepare):
  prepared = []
  for folder in _folders(root):
    inner = [f"{folder.name}/{d.name}" for d in _folders(folder) if _versions(d)]
    prepared += [folder.name] if _versions(folder) else inner
  builtin = [d.name for d in _folders(BUILTIN) if _versions(d)]
  known = sorted({*prepared, *builtin, "fashion_mnist"})
  nearest = [k for k in difflib.get_close_matches(dataset.lower(), known) if k != dataset]
  prepared.sort(key=lambda p: (p not in nearest, p))
  there = "the folder does not exist" if not root.is_dir() else f"prepared there: {', '.join(prepared) or 'none'}"
  built_in = f"built in, with data_dir unset: {', '.join(builtin)}"
  hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
  if dataset in builtin:
    return f"no data set {name!r} in {root} ({there}): it is built in, leave data_dir unset."
  if nearest and nearest[0] == "fashion_mnist" and "fashion_mnist" not in prepared:
    dataset, prepare = "fashion_mnist", prepare_command("fashion_mnist", root)
  return f"no data set {name!r} in {root} ({there}; {built_in}).{hint} If {dataset!r} is right, {prepare}"


def _folders(folder):
  return sorted(d for d in folder.iterdir() if d.is_dir()) if folder.is_dir() else []


def _versions(folder):
  """Version folders, the highest first."""
  names = [d.name for d in _folders(folder) if re.fullmatch(r"\d+\.\d+\.\d+", d.name)]
  return sorted(names, key=lambda v: [int(part) for part in v.split(".")], reverse=True)


def _class_names(builder, label, prepare):
  """The names of the classes, which TFDS reads from a file of one a line and does not count."""
  names = tuple(getattr(label, "names", None) or ())
  if names and len(names) != label.num_classes:
    folder = pathlib.Path(builder.data_dir)
    own = (folder / "manifest.json").is_file()  # by `python -m ssl_jax prepare`
    raise UserError(
      f"{folder}/label.labels.txt names {len(names)} classes, and features.json says {label.num_classes}: "
      + ("give its `python -m ssl_jax prepare` command again, which mends it." if own else f"delete it and {prepare}")
    )
  return names


def _count(builder, name, split):
  """The number of images in a split."""
  splits = builder.info.splits
  try:
    n = splits[split].num_examples
  except (ValueError, KeyError) as error:
    sizes = ", ".join(f"{s} ({i.num_examples:,} images)" for s, i in sorted(splits.items()))
    raise NoSplit(
      f"{name} has no split {split!r} ({_brief(error)}). It has: {sizes}. A slice is written 'train[:1000]'."
    ) from None
  if not n:
    raise UserError(f"{name} {split!r} holds no images: take a split or a slice that does.")
  return n


def _image_size(builder, name):
  """(height, width) from the metadata, None where they differ."""
  feature = dict(builder.info.features.items()).get("image")
  if feature is None:
    raise UserError(f"{name} has no feature 'image', only {', '.join(sorted(builder.info.features))}.")
  shape = tuple(feature.shape)
  if feature.np_dtype != np.uint8 or len(shape) not in (2, 3) or shape[2:] not in ((), (1,), (3,), (4,), (None,)):
    raise UserError(
      f"{name}: the feature 'image' must be uint8 [height, width, 1, 3 or 4], got {feature.np_dtype} {shape}."
    )
  return shape[:2]


def _decoded(builder, split, n, channels, window, prepare):
  """Yields (pixels uint8 [h, w, channels], example) for the n examples of a split, in the order on disk."""
  encoded = isinstance(builder.info.features["image"], tfds.features.Image)
  # Pillow decodes below, which avoids TFDS's own decoding and its warning about OpenCV.
  decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
  try:
    source = builder.as_data_source(split, decoders=decoders, file_format="array_record")
    for start in range(0, n, _READ_AT_ONCE):
      for example in source.__getitems__(list(range(start, min(start + _READ_AT_ONCE, n)))):
        yield _pixels(example["image"], channels, window), example
  except Exception as error:  # ArrayRecord, protobuf and Pillow can raise any exception on damaged bytes.
    raise UserError(f"{builder.data_dir} holds damaged records ({_brief(error)}). Delete it and {prepare}") from error


def _pixels(value, channels, window):
  """An encoded image, or a uint8 array [h, w] or [h, w, c], as uint8 [h, w, channels]."""
  if isinstance(value, bytes):
    return read_image(value, channels, window)  # decoded as in streaming
  return to_pixels(PIL.Image.fromarray(value[..., 0] if value.shape[2:] == (1,) else value), channels)


def _brief(error):
  """The first line of an error's text: TFDS appends paragraphs."""
  return f"{type(error).__name__}: {error}".splitlines()[0][:200]
