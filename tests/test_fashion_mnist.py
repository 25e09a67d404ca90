"""Preparing Fashion-MNIST from its published files."""

import gzip
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from test_data import draw, edit_info, error_of

from ssl_jax import data
from ssl_jax.commands import prepare
from ssl_jax.data.fashion_mnist import fashion_mnist_source, read_split
from ssl_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


def write_idx(folder, train=12, test=5, *, plain=False):
  """A tiny Fashion-MNIST in the published form. Returns its train images and labels."""
  folder.mkdir(parents=True, exist_ok=True)
  for prefix, n in (("train", train), ("t10k", test)):
    images, labels = draw(n, 28, 28, seed=n), (np.arange(n) % 10).astype(np.uint8)
    for stem, magic, array in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
      content = np.array([magic, *array.shape], ">u4").tobytes() + array.tobytes()
      path = folder / f"{prefix}-{stem}-ubyte"
      if plain:
        path.write_bytes(content)
      else:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(content))
  return draw(train, 28, 28, seed=train), np.arange(train) % 10


@pytest.mark.parametrize("plain", [False, True], ids=["gz", "plain"])
def test_prepare_writes_what_the_files_hold(tmp_path, capsys, plain):
  images, labels = write_idx(tmp_path / "idx", plain=plain)
  out = tmp_path / "out dir"
  assert prepare.main(["fashion_mnist", f"--data_dir={out}", f"--from={tmp_path / 'idx'}"]) == 0
  printed = capsys.readouterr()
  assert f"wrote {out}/fashion_mnist/1.0.0: train 12 images, test 5 images," in printed.out
  assert f"python train.py --config.data.name=fashion_mnist --config.data.data_dir='{out}'" in printed.out
  got = data.load("fashion_mnist", "train", data_dir=out, channels=1)
  np.testing.assert_array_equal(got.images[..., 0], images)
  np.testing.assert_array_equal(got.labels, labels)
  assert got.num_classes == 10


def test_ours_is_read_though_tfds_has_another_version_of_the_name(tmp_path):
  write_idx(tmp_path / "idx")
  folder = prepared(tmp_path)
  tfrecord = shutil.copytree(folder, folder.with_name("3.0.1"))
  edit_info(tfrecord, fileFormat="tfrecord", version="3.0.1")
  assert tfds.builder_cls("fashion_mnist").VERSION == "3.0.1"  # imports and registers TFDS's class
  assert len(data.load("fashion_mnist", "train", data_dir=tmp_path).images) == 12
  assert "prepared as tfrecord only" in error_of("fashion_mnist:3.0.1", "train", data_dir=tmp_path)


def prepared(tmp_path, name="fashion_mnist", source="idx"):
  sizes = prepare.SIZES[name]
  return prepare.write(fashion_mnist_source(tmp_path / source, **sizes), name, tmp_path)


def contents(folder):
  return {f.name: (f.read_bytes(), f.stat().st_mtime_ns) for f in folder.iterdir()}


def test_a_second_run_says_so_and_changes_nothing(tmp_path, capsys):
  write_idx(tmp_path / "idx")
  folder = prepared(tmp_path)
  before = contents(folder)
  capsys.readouterr()
  assert prepare.main(["fashion_mnist", f"--data_dir={tmp_path}", f"--from={tmp_path / 'idx'}"]) == 0
  assert "already prepared, nothing changed" in capsys.readouterr().out
  assert contents(folder) == before


