"""Reading prepared data sets, and what is said of those that cannot be read."""

import io
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from ssl_jax import data
from ssl_jax.data import prepared
from ssl_jax.data.fashion_mnist import CLASSES
from ssl_jax.data.image import ImageError
from ssl_jax.data.stream import Streamed
from ssl_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


class Foreign(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
  """A data set that the library has never heard of: no code of it is needed, nor found, to read it."""

  VERSION = tfds.core.Version("2.1.0")

  def __init__(self, features, examples, **kwargs):
    self._features, self._examples = features, examples
    super().__init__(**kwargs)

  def _info(self):
    return tfds.core.DatasetInfo(
      builder=self, features=tfds.features.FeaturesDict(self._features), disable_shuffling=True
    )

  def _split_generators(self, dl_manager):
    del dl_manager
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    yield from enumerate(self._examples)


def write(data_dir, images, *, labels=None, image=None, label=None):
  """Prepares `foreign` in `data_dir`, as PNG by default. `image` and `label` are TFDS features."""
  features = {"image": image or tfds.features.Image(shape=images[0].shape, encoding_format="png")}
  encode = (lambda x: x) if isinstance(image, tfds.features.Tensor) else png
  examples = [{"image": encode(x)} for x in images]
  if labels is not None:
    features["label"] = label or tfds.features.ClassLabel(num_classes=7)
    examples = [{**e, "label": y} for e, y in zip(examples, labels, strict=True)]
  tfds.disable_progress_bar()
  Foreign(features, examples, data_dir=data_dir, file_format="array_record").download_and_prepare()
  return data_dir / "foreign" / "2.1.0"


def png(image):
  out = io.BytesIO()
  PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(out, format="png")
  return out.getvalue()


def draw(*shape, seed=0):
  return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


@pytest.fixture
def own(tmp_path):
  """A copy of the built-in set that a test may damage: (data_dir, version folder)."""
  shutil.copytree(prepared.BUILTIN / "fashion_mnist_mini", tmp_path / "own")
  return tmp_path, tmp_path / "own" / "1.0.0"


def error_of(*args, **kwargs):
  with pytest.raises(UserError) as caught:
    data.load(*args, **kwargs)
  message = str(caught.value)
  assert "\n" not in message  # train.py prints it as one line.
  return message


# The built-in set.


@pytest.mark.parametrize(
  "split, n, images, labels",
  [("train", 12_000, 1155872999, 1359565744), ("test", 2_000, 1228093332, 138393859)],
)
def test_the_built_in_set_is_the_head_of_the_published_files(split, n, images, labels):
  # Checksums of the first n images and labels in Zalando's files, compared once with Debian's copy.
  got = data.load("fashion_mnist_mini", split, channels=1)
  assert got.images.shape == (n, 28, 28, 1) and got.images.dtype == np.uint8
  assert got.labels.shape == (n,) and got.labels.dtype == np.int32
  assert zlib.crc32(got.images.tobytes()) == images
  assert zlib.crc32(got.labels.astype("<i4").tobytes()) == labels
  assert (got.num_classes, got.name, got.split) == (10, "fashion_mnist_mini", split)


def test_the_built_in_set_names_its_source_and_no_machine():
  folder = prepared.BUILTIN / "fashion_mnist_mini" / "1.0.0"
  info = (folder / "dataset_info.json").read_text()
  assert "12,000" in info and "zalandoresearch" in info
  assert (folder / "label.labels.txt").read_text().split("\n")[:10] == list(CLASSES)
  for file in folder.iterdir():
    content = file.read_bytes()
    assert not [word for word in (b"/work", b"/home", b"/root", b"/tmp", b"/usr") if word in content]
  readme = (prepared.BUILTIN / "README.md").read_text()
  for needed in (
    "zalandoresearch/fashion-mnist",
    "2017 Zalando SE",
    "The above copyright notice",
    "--data_dir=",
  ):
    assert needed in readme


# Reading.


def test_slices_are_parts_of_the_split():
  whole = data.load("fashion_mnist_mini", "test", channels=1)
  parts = [data.load("fashion_mnist_mini", s, channels=1) for s in ("test[:25%]", "test[500:1999]", "test[-1:]")]
  assert [len(p.images) for p in parts] == [500, 1499, 1]
  np.testing.assert_array_equal(np.concatenate([p.images for p in parts]), whole.images)
  np.testing.assert_array_equal(np.concatenate([p.labels for p in parts]), whole.labels)


def test_a_sum_of_splits_holds_both():
  both = data.load("fashion_mnist_mini", "test[:3]+train[:4]", channels=1)
  first = [data.load("fashion_mnist_mini", s, channels=1).images for s in ("test[:3]", "train[:4]")]
  np.testing.assert_array_equal(both.images, np.concatenate(first))


@pytest.mark.parametrize("encoded", [True, False], ids=["png", "tensor"])
def test_three_channels_repeat_grey(tmp_path, encoded):
  images = draw(5, 6, 9, 1)
  feature = None if encoded else tfds.features.Tensor(shape=(6, 9, 1), dtype=np.uint8)
  write(tmp_path, images, image=feature)
  np.testing.assert_array_equal(data.load("foreign", "train", data_dir=tmp_path, channels=1).images, images)
  got = data.load("foreign", "train", data_dir=tmp_path).images
  np.testing.assert_array_equal(got, np.repeat(images, 3, axis=-1))


@pytest.mark.parametrize("encoded", [True, False], ids=["png", "tensor"])
def test_one_channel_is_the_luma_of_colours(tmp_path, encoded):
  images = draw(5, 6, 9, 3)
  feature = None if encoded else tfds.features.Tensor(shape=(6, 9, 3), dtype=np.uint8)
  write(tmp_path, images, image=feature)
  np.testing.assert_array_equal(data.load("foreign", "train", data_dir=tmp_path).images, images)
  got = data.load("foreign", "train", data_dir=tmp_path, channels=1).images
  luma = images @ np.array([0.299, 0.587, 0.114])
  np.testing.assert_allclose(got[..., 0], luma, atol=0.51)  # 0.5: rounding to uint8; 0.01: Pillow's fixed point


def test_grey_tensors_without_a_channel_axis_are_read(tmp_path):
  images = draw(3, 6, 9)
  write(tmp_path, images, image=tfds.features.Tensor(shape=(6, 9), dtype=np.uint8))
  got = data.load("foreign", "train", data_dir=tmp_path, channels=1).images
  np.testing.assert_array_equal(got[..., 0], images)


def test_class_labels_are_read_and_their_number_is_the_declared_one(tmp_path):
  write(tmp_path, draw(3, 4, 4, 3), labels=[2, 0, 5])
  got = data.load("foreign:2.1.0", "train", data_dir=str(tmp_path))
  assert got.labels.tolist() == [2, 0, 5] and got.num_classes == 7


def test_integers_that_are_no_class_labels_count_up_to_the_largest(tmp_path):
  write(tmp_path, draw(3, 4, 4, 3), labels=[2, 0, 5], label=tfds.features.Scalar(dtype=np.int64))
  got = data.load("foreign", "train", data_dir=tmp_path)
  assert got.labels.tolist() == [2, 0, 5] and got.num_classes == 6


@pytest.mark.parametrize("labels", [None, ["a cat", "a dog", "a cow"]], ids=["none", "captions"])
def test_what_has_no_class_has_label_minus_one(tmp_path, labels):
  write(tmp_path, draw(3, 4, 4, 3), labels=labels, label=tfds.features.Text())
  got = data.load("foreign", "train", data_dir=tmp_path)
  assert got.labels.tolist() == [-1, -1, -1] and got.num_classes == 0


def test_the_default_folder_is_the_one_of_tfds(tmp_path, monkeypatch):
  images = draw(2, 4, 4, 3)
  write(tmp_path, images)
  monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
  np.testing.assert_array_equal(data.load("foreign", "train").images, images)


def test_the_highest_readable_version_is_taken(own):
  data_dir, folder = own
  for version in ("1.2.0", "1.10.0", "2.0.0"):
    shutil.copytree(folder, data_dir / "own" / version)
    edit_info(data_dir / "own" / version, version=version)
  edit_info(data_dir / "own" / "2.0.0", fileFormat="tfrecord")
  builder, _ = prepared._find("own", data_dir)
  assert pathlib.Path(builder.data_dir).name == "1.10.0"
  assert len(data.load("own:1.2.0", "test", data_dir=data_dir).images) == 2_000
  assert "no version 3.0.0, only 2.0.0, 1.10.0, 1.2.0, 1.0.0" in error_of("own:3.0.0", "test", data_dir=data_dir)


def test_a_configuration_is_named_where_there_are_several(own):
  data_dir, folder = own
  shutil.copytree(folder, data_dir / "set" / "small" / "1.0.0")
  assert len(data.load("set", "test", data_dir=data_dir).images) == 2_000
  shutil.copytree(folder, data_dir / "set" / "large" / "1.0.0")
  assert "several configurations, name one of them: set/large, set/small" in error_of("set", "test", data_dir=data_dir)
  assert len(data.load("set/large:1.0.0", "test", data_dir=data_dir).images) == 2_000


# What cannot be read.


def edit_info(folder, **fields):
  path = folder / "dataset_info.json"
  path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_misspelt_name_names_the_nearest_and_the_command(own):
  data_dir, folder = own
  folder.parent.rename(data_dir / "cifar10")
  shutil.copytree(data_dir / "cifar10", data_dir / "birds")
  message = error_of("cifer10", "train", data_dir=data_dir)
  assert f"no data set 'cifer10' in {data_dir} (prepared there: cifar10, birds;" in message
  assert "Did you mean 'cifar10'?" in message
  assert f"t.builder('cifer10', data_dir='{data_dir}', file_format='array_record')" in message


@pytest.mark.parametrize("name", ["fashion_mnist", "fashion_mnst"])
def test_a_missing_fashion_mnist_names_our_command(tmp_path, name):
  message = error_of(name, "train", data_dir=tmp_path / "none")
  assert "the folder does not exist" in message
  assert f"python -m ssl_jax prepare fashion_mnist --data_dir={tmp_path / 'none'}" in message


def test_the_built_in_set_is_not_looked_for_elsewhere(tmp_path):
  message = error_of("fashion_mnist_mini", "train", data_dir=tmp_path)
  assert "it is built in, leave data_dir unset" in message


@pytest.mark.parametrize("name", ["", "a b", "a/b/c", "cifar10:3", "../x"])
def test_a_malformed_name_says_the_form(tmp_path, name):
  assert f"name/config:1.2.3, got {name!r}" in error_of(name, "train", data_dir=tmp_path)


def test_a_remote_folder_is_refused():
  assert "on this machine (mount or copy it), got gs://b" in error_of("x", "train", data_dir="gs://b")


def test_tfrecord_names_the_way_to_array_record(own):
  data_dir, folder = own
  edit_info(folder, fileFormat="tfrecord")
  message = error_of("own", "train", data_dir=data_dir)
  assert "is prepared as tfrecord only" in message
  assert "pip install tensorflow-cpu tensorflow-datasets" in message
  assert f"t.builder('own', data_dir='{data_dir}_array_record', file_format='array_record')" in message


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_missing_metadata_is_an_interrupted_preparation(own, file):
  data_dir, folder = own
  (folder / file).unlink()
  message = error_of("own", "train", data_dir=data_dir)
  assert f"{folder} has no {file}: its preparation was interrupted. Delete it and prepare it" in message


def test_damaged_metadata_names_the_folder(own):
  data_dir, folder = own
  (folder / "features.json").write_text("{")
  assert f"{folder} cannot be opened (JSONDecodeError" in error_of("own", "train", data_dir=data_dir)


def test_a_preparation_that_never_ended_names_its_folder(own):
  data_dir, folder = own
  unfinished = folder.rename(folder.with_name("incomplete.ABC123_1.0.0"))
  message = error_of("own", "train", data_dir=data_dir)
  assert "was interrupted, or still runs" in message and f"delete {unfinished} and prepare it" in message


def test_a_missing_file_of_a_split_hinders_that_split_alone(own):
  data_dir, folder = own
  (shard,) = folder.glob("*-train.*")
  shard.unlink()
  message = error_of("own", "train[:10]", data_dir=data_dir)
  assert f"{folder} lacks {shard.name}" in message and "Delete the folder and prepare it" in message
  assert len(data.load("own", "test", data_dir=data_dir).images) == 2_000


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.5, 0.95])
def test_a_truncated_file_is_damage(own, keep):
  data_dir, folder = own
  (shard,) = folder.glob("*-train.*")
  os.truncate(shard, int(shard.stat().st_size * keep))
  message = error_of("own", "train", data_dir=data_dir)
  assert str(folder) in message and ("lacks" in message or "damaged records" in message)
  assert "and prepare it" in message


