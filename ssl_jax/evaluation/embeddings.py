"""Features of many images in one file: written in parts, so that a killed job goes on, and read without loading them.

E.npz holds names [n], features float32 [n, d], indices int64 [n], labels int32 [n] and classes [k] where there are
labels, and about, a JSON text: what they were made from. E.parquet has the columns name, index, label and features, and
classes and about in its metadata. Both are made from parts in a folder beside them, E.npz.parts, that is deleted when
the file is whole.
"""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from ssl_jax.errors import UserError
from ssl_jax.evaluation.features import Features
from ssl_jax.run import cluster, whole

FORMATS = (".npz", ".parquet")
BATCHES_A_PART = 16
_PLACES = ("data",)  # keys of `about` that tell where the images are, so that they can be shown: these may change


class Embeddings(NamedTuple):
  """What a file holds.

  Attributes:
    names: str [n], of the images.
    features: float32 [n, d], on the disk: a slice of it is read when it is used.
    indices: int64 [n], the images' places in their data set.
    labels: int32 [n], -1 where there is none; None: there are none at all.
    classes: the classes' names, where they have some.
    about: what the features were made from; empty for a file of somebody else's.
  """

  names: Sequence[str]
  features: np.ndarray
  indices: np.ndarray
  labels: np.ndarray | None
  classes: tuple[str, ...]
  about: dict[str, Any]


class Images(NamedTuple):
  """The images that a file is made for.

  Attributes:
    size: how many.
    name: index -> name.
    labelled: whether any has a class.
    classes: the classes' names, where they have some.
  """

  size: int
  name: Callable[[int], str]
  labelled: bool = False
  classes: tuple[str, ...] = ()


def check_format(out: pathlib.Path) -> None:
  """Raises UserError unless a file of this name can be written here."""
  if out.suffix not in FORMATS:
    raise UserError(f"--out must end in {' or '.join(FORMATS)}, got {out}.")
  if out.suffix == ".parquet":
    _pyarrow()


def write(
  out: pathlib.Path,
  images: Images,
  about: dict[str, Any],
  batch_size: int,
  compute: Callable[[int], Iterator[Features]],
  progress: Callable[[int], None] = lambda done: None,
) -> bool:
  """Computes the features of images and writes them, or those that are missing. All processes must call this.

  A part is `BATCHES_A_PART` batches. It is on the disk before the next one is begun, so that a job that is killed loses
  at most one part; on the same devices the file is the same bit for bit as without the kill. Memory holds one part, not
  all features.

  Args:
    out: the file, of one of FORMATS.
    images: what `compute` goes through.
    about: what the features are made from, as JSON holds it. Unfinished work made from anything else is refused.
    batch_size: of `compute`.
    compute: index of an image, a multiple of `batch_size` -> the features of each batch from there on.
    progress: called with the number of images that are done.

  Returns:
    Whether anything had to be done; False: the file was there.

  Raises:
    UserError: the file, or unfinished work, is of other images, weights or another view; another job is at it; no image
      could be read; or a feature is not finite.
  """
  work = out.with_name(f"{out.name}.parts")
  about = json.loads(json.dumps(about))
  rows = BATCHES_A_PART * batch_size
  count = -(-images.size // rows)
  with contextlib.ExitStack() as held:
    begun = cluster.together(
      lambda: held.enter_context(_begun(out, work, images, about, count)) if cluster.is_main() else None
    )
    done = int(cluster.exchange(str(begun))[0])  # of the main process, which alone reads and writes
    if done < 0:
      return False
    if done < count:
      for i, part in enumerate(_parts(compute(done * rows)), done):
        if cluster.is_main():
          _write_part(work / f"{i:06d}.npz", part)
        progress(min((i + 1) * rows, images.size))
    if cluster.is_main():
      _assemble(out, work, images, about, count)
      shutil.rmtree(work)
  return True


def read(path: str | os.PathLike) -> Embeddings:
  """Opens a file that `write` wrote, or an .npz with arrays of the same names, at least `names` and `features`.

  Raises:
    UserError: it is not there, is damaged, or holds something else.
  """
  path = pathlib.Path(path)
  if path.is_dir() or path.suffix == ".npy":
    what = "is a folder" if path.is_dir() else "holds one array, without names"
    raise UserError(f"{path} {what}: give a file that embed wrote, an .npz or .parquet.")
  if not path.is_file():
    unfinished = path.with_name(f"{path.name}.parts").is_dir()
    how = " is not finished: give its embed command again, which goes on" if unfinished else " does not exist"
    raise UserError(f"{path}{how}.")
  try:
    found = _read_parquet(path) if path.suffix == ".parquet" else _read_npz(path)
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:  # pyarrow's errors are among them
    raise UserError(
      f"{path} does not hold embeddings, or is damaged: {str(error).splitlines()[0].rstrip('.')}."
    ) from error
  n = len(found.names)
  if found.features.ndim != 2 or len(found.features) != n or len(found.indices) != n:
    raise UserError(f"{path}: features must be [{n}, d], one row a name, got {found.features.shape}.")
  return found


def _parts(batches: Iterable[Features]) -> Iterator[Features]:
  """`BATCHES_A_PART` batches at a time."""
  held = []
  for batch in batches:
    held.append(batch)
    if len(held) == BATCHES_A_PART:
      yield Features(*map(np.concatenate, zip(*held, strict=True)))
      held = []
  if held:
    yield Features(*map(np.concatenate, zip(*held, strict=True)))


@contextlib.contextmanager
def _begun(out, work, images, about, count):
  """Locks the folder of parts, and yields how many of them are whole; -1: the file itself is there."""
  if out.exists():
    found = read(out)
    _check_same(out, found.about, about, lambda: _changes(found, images))
    shutil.rmtree(work, ignore_errors=True)  # killed between the last two steps
    yield -1
    return
  try:
    work.mkdir(parents=True, exist_ok=True)
    lock = (work / "lock").open("w")
  except OSError as error:
    raise UserError(f"--out: cannot write to {error.filename}: {error.strerror}.") from error
  with lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"another job is writing {work}: wait for it, or end it.") from None
    if (work / "about.json").exists():
      _check_same(work, json.loads((work / "about.json").read_text()), about)
    else:
      _write_whole(work / "about.json", lambda file: file.write(json.dumps(about, indent=1).encode()))
    kept = [f"{i:06d}.npz" for i in range(_whole_parts(work, count))]
    for path in work.iterdir():
      if path.name not in (*kept, "about.json", "lock"):
        path.unlink()
    yield len(kept)


