"""Prepares a data set on disk, without TensorFlow and without a network.

  python -m ssl_jax prepare folder DIR --data_dir=D [--name=NAME]
  python -m ssl_jax prepare shards DIR --data_dir=D [--name=NAME]      tar (WebDataset) or parquet files
  python -m ssl_jax prepare cifar10 --data_dir=D --from=FOLDER_OR_TAR
  python -m ssl_jax prepare cifar100 --data_dir=D --from=FOLDER_OR_TAR
  python -m ssl_jax prepare imagenet2012 --data_dir=D --from=FOLDER [--val_labels=FILE]
  python -m ssl_jax prepare fashion_mnist --data_dir=D [--from=FOLDER]

writes D/NAME/1.0.0 from what `data/sources.py` and `data/shards.py` describe. It is written to a folder beside it that
is renamed at the end, so that a killed run leaves nothing that looks finished. The next run resumes it: manifest.json
lists the finished shards and their checksums. A later run checks them, and writes damaged ones again.
skipped.txt lists the images that could not be read.
"""

import fcntl
import hashlib
import json
import os
import pathlib
import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.proto import tf_example_pb2

from ssl_jax.commands import Parser
from ssl_jax.data import prepared, shards, sources
from ssl_jax.data.fashion_mnist import PUBLISHED_AT, fashion_mnist_source
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, whole

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
VERSION = tfds.core.Version("1.0.0")
# fashion_mnist_mini is the set inside this package.
SIZES: dict[str, dict[str, int | None]] = {
  "fashion_mnist": {"train_images": None, "test_images": None},
  "fashion_mnist_mini": {"train_images": 12_000, "test_images": 2_000},
}


def write(source: sources.Source, name: str, data_dir: pathlib.Path, *, shard_bytes: int = 256 << 20) -> pathlib.Path:
  """Writes `data_dir/name/1.0.0`, or the parts of it that are missing or damaged, and prints a summary.

  Args:
    source: what to write.
    name: of the data set, and of its folder.
    data_dir: TFDS's data folder, created if need be.
    shard_bytes: a shard ends before the record that would make its records more than this.

  Returns:
    The folder written.

  Raises:
    UserError: the folder holds something else, another run is writing it, or a split has no image that can be read.
  """
  if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
    raise UserError(
      f"a data set's name is of a-z, 0-9 and _, and begins with a letter, got {name!r}: pass --name=NAME."
    )
  for note in source.notes:
    print(note)
  folder = data_dir / name / str(VERSION)
  work = folder.with_name(f"incomplete.shards_{folder.name}")
  print_of_source = f"{source.fingerprint}; shards of {shard_bytes} bytes"
  if folder.exists():
    manifest = _read_manifest(folder)
    if manifest is None:
      raise UserError(f"{folder}/manifest.json is missing or damaged: delete {folder}, or choose another --data_dir.")
    if manifest["source"] != print_of_source:
      raise UserError(f"{folder} was not prepared from this source: delete it, or choose another --data_dir or name.")
    damaged = [entry["file"] for entry in manifest["shards"] if not _is_intact(folder, entry)]
    metadata = ("dataset_info.json", "features.json", *(["label.labels.txt"] if source.classes else []))
    complete = all((folder / file).is_file() for file in metadata)
    if complete and source.classes:
      complete = (folder / "label.labels.txt").read_text().splitlines() == source.classes
    if not damaged and complete:
      print(f"already prepared, nothing changed: {_summary(folder)}")
      return _print_use(name, data_dir, folder)
    print(f"{folder} is damaged ({', '.join(damaged) or 'its metadata'}): writing that again")
    folder.rename(work)
  work.mkdir(parents=True, exist_ok=True)
  with open(work / "lock", "w") as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(f"another run is writing {work}: wait for it, or end it.") from None
    entries = _finish_shards(source, name, work, print_of_source, shard_bytes)
    _write_metadata(source, name, work, entries)
    (work / "lock").unlink()
    work.rename(folder)
  skipped = sum(len(entry["skipped"]) for entry in entries)
  print(f"wrote {_summary(folder)}" + (f"; {skipped:,} not readable, see {folder}/skipped.txt" if skipped else ""))
  return _print_use(name, data_dir, folder)