@pytest.mark.parametrize("split", ["validation", "train[:", "train[:13000]", "train[:a]", ""])
def test_an_unknown_split_lists_the_splits(split):
  message = error_of("fashion_mnist_mini", split)
  assert f"has no split {split!r}" in message
  assert "It has: test (2,000 images), train (12,000 images)" in message


def test_an_empty_slice_is_an_error():
  assert "'train[:0]' holds no images" in error_of("fashion_mnist_mini", "train[:0]")


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_other_channels_are_refused(channels):
  assert f"channels must be 1 or 3, got {channels}." in error_of("fashion_mnist_mini", "test", channels=channels)


def test_what_does_not_fit_is_streamed_if_it_is_encoded_and_refused_otherwise(own, tmp_path):
  whole = data.load("fashion_mnist_mini", "test")
  streamed = data.load("fashion_mnist_mini", "test", max_bytes=28 * 28 * 3 * 2_000 - 1)
  assert isinstance(streamed, Streamed) and streamed.is_labelled and len(streamed) == 2_000
  again = pickle.loads(pickle.dumps(streamed.images.take(np.array([7, 1999, 3]))))
  for i, at in enumerate((7, 1999, 3)):
    np.testing.assert_array_equal(again.read(i), whole.images[at])
    assert again.label(i) == whole.labels[at] and again.name(i) == f"record {at} of test"
  write(tmp_path, draw(3, 4, 5, 3), image=tfds.features.Tensor(shape=(4, 5, 3), dtype=np.uint8))
  message = error_of("foreign", "train", data_dir=tmp_path, max_bytes=179)
  assert "needs 180 bytes (3 arrays of 4x5x3), max_bytes is 179" in message and "'train[:2]'" in message


