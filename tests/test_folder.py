"""Folders of images: which are found, and whole runs on them."""

import json
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver
from photographs import photograph
from test_train import folder_config, small_config

import eval_knn
import train
from ssl_jax import augment, build, data, parallel
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import dataset, folder, sources
from ssl_jax.data.crop import centre_crop
from ssl_jax.data.image import ImageError
from ssl_jax.data.memory import InMemory
from ssl_jax.data.stream import Streamed
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Aux
from ssl_jax.run import log, messages

flags.FLAGS.mark_as_parsed()  # eval_knn's


# Folders.


def names_of(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
  return folder.find_split(root, root).names


def test_images_are_found_in_byte_order_without_what_is_hidden_or_none(tmp_path):
  wanted = ["B.JPG", "a b#%.png", "a/é.jpeg", "a/é.jfif", "b/c/d.webp", "ä.tiff", f"{'x' * 200}.bmp"]
  other = [".DS_Store", ".ipynb_checkpoints/a.png", "a/.hidden.jpg", "Thumbs.db", "notes.txt", "a/jpg"]
  (tmp_path / "empty").mkdir()
  assert names_of(tmp_path, *wanted, *other) == sorted(wanted, key=os.fsencode)


def test_links_are_followed_and_circles_left(tmp_path):
  names_of(tmp_path / "far", "a/1.png")
  names_of(tmp_path / "root", "0.png")
  (tmp_path / "root" / "link").symlink_to(tmp_path / "far")
  (tmp_path / "far" / "a" / "up").symlink_to(tmp_path / "root")
  assert folder.find_split(tmp_path / "root", tmp_path / "root").names == ["0.png", "link/a/1.png"]


def pictures(root, *names):
  for i, name in enumerate(names):
    photograph(root / name, i, (20, 16))
  return root


def test_a_class_called_train_is_no_split(tmp_path):
  classes = pictures(tmp_path / "classes", "bus/0.png", "car/0.png", "train/0.png", "train/1.png")
  found = data.load_folder(classes, "train")
  assert found.classes == ("bus", "car", "train") and len(found) == 4 and not found.notes
  with pytest.raises(UserError, match="has no folder 'test'"):
    data.load_folder(classes, "test")
  assert sources.folder_source(classes).classes == ["bus", "car", "train"]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_a_validation_split_is_found_by_any_of_its_names(tmp_path, name):
  root = pictures(tmp_path, "train/a/0.png", f"{name}/a/0.png", f"{name}/a/1.png")
  for asked in ("val", "valid", "validation"):
    assert len(data.load_folder(root, asked)) == 2
  assert dataset.split_named("val[:3]", ["train", "validation"]) == "validation[:3]"
  assert dataset.split_named("test", ["train", "validation"]) == "test"


@pytest.mark.parametrize("beside", [["test/a/0.png"], [], ["more/0.png"], ["@eaDir/0.png"]])
def test_a_folder_called_train_is_a_split_where_the_tree_has_the_shape_of_one(tmp_path, beside):
  root = pictures(tmp_path, "train/a/0.png", "train/b/0.png", *beside)
  found = data.load_folder(root, "train")
  assert found.classes == ("a", "b") and len(found) == 2
  assert found.notes == (("left out: 1 image beside the folder 'train' (in more)",) if "more/0.png" in beside else ())


def test_pictures_beside_the_class_folders_have_no_class_and_are_told(tmp_path):
  root = pictures(tmp_path, "train/a/0.png", "train/b/1.png", "train/stray.png", "test/a/0.png")
  found = data.load_folder(root, "train")
  assert found.is_labelled and found.labels.tolist() == [0, 1, -1]
  assert found.notes == ("1 image without a class folder: evaluation leaves them out",)


def test_a_folder_has_no_slices_and_an_empty_one_says_what_was_left_out(tmp_path):
  with pytest.raises(UserError, match=r"a folder of images has no slices, and 'train\[:9\]' is one"):
    data.load_folder(tmp_path, "train[:9]")
  with pytest.raises(UserError, match=r"holds no images .*; left out: 1 image in folders of other programs \(@eaDir\)"):
    data.load_folder(pictures(tmp_path, "@eaDir/0.png"), "train")


def test_other_programs_folders_are_left_out_and_told(tmp_path):
  root = pictures(tmp_path, "a/0.png", "a/@eaDir/0.png", "@eaDir/a/1.png", "__MACOSX/2.png", "b/3.png")
  found = data.load_folder(root, "train")
  assert found.classes == ("a", "b") and len(found) == 2
  assert found.notes == ("left out: 3 images in folders of other programs (@eaDir, __MACOSX)",)


def test_a_folder_tells_other_files_empty_classes_and_classes_that_differ_in_capitals(tmp_path):
  pictures(tmp_path, "train/Cat/0.png", "train/cat/1.png", "train/dog/2.png")
  for name in ("train/cat/0.heic", "train/cat/1.heic", "train/dog/about", "train/owl/0.xcf"):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  assert data.load_folder(tmp_path, "train").notes == (
    "left out: files whose names are not those of images (2 .heic, 1 without an ending, 1 .xcf)",
    "class folders without images: 1 (owl)",
    "classes whose names differ in capitals alone: Cat, cat",
  )


def test_a_folder_that_cannot_be_listed_is_told(tmp_path, monkeypatch):
  root, scandir = pictures(tmp_path, "a/0.png", "b/1.png"), os.scandir

  def refused(path):
    if str(path).endswith("b"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refused)
  assert data.load_folder(root, "train").notes == (
    f"folders that cannot be listed: 1, such as {root / 'b'} (Permission denied)",
    "class folders without images: 1 (b)",
  )


def test_one_size_goes_into_memory_and_anything_else_is_streamed(tmp_path):
  for i in range(3):
    photograph(tmp_path / "same" / f"{i}.png", i, (20, 16))
  same = data.load_folder(tmp_path / "same", "train")
  assert isinstance(same, InMemory) and same.images.shape == (3, 16, 20, 3)
  assert isinstance(data.load_folder(tmp_path / "same", "train", max_bytes=3 * 16 * 20 * 3 - 1), Streamed)
  (tmp_path / "same" / "9.png").write_bytes((tmp_path / "same" / "0.png").read_bytes()[:80])
  broken = data.load_folder(tmp_path / "same", "train")
  assert isinstance(broken, Streamed) and len(broken) == 4 and broken.num_classes == 0
  np.testing.assert_array_equal(broken.original(1), same.images[1])
  photograph(tmp_path / "mixed" / "b" / "0.png", 0, (20, 16))
  photograph(tmp_path / "mixed" / "a" / "1.png", 1, (20, 17))
  mixed = data.load_folder(tmp_path / "mixed", "train")
  assert isinstance(mixed, Streamed) and mixed.labels.tolist() == [0, 1] and mixed.num_classes == 2
  assert mixed.take(np.array([1])).image_name(0) == "b/0.png"
  assert mixed.take(np.array([1])).label(0) == 1


def test_images_of_other_channels_take_what_is_defined_for_them(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(16):
    alpha = PIL.Image.fromarray(rng.integers(0, 256, (20, 20 + i % 2, 2), dtype=np.uint8), mode="LA")
    alpha.save(tmp_path / f"{i}.png")
  config = small_config(**{"data.folder": str(tmp_path), "data.split": "train", "data.channels": 2, "batch_size": 8})
  config.steps, config.stop_after_steps = 9, 2
  run = build.run(config)
  assert "2 channels: colour jitter and grayscale are left out" in "".join(messages.describe(run))
  assert run.state.params["encoder"]["conv1"]["kernel"].shape[2] == 2
  batch = next(run.batches(0))
  assert batch["image"][0].shape == (8, 2, 28, 28, 2)
  config.views = tuple({**view, "mean": (0.5,) * 3, "std": (0.2,) * 3} for view in config.views)
  with pytest.raises(UserError, match=r"views\[0\].mean must be one number for each of data.channels=2"):
    build.run(config)
  color = jax.random.uniform(jax.random.key(0), (5, 9, 9))
  view = View(9, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=1.0, gray_p=1.0)
  np.testing.assert_allclose(augment.apply_view(jax.random.key(1), color, view), color, atol=1e-6)


# A run.


def test_a_run_on_a_folder_resumes_exactly_on_any_number_of_threads_and_its_encoder_is_evaluated(
  photographs, tmp_path, capsys
):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
  for workdir, parts in (("whole", [(None, 2)]), ("stopped", [(4, 0), (None, 3)])):
    for stop, threads in parts:
      config = folder_config(photographs, **{"stop_after_steps": stop, "data.threads": threads})
      assert train.main(config, tmp_path / workdir) == 0
  jax.config.update("jax_compilation_cache_dir", None)
  states = [
    ocp.PyTreeCheckpointer().restore(tmp_path / w / "checkpoints" / "9" / "state") for w in ("whole", "stopped")
  ]
  jax.tree.map(np.testing.assert_array_equal, *states)
  out = capsys.readouterr().out
  assert "24 images streamed, 3 channels\n" in out and f"wrote {tmp_path / 'stopped' / 'skipped.txt'}\n" in out
  assert out.count("skipped a/4.png, which cannot be read") == 2  # once a workdir
  assert (tmp_path / "stopped" / "skipped.txt").read_text() == "a/4.png\n"
  rows = [row for row in log.read_rows(tmp_path / "whole" / "metrics.jsonl") if "knn_top1" in row]
  assert rows and all(row["knn_top1"] in 100 * np.arange(8) / 7 for row in rows)  # seven of eight can be read
  assert "knn.k=20 is more than" not in out
  with flagsaver.flagsaver(workdir=str(tmp_path / "whole"), k=["20", "30"], batch_size=8):
    assert eval_knn.main() == 0
  out = capsys.readouterr().out
  assert "1 of the bank cannot be read or has no label" in out and "1 of the queries cannot be read" in out
  assert "k=30 is more than the 23 images of the bank: all of them vote\nk=30 " in out and "k=20 is" not in out
  kept = (photographs / "train" / "b" / "1.png").read_bytes()
  PIL.Image.new("RGB", (30, 20)).save(photographs / "train" / "b" / "1.png")  # another picture under the name of one
  with pytest.raises(UserError, match=r"the images are not those that this run began with \(sample: \w+ then, now"):
    train.main(folder_config(photographs, stop_after_steps=4), tmp_path / "stopped")
  (photographs / "train" / "b" / "1.png").write_bytes(kept)
  before = (tmp_path / "whole" / "knn.json").read_text()
  given = dict(folder=str(photographs), bank_split="val", test_split="val")
  with flagsaver.flagsaver(workdir=str(tmp_path / "whole"), k=["2"], batch_size=8, **given):
    assert eval_knn.main() == 0
  assert "the same images: each is left out of its own neighbours" in capsys.readouterr().out
  assert (tmp_path / "whole" / "knn.json").read_text() == before  # of the run's own data
  (others,) = (tmp_path / "whole").glob("knn_folder-photographs-*_bank_split-val_test_split-val.json")
  assert json.loads(others.read_text())["data"] == str(photographs)
  for wrong in (dict(folder="x", data="y"), dict(data_dir="x")):
    with flagsaver.flagsaver(workdir=str(tmp_path / "whole"), **wrong), pytest.raises(UserError, match="give"):
      eval_knn.main()
  (tmp_path / "whole" / "knn.json").unlink()
  (tmp_path / "whole" / "knn.json").mkdir()  # A run that one may only read keeps its figures to itself, too.
  with flagsaver.flagsaver(workdir=str(tmp_path / "whole"), k=["2"], batch_size=8):
    assert eval_knn.main() == 0
  out = capsys.readouterr().out.splitlines()
  assert out[-1].startswith('{"step": 9') and out[-2].endswith("knn.json (Is a directory)")
  for temperature in (float("nan"), float("inf"), 0.0, -1.0):
    with (
      flagsaver.flagsaver(temperature=temperature),
      pytest.raises(UserError, match="--temperature must be a positive"),
    ):
      eval_knn.main()
  (photographs / "train" / "a" / "0.jpg").unlink()  # a file less than when the run began
  with pytest.raises(UserError, match=r"the images are not those .*24 files.* now 23 files"):
    train.main(folder_config(photographs, stop_after_steps=4), tmp_path / "stopped")


def test_more_neighbours_than_the_bank_has_are_told_in_a_line(photographs):
  config = folder_config(photographs, **{"knn.k": 25})
  run = build.run(config)
  assert "knn.k=25 is more than the 24 images of the bank: all of them vote" in messages.describe(run)
  config.data.test_split = "none"
  lines = messages.describe(build.run(config))
  assert "data.test_split='none' names no images of classes that it trains on: the online k-NN is off" in lines


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 16])
def test_a_single_class_and_classes_of_one_image_train_and_have_an_accuracy(classes, tmp_path):
  for i in range(16):
    for split in ("train", "val"):
      photograph(tmp_path / split / f"c{i % classes}" / f"{i}.png", i)  # the same images: each finds itself
  config = folder_config(tmp_path, **{"stop_after_steps": 2, "knn.k": 1})
  assert train.main(config, tmp_path / "run") == 0
  rows = [row for row in log.read_rows(tmp_path / "run" / "metrics.jsonl") if "knn_top1" in row]
  assert len(rows) == 2 and all(row["knn_top1"] == row["knn_top5"] == 100 for row in rows)