def _path(text):
  return pathlib.Path(os.path.expanduser(text))  # which leaves the ~ of a user without a home


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 1 after printing one line about a mistake."""
  parser = Parser(prog="python -m ssl_jax prepare", description=__doc__.split("\n")[0])
  names = ["folder", "shards", "cifar10", "cifar100", "imagenet2012", *SIZES]
  parser.add_argument("dataset", choices=names, metavar="dataset", help=", ".join(names[:-1]))
  parser.add_argument("folder", nargs="?", type=_path, metavar="DIR", help="for folder and shards: where the files are")
  parser.add_argument("--data_dir", required=True, type=_path, help="folder to write dataset/version into")
  parser.add_argument(
    "--from",
    dest="source",
    type=_path,
    metavar="FOLDER",
    help=f"folder with the published files; CIFAR: or the tar file (default for Fashion-MNIST: {DEBIAN})",
  )
  parser.add_argument("--name", help="of the data set (folder, shards; default: the folder's name)")
  parser.add_argument(
    "--val_labels",
    type=_path,
    metavar="FILE",
    help="imagenet2012: a file with a wnid, or 'filename wnid', per line; or the word none, for no validation split",
  )
  args = parser.parse_args(argv)
  is_folder = args.dataset in ("folder", "shards")
  if is_folder != (args.folder is not None) or (is_folder and args.source):
    parser.error("images: folder DIR, or shards DIR; published sets: NAME --from=FOLDER")
  if (args.name and not is_folder) or (args.val_labels and args.dataset != "imagenet2012"):
    parser.error("--name is for folder and shards, --val_labels for imagenet2012")
  if args.dataset.startswith(("cifar", "imagenet")) and not args.source:
    parser.error(f"{args.dataset} needs --from: nothing is downloaded")
  try:
    if args.dataset in SIZES:
      write(fashion_mnist_source(_source_folder(args.source), **SIZES[args.dataset]), args.dataset, args.data_dir)
    elif is_folder:
      name = args.name or re.sub(r"\W", "_", args.folder.resolve().name.lower(), flags=re.ASCII)
      source_of = sources.folder_source if args.dataset == "folder" else shards.shards_source
      write(source_of(args.folder), name, args.data_dir)
    elif args.dataset == "imagenet2012":
      write(sources.imagenet_source(args.source, args.val_labels), args.dataset, args.data_dir)
    else:
      write(sources.cifar_source(args.dataset, args.source), args.dataset, args.data_dir)
  except UserError as error:
    return parser.tell(str(error))
  except Exception as error:
    if text := cluster.refusal(error, args.data_dir):  # no permission, a full disk
      return parser.tell(text)
    if isinstance(error, OSError):
      return parser.tell(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    raise
  return 0


def _finish_shards(source, name, work, print_of_source, shard_bytes):
  """Writes the shards that are missing or damaged. Returns the manifest's entries of all shards."""
  manifest = _read_manifest(work)
  if manifest is None or manifest["source"] != print_of_source:
    manifest = {"source": print_of_source, "shards": []}
  kept = manifest["shards"]
  _rename_shards(work, kept)
  files = {"lock", "manifest.json", *(entry["file"] for entry in kept)}
  for path in work.iterdir():
    if path.name not in files:
      path.unlink()
  for entry in kept:
    if _is_intact(work, entry):
      continue
    again = next(_write_shards(source, entry["split"], work, entry["file"], entry["first"], shard_bytes), None)
    if again != entry:
      raise UserError(f"{work / entry['file']} was damaged, and its images have changed since: delete {work}.")
  for split in source.splits:
    finished = [entry for entry in kept if entry["split"] == split]
    first = finished[-1]["last"] if finished else 0
    pattern = f"{name}-{split}.array_record-{{:05d}}"
    for entry in _write_shards(source, split, work, pattern, first, shard_bytes, len(finished)):
      kept.append(entry)
      finished.append(entry)
      _write_manifest(work, manifest)
    if not finished:
      item = next(source.splits[split](0), None)
      reason = f", such as {item.name}: {item.reason}" if item else "; there are none"
      raise UserError(f"none of the images of the split {split!r} can be read{reason}.")
    for i, entry in enumerate(finished):  # TFDS's names contain the number of shards, known only now.
      entry["file"] = f"{pattern.format(i)}-of-{len(finished):05d}"
  _write_manifest(work, manifest)
  _rename_shards(work, kept)
  return kept


def _rename_shards(work, entries):
  """Renames shards to the names that the manifest already has for them."""
  for entry in entries:
    started = work / entry["file"].split("-of-")[0]
    if started.exists():
      started.rename(work / entry["file"])