def test_what_fits_exactly_is_read():
  assert len(data.load("fashion_mnist_mini", "test", max_bytes=28 * 28 * 3 * 2_000).images) == 2_000


def test_images_of_different_sizes_are_streamed(tmp_path):
  images = [draw(4, 4, 3), draw(5, 6, 3), draw(7, 2, 3)]
  folder = write(tmp_path, images, image=tfds.features.Image(shape=(None, None, 3)))
  dataset = data.load("foreign", "train[1:]", data_dir=tmp_path)
  assert isinstance(dataset, Streamed) and not dataset.is_labelled and len(dataset) == 2
  for i in range(2):
    np.testing.assert_array_equal(dataset.images.read(i), images[i + 1])
    assert dataset.images.label(i) == -1
  (shard,) = folder.glob("*.array_record-*")
  shard.write_bytes(b"not a record")
  with pytest.raises(ImageError, match="damaged record"):
    data.load("foreign", "train", data_dir=tmp_path).images.read(0)


def test_an_image_of_another_size_than_declared_is_named(tmp_path):
  write(tmp_path, [draw(4, 4, 3), draw(5, 6, 3)])
  message = error_of("foreign", "train", data_dir=tmp_path)
  assert "image 1 is 5x6, where its features.json says 4x4" in message


def test_bytes_that_are_no_image_are_damage(tmp_path, monkeypatch):
  monkeypatch.setattr(f"{__name__}.png", lambda image: b"no image")
  folder = write(tmp_path, draw(2, 4, 4, 3))
  assert f"{folder} holds damaged records (ImageError: not an image" in error_of("foreign", "train", data_dir=tmp_path)