def _check_same(path, then, now, changes=lambda: "the images: files are others, or were written since"):
  differ = [key for key in {**then, **now} if key not in _PLACES and then.get(key) != now.get(key)]
  if differ:
    tell = lambda key: changes() if key == "images" else f"{key}: {then.get(key)} there, now {now.get(key)}"  # noqa: E731
    texts = "; ".join(map(tell, differ))
    raise UserError(f"{path} was made from something else ({texts}). Delete it, or take another --out.")


def _changes(found, images):
  """How the images differ from those of a file, as far as their names tell."""
  then, now = dict.fromkeys(map(str, found.names)), dict.fromkeys(map(images.name, range(images.size)))
  told = []
  for names, text in (
    ([name for name in then if name not in now], "no longer there"),
    ([name for name in now if name not in then], "not in it, new or not readable then"),
  ):
    if names:
      told.append(f"{len(names):,} {text}, such as {names[0]}")
  told.append(f"{'others may be' if told else 'one at least was'} written since, or have another class")
  return f"the images: {len(then):,} there, now {len(now):,}: {'; '.join(told)}"


def _whole_parts(work, count):
  """How many parts, from the first on, are whole: a zip file has a checksum of each array."""
  for i in range(count):
    try:
      _read_part(work, i)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
      return i
  return count


def _read_part(work, i):
  with np.load(work / f"{i:06d}.npz") as part:
    return Features(**{name: part[name] for name in Features._fields})


def _write_part(path, part):
  finite = np.isfinite(part.features).all(axis=1)
  if not finite.all():
    raise UserError(f"{np.sum(~finite):,} of {len(finite):,} images have features that are not finite.")
  _write_whole(path, lambda file: np.savez(file, **part._asdict()))


def _write_whole(path, fill):
  """Writes a file that is there whole, or not at all, whenever the job or the machine dies."""
  with whole.file(path) as scratch, scratch.open("wb") as file:
    fill(file)
    file.flush()
    os.fsync(file.fileno())


def _assemble(out, work, images, about, count):
  """Makes the file from the parts, one at a time."""
  lengths, width, longest = [], 0, 1
  for i in range(count):
    with np.load(work / f"{i:06d}.npz") as part:
      indices = part["indices"]
      width = width or part["features"].shape[1]
    lengths.append(len(indices))
    longest = max(longest, *(len(images.name(int(j))) for j in indices), 1)
  n = sum(lengths)
  if not n:
    raise UserError(f"none of the {images.size:,} images can be read.")

  def parts():
    for i in range(count):
      part = _read_part(work, i)
      yield part, [images.name(int(j)) for j in part.indices]

  with whole.file(out) as scratch:
    if out.suffix == ".parquet":
      _write_parquet(scratch, parts(), images, about, width)
    else:
      name = np.dtype(f"<U{longest}")
      arrays = {
        "names": ((n,), name, (np.array(names, name) for _, names in parts())),
        "features": ((n, width), np.dtype("<f4"), (part.features for part, _ in parts())),
        "indices": ((n,), np.dtype("<i8"), (part.indices for part, _ in parts())),
      }
      if images.labelled:
        classes = np.array(images.classes, str)
        arrays["labels"] = (n,), np.dtype("<i4"), (part.labels for part, _ in parts())
        arrays["classes"] = classes.shape, classes.dtype, [classes]
      text = np.array(json.dumps(about))
      _write_npz(scratch, {**arrays, "about": ((), text.dtype, [text])})
    with scratch.open("rb") as file:
      os.fsync(file.fileno())