def test_microbatches_of_streamed_crops_are_the_whole_batch():
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("batch",))
  crops = tuple(np.random.default_rng(v).normal(size=(8, v, 3)).astype(np.float32) for v in (1, 2, 4))

  def run(microbatch):
    def gradient(images, positions):
      mean = sum(np.prod(x.shape[1:]) * x.mean() for x in images)
      return mean, Aux({"loss": mean + positions.mean()}, {"mean": mean}, {"embedding": images[1]})

    def one(images):
      positions = jax.lax.axis_index("batch") * 4 + np.arange(4)
      return parallel.accumulate(gradient, microbatch, "batch")(images, positions)

    specs = dict(mesh=mesh, in_specs=(jax.P("batch"),), out_specs=jax.P(), check_vma=False)
    return jax.jit(jax.shard_map(one, **specs))(crops)

  for microbatch in (2, 4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), run(microbatch), run(None))


def test_bank_and_queries_are_prepared_alike_and_share_class_numbers(tmp_path):
  for i, name in enumerate("abc"):
    for j in range(2):
      photograph(tmp_path / "train" / name / f"{j}.png", 10 * i + j, (20, 16 + (i == 2)))
      if name != "b":
        photograph(tmp_path / "test" / name / f"{j}.png", 10 * i + j + 5, (20, 16))
  (tmp_path / "test" / "b").mkdir()
  bank, queries = (data.load_folder(tmp_path, split) for split in ("train", "test"))
  assert isinstance(bank, Streamed) and isinstance(queries, InMemory)
  same = queries.numbered_as(bank)
  assert same.labels.tolist() == [0, 0, 2, 2] == [same.label(i) for i in range(4)]
  np.testing.assert_array_equal(same.original(3), queries.images[3])
  assert same.take(np.array([2])).label(0) == 2
  other = bank.numbered_as(queries)
  assert other.labels.tolist() == [0, 0, -1, -1, 1, 1] and other.classes == ("a", "c")
  assert other.notes == ("2 images of classes that 'test' does not have (b): evaluation leaves them out",)