def test_floats_are_refused(tmp_path):
  images = draw(2, 4, 4, 3).astype(np.float32)
  write(tmp_path, images, image=tfds.features.Tensor(shape=(4, 4, 3), dtype=np.float32))
  assert "must be uint8 [height, width, 1, 3 or 4], got float32 (4, 4, 3)" in error_of(
    "foreign", "train", data_dir=tmp_path
  )


def test_a_set_without_images_lists_its_features(own):
  data_dir, folder = own
  features = json.loads((folder / "features.json").read_text())
  features["featuresDict"]["features"]["photo"] = features["featuresDict"]["features"].pop("image")
  (folder / "features.json").write_text(json.dumps(features))
  assert "has no feature 'image', only label, photo." in error_of("own", "train", data_dir=data_dir)


def test_nothing_here_imports_tensorflow():
  code = (
    "import sys; from ssl_jax import data; from ssl_jax.commands import prepare; "
    "data.load('fashion_mnist_mini', 'test[:5]'); sys.exit('tensorflow' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "imagenet2012"])
def test_what_is_not_there_is_prepared_by_our_own_command_where_there_is_one(tmp_path, name):
  message = error_of(name, "train", data_dir=tmp_path)
  assert f"python -m ssl_jax prepare {name} --from=" in message and f"--data_dir={tmp_path}" in message
  assert "tensorflow" not in message


def test_a_transparent_record_is_the_same_in_memory_and_streamed(tmp_path):
  image = draw(4, 5, 4)
  image[..., 3] = 0  # its hidden colours must not show
  write(tmp_path, [image], image=tfds.features.Image(shape=(4, 5, 4), encoding_format="png"))
  whole = data.load("foreign", "train", data_dir=tmp_path)
  streamed = data.load("foreign", "train", data_dir=tmp_path, max_bytes=1)
  np.testing.assert_array_equal(whole.images[0], streamed.images.read(0))
  assert np.all(whole.images == 255)