def test_without_debians_package_the_error_says_where_to_get_the_files(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(prepare, "DEBIAN", tmp_path / "none")
  assert prepare.main(["fashion_mnist", f"--data_dir={tmp_path}"]) == 1
  message = capsys.readouterr().err
  assert "apt-get install dataset-fashion-mnist" in message and "pass --from=FOLDER" in message
  assert message.count("\n") == 1
  assert not list(tmp_path.iterdir())


def test_a_source_that_is_no_folder_is_named(tmp_path, capsys):
  assert prepare.main(["fashion_mnist", f"--data_dir={tmp_path}", f"--from={tmp_path / 'x'}"]) == 1
  assert f"{tmp_path / 'x'} is not a folder" in capsys.readouterr().err


def test_an_unwritable_folder_is_one_line(tmp_path, capsys):
  write_idx(tmp_path / "idx")
  (tmp_path / "file").write_text("")
  args = ["fashion_mnist", f"--data_dir={tmp_path / 'file' / 'x'}", f"--from={tmp_path / 'idx'}"]
  assert prepare.main(args) == 1
  assert capsys.readouterr().err.startswith("python -m ssl_jax prepare: error: /")


IMAGES = np.array([0x803, 2, 28, 28], ">u4").tobytes() + bytes(2 * 28 * 28)


@pytest.mark.parametrize(
  "content, message",
  [
    (b"\0\0\x08\x01" + IMAGES[4:], "expected the IDX magic number 0x00000803, got 0x00000801"),
    (b"", "expected the IDX magic number 0x00000803, got 0x."),
    (IMAGES[:9], "expected a header of 16 bytes, got 9"),
    (IMAGES[:-1], "expected 1584 bytes for the sizes (2, 28, 28), got 1583"),
    (IMAGES + b"\0", "expected 1584 bytes for the sizes (2, 28, 28), got 1585"),
    (np.array([0x803, 2, 14, 56], ">u4").tobytes() + IMAGES[16:], "expected images of 28x28, got 14x56"),
    (np.array([0x803, 0, 28, 28], ">u4").tobytes(), "expected 0 labels, one an image, got 2"),
  ],
)
def test_a_wrong_idx_file_is_named_with_expected_and_got(tmp_path, capsys, content, message):
  write_idx(tmp_path / "idx", train=2, plain=True)
  (tmp_path / "idx" / "train-images-idx3-ubyte").write_bytes(content)
  assert prepare.main(["fashion_mnist", f"--data_dir={tmp_path}", f"--from={tmp_path / 'idx'}"]) == 1
  printed = capsys.readouterr().err
  assert message in printed and f"{tmp_path / 'idx'}/train-" in printed and printed.count("\n") == 1
  assert not (tmp_path / "fashion_mnist" / "1.0.0").exists()


def test_a_damaged_gzip_file_is_named(tmp_path):
  write_idx(tmp_path)
  path = tmp_path / "train-images-idx3-ubyte.gz"
  for content in (path.read_bytes()[:-20], b"no gzip", path.read_bytes()[:100] + bytes(3000)):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: expected a gzip file, got a damaged one"):
      read_split(tmp_path, "train")


def test_a_missing_idx_file_is_named(tmp_path):
  write_idx(tmp_path)
  (tmp_path / "t10k-labels-idx1-ubyte.gz").unlink()
  with pytest.raises(UserError, match=r"expected the file t10k-labels-idx1-ubyte\.gz"):
    read_split(tmp_path, "t10k")


def test_a_label_beyond_the_classes_is_refused(tmp_path):
  write_idx(tmp_path, train=2, plain=True)
  content = np.array([0x801, 2], ">u4").tobytes() + bytes([3, 10])
  (tmp_path / "train-labels-idx1-ubyte").write_bytes(content)
  with pytest.raises(UserError, match="expected labels from 0 to 9, got 10"):
    read_split(tmp_path, "train")


def test_a_subset_is_the_head_and_needs_enough_images(tmp_path):
  images, labels = write_idx(tmp_path)
  got = read_split(tmp_path, "train", 5)
  np.testing.assert_array_equal(got[0], images[:5])
  np.testing.assert_array_equal(got[1], labels[:5])
  with pytest.raises(UserError, match="expected at least 12000 images, got 12"):
    fashion_mnist_source(tmp_path, **prepare.SIZES["fashion_mnist_mini"])