def _write_npz(path, arrays):
  """{name: (shape, dtype, blocks of rows)}: `np.savez` would need each array whole."""
  with zipfile.ZipFile(path, "w") as archive:
    for name, (shape, dtype, blocks) in arrays.items():
      info = zipfile.ZipInfo(f"{name}.npy")  # of a fixed date: the same features are the same bytes
      with archive.open(info, "w", force_zip64=True) as file:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
          file.write(np.ascontiguousarray(block, dtype).tobytes())


def _read_npz(path):
  if not zipfile.is_zipfile(path):  # an empty file or a single array, which NumPy reads in another way
    raise zipfile.BadZipFile("it is no archive of arrays")
  with np.load(path) as archive:
    names = set(archive.files)
    about = json.loads(str(archive["about"])) if "about" in names else {}
    classes = tuple(map(str, archive["classes"])) if "classes" in names else ()
    if missing := [name for name in ("names", "features") if name not in names]:
      raise KeyError(f"it has no array {missing[0]!r}")
  arrays = {name: _mapped(path, name) for name in ("names", "features", "indices", "labels") if name in names}
  indices = arrays.get("indices", np.arange(len(arrays["names"])))
  return Embeddings(arrays["names"], arrays["features"], indices, arrays.get("labels"), classes, about)


def _mapped(path, name):
  """An array of an .npz as it lies on the disk; one that is compressed is read."""
  with zipfile.ZipFile(path) as archive:
    info = archive.getinfo(f"{name}.npy")
  if info.compress_type == zipfile.ZIP_STORED:
    with path.open("rb") as file:
      file.seek(info.header_offset + 26)
      lengths = struct.unpack("<HH", file.read(4))  # of the member's name and of its extra field
      file.seek(sum(lengths), os.SEEK_CUR)
      if np.lib.format.read_magic(file) == (1, 0):
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        if not fortran and not dtype.hasobject and 0 not in shape:
          return np.memmap(path, dtype, "r", file.tell(), shape)
  with np.load(path) as archive:
    return archive[name]


def _write_parquet(path, parts, images, about, width):
  pa, pq = _pyarrow()
  label = [("label", pa.int32())] if images.labelled else []
  columns = [("name", pa.string()), ("index", pa.int64()), *label, ("features", pa.list_(pa.float32(), width))]
  metadata = {"about": json.dumps(about), "classes": json.dumps(images.classes)}
  schema = pa.schema(columns, metadata=metadata)
  with pq.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
    for part, names in parts:
      features = pa.FixedSizeListArray.from_arrays(pa.array(part.features.ravel()), width)
      labels = [pa.array(part.labels)] if images.labelled else []
      writer.write_batch(pa.record_batch([pa.array(names), pa.array(part.indices), *labels, features], schema=schema))


def _read_parquet(path):
  _, pq = _pyarrow()
  with pq.ParquetFile(path) as file, tempfile.TemporaryFile() as scratch:
    schema, n = file.schema_arrow, file.metadata.num_rows
    labels = np.zeros(n, np.int32) if "label" in schema.names else None
    names, at = [], 0
    indices = np.zeros(n, np.int64)
    for batch in file.iter_batches(batch_size=4096):
      rows = slice(at, at + len(batch))
      scratch.write(np.ascontiguousarray(batch["features"].flatten(), np.float32).tobytes())
      names += batch["name"].to_pylist()
      indices[rows] = batch["index"]
      if labels is not None:
        labels[rows] = batch["label"]
      at = rows.stop
    scratch.flush()
    # On the disk, like those of an .npz: the temporary file, which has no name, lasts as long as the array.
    features = np.memmap(scratch, np.float32, "r", 0, (n, schema.field("features").type.list_size))
  metadata = {key: json.loads(text) for key, text in (schema.metadata or {}).items() if key in (b"about", b"classes")}
  return Embeddings(names, features, indices, labels, tuple(metadata.get(b"classes", ())), metadata.get(b"about", {}))


def _pyarrow():
  try:
    import pyarrow
    import pyarrow.parquet
  except ImportError:
    raise UserError(".parquet needs pyarrow: pip install pyarrow; or take a file that ends in .npz.") from None
  return pyarrow, pyarrow.parquet