def test_classes_that_only_the_test_set_has_stop_no_run(photographs):
  (photographs / "val" / "b").rename(photographs / "val" / "z")
  run = build.run(folder_config(photographs))
  assert run.test_set.labels.tolist() == [0, 0, 0, 0, -1, -1, -1, -1]
  assert "val: 4 images of classes that 'train' does not have (z): evaluation leaves them out" in messages.describe(run)
  (photographs / "val" / "a").rename(photographs / "val" / "y")
  run = build.run(folder_config(photographs))
  assert run.test_set is None
  assert any("names no images of classes that it trains on" in line for line in messages.describe(run))


def test_copies_and_images_of_one_colour_are_told_at_the_start(tmp_path):
  (tmp_path / "train" / "a").mkdir(parents=True)
  for i in range(8):
    PIL.Image.new("RGB", (5, 5), (200, 0, 10)).save(tmp_path / "train" / "a" / f"{i}.png")
  photograph(tmp_path / "train" / "a" / "8.png", 0, (6, 6))
  found = data.load_folder(tmp_path, "train").tried()
  assert found.notes == (
    "of 9 images that were looked at, 7 are copies of others, 8 of one colour",
    "all images are of one class: an accuracy of 100 % says nothing",
  )
  assert not data.load("fashion_mnist_mini", "train").tried().notes