def _write_shards(
  source: sources.Source, split: str, work: pathlib.Path, pattern: str, first: int, shard_bytes: int, index: int = 0
) -> Iterator[dict[str, Any]]:
  """Writes the shards of a split from item `first` on, and yields the manifest's entry of each once it is on the disk.

  An entry depends only on the items from its own first one on, so that a shard can be written again.
  """
  features = source.features(None)
  progress = _Progress(split)
  writer: Any = None
  entry: dict[str, Any] = {}
  skipped: list[list[str]] = []
  i = first - 1
  try:
    for i, item in enumerate(source.splits[split](first), first):
      progress.show(i + 1)
      if item.image is None:
        skipped.append([item.name, item.reason])
        continue
      label = {"label": item.label} if source.classes else {}
      example = tf_example_pb2.Example.FromString(features.serialize_example({"image": item.image, **label}))
      record = example.SerializeToString(deterministic=True)  # The fields of a map have no order of their own.
      if writer and entry["bytes"] + len(record) > shard_bytes:
        writer.close()
        writer = None
        yield _finished(work, entry, last=i)
        first, skipped, index = i, [], index + 1
      if writer is None:
        entry = {"file": pattern.format(index), "split": split, "first": first, "records": 0, "bytes": 0}
        entry |= {"jpeg": 0, "png": 0, "skipped": skipped}
        (work / entry["file"]).unlink(missing_ok=True)
        writer = array_record_module.ArrayRecordWriter(str(work / entry["file"]), "group_size:1")
      writer.write(record)
      entry["records"] += 1
      entry["bytes"] += len(record)
      entry["jpeg" if item.image.startswith(b"\xff\xd8") else "png"] += 1
    if writer:
      writer.close()
      writer = None
      yield _finished(work, entry, last=i + 1)
  finally:
    progress.end()
    if writer:
      writer.close()


def _finished(work, entry, last):
  path = work / entry["file"]
  with open(path, "rb") as file:
    os.fsync(file.fileno())
  try:
    reader = array_record_module.ArrayRecordReader(str(path))  # The writer does not report a full disk.
    written = reader.num_records()
    reader.close()
  except Exception:  # It can raise any exception.
    written = 0
  if written != entry["records"]:
    raise OSError(f"{path}: {written} of {entry['records']} records were written. Is the disk full?")
  return {**entry, "last": last, "sha256": _sha256(path)}


def _write_metadata(source, name, work, entries):
  kinds = [kind for kind in ("jpeg", "png") if any(entry[kind] for entry in entries)]
  identity = tfds.core.dataset_info.DatasetIdentity(name, VERSION, str(work), __name__)
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=source.description,
    features=source.features(kinds[0] if len(kinds) == 1 else None),
    supervised_keys=("image", "label") if source.classes else None,
    disable_shuffling=True,
    homepage=source.homepage,
    citation=source.citation,
    license=source.license,
  )
  info.set_file_format("array_record")
  splits = []
  for split in source.splits:
    shards = [entry for entry in entries if entry["split"] == split]
    template = tfds.core.ShardedFileTemplate(
      data_dir=work, dataset_name=name, split=split, filetype_suffix="array_record"
    )
    lengths, size = [entry["records"] for entry in shards], sum(entry["bytes"] for entry in shards)
    splits.append(tfds.core.SplitInfo(name=split, shard_lengths=lengths, num_bytes=size, filename_template=template))
  info.set_splits(tfds.core.splits.SplitDict(splits))
  info.write_to_directory(work)
  skipped = [f"{name}\t{reason}\n" for entry in entries for name, reason in entry["skipped"]]
  if skipped:
    (work / "skipped.txt").write_text("".join(skipped), errors="surrogateescape")


def _read_manifest(folder):
  """The manifest; None where there is none, or one that this command did not write."""
  try:
    manifest = json.loads((folder / "manifest.json").read_text())
    return manifest if {"source", "shards"} <= manifest.keys() else None
  except (OSError, ValueError, AttributeError):
    return None


def _write_manifest(folder, manifest):
  whole.text(folder / "manifest.json", json.dumps(manifest, indent=1))


def _is_intact(folder, entry):
  path = folder / entry["file"]
  return path.is_file() and _sha256(path) == entry["sha256"]


def _sha256(path):
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


class _Progress:
  """A line on stderr, once a second, if that is a terminal."""

  def __init__(self, split):
    self._split, self._shown, self._on = split, 0.0, sys.stderr.isatty()

  def show(self, images):
    if self._on and time.monotonic() - self._shown >= 1:
      self._shown = time.monotonic()
      print(f"\r{self._split}: {images:,} images", end="", file=sys.stderr, flush=True)

  def end(self):
    if self._on and self._shown:
      print(file=sys.stderr)


def _print_use(name, data_dir, folder):
  print(f"use it: python train.py --config.data.name={name} --config.data.data_dir={shlex.quote(str(data_dir))}")
  return folder


def _source_folder(source):
  if source is None and not DEBIAN.is_dir():
    raise UserError(
      f"{DEBIAN} does not exist: apt-get install dataset-fashion-mnist, or download the four files from "
      f"{PUBLISHED_AT} and pass --from=FOLDER."
    )
  if source is not None and not source.is_dir():
    raise UserError(f"--from must be the folder with the four files of {PUBLISHED_AT}: {source} is not a folder.")
  return source or DEBIAN


def _summary(folder):
  splits = prepared.open_prepared(folder).info.splits
  counts = ", ".join(f"{s} {splits[s].num_examples:,} images" for s in sorted(splits, reverse=True))
  size = sum(f.stat().st_size for f in folder.iterdir())
  return f"{folder}: {counts}, {size:,} bytes"
