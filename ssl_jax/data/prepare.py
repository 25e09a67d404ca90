"""Prepares a data set on disk, without TensorFlow and without a network.

  python -m ssl_jax.data.prepare fashion_mnist --data_dir=D [--from=FOLDER]

writes the 60,000 + 10,000 images of Fashion-MNIST into D/fashion_mnist/1.0.0, from the four published files
in FOLDER. TFDS writes into a folder beside it and renames that at the end, so a run that was killed leaves
nothing that looks finished.
"""

import argparse
import contextlib
import io
import pathlib
import shlex
import shutil
import sys
import time
from collections.abc import Sequence

import tensorflow_datasets as tfds

from ssl_jax.data import prepared
from ssl_jax.data.fashion_mnist import PUBLISHED_AT, FashionMnist
from ssl_jax.errors import UserError

DEBIAN = pathlib.Path("/usr/share/datasets/fashion-mnist")
# fashion_mnist_mini is the set inside this package.
SIZES = {
  "fashion_mnist": {"train_images": None, "test_images": None},
  "fashion_mnist_mini": {"train_images": 12_000, "test_images": 2_000},
}


def prepare(name: str, data_dir: pathlib.Path, source: pathlib.Path | None = None) -> pathlib.Path:
  """Prepares `name` into `data_dir`, unless it is there, and prints what is there then.

  Args:
    name: a key of `SIZES`.
    data_dir: TFDS's data folder, created if need be.
    source: folder with the four published files; None takes Debian's.

  Returns:
    The folder written: `data_dir/name/1.0.0`.

  Raises:
    UserError: the source is missing or wrong, or the folder holds something else.
  """
  folder = data_dir / name / str(FashionMnist.VERSION)
  if folder.exists() and _is_finished(folder, name):
    print(f"already prepared, nothing changed: {_summary(folder)}")
  else:
    _write(name, data_dir, folder, _source_folder(source))
    print(f"wrote {_summary(folder)}")
  print(f"use it: python train.py --config.data.name={name} --config.data.data_dir={shlex.quote(str(data_dir))}")
  return folder


def main(argv: Sequence[str] | None = None) -> int:
  """The command. Returns the exit status: 0, or 1 after printing one line about a mistake."""
  parser = argparse.ArgumentParser(prog="python -m ssl_jax.data.prepare", description=__doc__.split("\n")[0])
  parser.add_argument("dataset", choices=list(SIZES), metavar="dataset", help="fashion_mnist")
  parser.add_argument("--data_dir", required=True, type=pathlib.Path, help="folder to write dataset/version into")
  parser.add_argument(
    "--from",
    dest="source",
    type=pathlib.Path,
    metavar="FOLDER",
    help=f"folder with the four published files (default: {DEBIAN})",
  )
  args = parser.parse_args(argv)
  try:
    prepare(args.dataset, args.data_dir.expanduser(), args.source and args.source.expanduser())
  except (UserError, OSError) as error:  # OSError: no permission, disk full.
    print(f"error: {error}", file=sys.stderr)
    return 1
  return 0


def _source_folder(source):
  if source is None and not DEBIAN.is_dir():
    raise UserError(
      f"{DEBIAN} does not exist: apt-get install dataset-fashion-mnist, or download the four files from "
      f"{PUBLISHED_AT} and pass --from=FOLDER."
    )
  if source is not None and not source.is_dir():
    raise UserError(f"--from must be the folder with the four files of {PUBLISHED_AT}: {source} is not a folder.")
  return source or DEBIAN


def _is_finished(folder, name):
  """Whether `folder` is complete. Removes what an interrupted copy left there; raises if it is not ours."""
  try:
    builder = prepared.open_prepared(folder)
    for split in builder.info.splits if prepared.is_array_record(builder) else ():
      prepared.check_files(builder, split)
  except UserError as error:
    ours = (f"{name}-", "dataset_info", "features", "label.labels", "LICENSE", "incomplete")
    if not all(f.name.startswith(ours) for f in folder.iterdir()):
      raise UserError(f"{folder} is not a prepared {name}: delete it, or choose another --data_dir.") from error
    print(f"removing {folder}, which is not complete")
    shutil.rmtree(folder)
    return False
  if not prepared.is_array_record(builder):
    raise UserError(f"{folder} is prepared, but not as array_record: delete it, or choose another --data_dir.")
  return True


def _write(name, data_dir, folder, source):
  # Leftovers of killed runs. Younger ones may belong to a run that goes on, on another host.
  for leftover in (data_dir / name).glob(f"incomplete.*_{folder.name}"):
    if time.time() - leftover.stat().st_mtime > 3600:
      shutil.rmtree(leftover, ignore_errors=True)
  data_dir.mkdir(parents=True, exist_ok=True)
  builder = FashionMnist(source=source, name=name, data_dir=data_dir, file_format="array_record", **SIZES[name])
  tfds.disable_progress_bar()
  try:
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download, and there is none.
      builder.download_and_prepare()
  except OSError:
    # Two runs at once: the one that renames last finds the other's finished folder.
    if not folder.exists() or not _is_finished(folder, name):
      raise


def _summary(folder):
  splits = prepared.open_prepared(folder).info.splits
  counts = ", ".join(f"{s} {splits[s].num_examples:,} images" for s in sorted(splits, reverse=True))
  size = sum(f.stat().st_size for f in folder.iterdir())
  return f"{folder}: {counts}, {size:,} bytes"


if __name__ == "__main__":
  sys.exit(main())