def test_a_crop_that_does_not_fit_and_negative_threads_are_told(photographs):
  with pytest.raises(UserError, match=r"crop of 28 pixels .* does not fit in eval_view.resize=16"):
    build.run(folder_config(photographs, **{"eval_view.resize": 16}))
  with pytest.raises(UserError, match=r"data\.threads must be a whole number, at least 0, or none, got -1"):
    build.run(folder_config(photographs, **{"data.threads": -1}))
  with pytest.raises(ImageError, match="too long: 400000x1"):
    centre_crop(np.zeros((1, 400_000, 3), np.uint8), EvaluationView(resize=256, size=224))


def test_names_of_any_bytes_can_be_written(tmp_path):
  photograph(tmp_path / "a.png", 0)
  os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
  files = folder.Files(str(tmp_path), folder.find_split(tmp_path, tmp_path).names, 3)
  assert files.read(0).shape[2] == 3
  (tmp_path / "out.txt").write_text(files.name(0), encoding="utf-8")
  assert files.name(0) == "caf\\xe9.png"


def test_a_folder_of_broken_images_is_told_before_the_run(photographs, tmp_path):
  for path in list((photographs / "train").rglob("*.*"))[:10]:
    pathlib.Path(path).write_bytes(b"broken")
  with pytest.raises(UserError, match="of 24 images that were tried cannot be read"):
    train.main(folder_config(photographs), tmp_path / "run")
  assert not (tmp_path / "run").exists()
