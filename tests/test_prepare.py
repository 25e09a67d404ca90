"""Preparing folders of images, CIFAR and ImageNet as ArrayRecord files: read back through TFDS itself."""

import io
import json
import os
import pathlib
import pickle
import struct
import tarfile

import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds

from ssl_jax import data
from ssl_jax.commands import prepare
from ssl_jax.data import sources
from ssl_jax.data.image import read_image
from ssl_jax.errors import UserError


def picture(seed, kind="png", size=(9, 7)):
  out = io.BytesIO()
  pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
  PIL.Image.fromarray(pixels).save(out, format=kind)
  return out.getvalue()


def put(root, files):
  for name, content in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
  return root


def read_back(folder, split):
  """[(encoded bytes, label)] in the order on disk, as TFDS reads them."""
  builder = tfds.builder_from_directory(folder)
  source = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
  return [(example["image"], int(example.get("label", -9))) for example in source]


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def run(*args):
  return prepare.main([str(arg) for arg in args])


# Folders.


def test_a_folder_is_copied_byte_by_byte_with_its_splits_labels_and_order(tmp_path, capsys):
  files = {
    "train/b/2.jpg": picture(1, "jpeg"),
    "train/b/10.png": picture(2),
    "train/a/x.jpg": picture(3, "jpeg", (5, 5)),
    "val/c/0.png": picture(4),
    "test/loose.png": picture(5),
    "other/0.png": picture(6),
  }
  root = put(tmp_path / "My pets", files)
  assert run("folder", root, f"--data_dir={tmp_path}") == 0
  folder = tmp_path / "my_pets" / "1.0.0"
  assert f"wrote {folder}: val 1 images, train 3 images, test 1 images" in capsys.readouterr().out
  assert read_back(folder, "train") == [
    (files["train/a/x.jpg"], 0),
    (files["train/b/10.png"], 1),
    (files["train/b/2.jpg"], 1),
  ]
  assert read_back(folder, "val") == [(files["val/c/0.png"], 2)]
  assert read_back(folder, "test") == [(files["test/loose.png"], -1)]
  assert (folder / "label.labels.txt").read_text().split() == ["a", "b", "c"]
  features = tfds.builder_from_directory(folder).info.features
  assert features["image"].shape == (None, None, 3) and features["image"].encoding_format is None
  streamed = data.load("my_pets", "train", data_dir=tmp_path)
  np.testing.assert_array_equal(streamed.images.read(2), read_image(files["train/b/2.jpg"]))
  assert streamed.images.read_reduced(2, 1)[1] == streamed.images.read(2).shape[:2]
  assert streamed.images.label(2) == 1 and streamed.num_classes == 3
  assert not list((tmp_path / "my_pets").glob("incomplete*")) and not (folder / "lock").exists()


def test_what_is_left_out_is_told_and_a_stray_picture_takes_no_labels_away(tmp_path, capsys):
  for name in ("train/a/0.png", "train/b/1.png", "train/2.png", "train/@eaDir/3.png", "test/a/4.png", "more/5.png"):
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4)).save(path)
  prepare.main(["folder", str(tmp_path / "root"), f"--data_dir={tmp_path}", "--name=mine"])
  out = capsys.readouterr().out
  assert "train: 1 image without a class folder" in out and "train: left out: 1 image in folders of other" in out
  assert "left out: 1 image beside the folder 'train' (in more)" in out
  images = data.load("mine", "train", data_dir=tmp_path)
  assert sorted(int(images.label(i)) for i in range(3)) == [-1, 0, 1]


def test_the_same_source_gives_the_same_bytes(tmp_path):
  for i in range(40):
    path = tmp_path / "root" / "ab"[i % 2] / f"{i}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.new("RGB", (4, 4), (i, 0, 0)).save(path)
  if hasattr(os, "mkfifo"):
    os.mkfifo(tmp_path / "root" / "a" / "pipe.png")
  for name in ("x", "y"):
    assert prepare.main(["folder", str(tmp_path / "root"), f"--data_dir={tmp_path / name}", "--name=mine"]) == 0
  one, other = (json.loads((tmp_path / x / "mine" / "1.0.0" / "manifest.json").read_text()) for x in "xy")
  assert one == other
  if hasattr(os, "mkfifo"):
    assert one["shards"][0]["skipped"] == [["a/pipe.png", "not a file"]]


def test_changed_class_names_and_lost_metadata_are_mended_by_the_same_command(tmp_path, capsys):
  for name in ("a/0.png", "b/1.png"):
    path = tmp_path / "root" / name
    path.parent.mkdir(parents=True)
    PIL.Image.new("RGB", (4, 4)).save(path)
  command = ["folder", str(tmp_path / "root"), f"--data_dir={tmp_path}", "--name=mine"]
  folder = tmp_path / "mine" / "1.0.0"
  assert prepare.main(command) == 0
  (folder / "label.labels.txt").write_text("b\na\n")
  assert prepare.main(command) == 0
  assert "is damaged (its metadata)" in capsys.readouterr().out
  for text in ("a\n", "a\nb\nc\n"):
    (folder / "label.labels.txt").write_text(text)
    with pytest.raises(UserError, match=r"labels\.txt names . classes, and features\.json says 2: give its"):
      data.load("mine", "train", data_dir=tmp_path)
  assert prepare.main(command) == 0
  assert (folder / "label.labels.txt").read_text().split() == ["a", "b"]
  (folder / "features.json").unlink()
  with pytest.raises(UserError, match=r"has no features\.json: give its `python -m ssl_jax prepare` command again"):
    data.load("mine", "train", data_dir=tmp_path)
  assert prepare.main(command) == 0 and len(data.load("mine", "train", data_dir=tmp_path)) == 2


def test_images_of_one_kind_and_without_classes(tmp_path):
  root = put(tmp_path / "in", {"1.jpg": picture(1, "jpeg"), "0.jpg": picture(0, "jpeg")})
  folder = prepare.write(sources.folder_source(root), "flat", tmp_path)
  assert read_back(folder, "train") == [(picture(0, "jpeg"), -9), (picture(1, "jpeg"), -9)]
  assert tfds.builder_from_directory(folder).info.features["image"].encoding_format == "jpeg"
  assert not (folder / "label.labels.txt").exists() and not (folder / "skipped.txt").exists()


def test_other_formats_become_png_and_unreadable_files_are_listed(tmp_path, capsys):
  files = {
    "a/0.jpg": picture(0, "jpeg")[:200],
    "a/1.bmp": picture(1, "bmp"),
    "a/2.png": b"no image",
    "a/3.gif": picture(3, "gif"),
    "a/4.jpg": b"",
  }
  root = put(tmp_path / "in", files)
  (root / "a" / "5.jpg").symlink_to(tmp_path / "nowhere")
  assert run("folder", root, f"--data_dir={tmp_path}", "--name=odd") == 0
  folder = tmp_path / "odd" / "1.0.0"
  assert f"4 not readable, see {folder}/skipped.txt" in capsys.readouterr().out
  lines = [line.split("\t") for line in (folder / "skipped.txt").read_text().splitlines()]
  assert [name for name, _ in lines] == ["a/0.jpg", "a/2.png", "a/4.jpg", "a/5.jpg"]
  assert lines[2][1] == "empty file" and lines[3][1] == "no such file or directory"
  got = read_back(folder, "train")
  assert [image[:4] for image, _ in got] == [b"\x89PNG"] * 2
  for (image, _), name in zip(got, ("a/1.bmp", "a/3.gif"), strict=True):
    np.testing.assert_array_equal(read_image(image), read_image(files[name]))


# Shards: about 310 bytes a record, so two a shard. Some files in between cannot be read.

SHARD = 700


@pytest.fixture
def many(tmp_path):
  files = {f"{'ab'[i % 2]}/{i}.png": b"broken" if i in (0, 4, 10) else picture(i) for i in range(11)}
  return put(tmp_path / "in", files)


def write_many(root, data_dir):
  return prepare.write(sources.folder_source(root), "many", data_dir, shard_bytes=SHARD)


def test_shards_are_as_large_as_asked_and_listed_with_their_checksums(many, tmp_path):
  folder = write_many(many, tmp_path)
  shards = json.loads((folder / "manifest.json").read_text())["shards"]
  assert [entry["file"] for entry in shards] == [f"many-train.array_record-{i:05d}-of-00004" for i in range(4)]
  assert [entry["records"] for entry in shards] == [2, 2, 2, 2]
  for entry in shards:
    assert prepare._sha256(folder / entry["file"]) == entry["sha256"] and entry["bytes"] <= SHARD
  assert list(tfds.builder_from_directory(folder).info.splits["train"].shard_lengths) == [2, 2, 2, 2]
  names = [name for name in sources.find_split(many, many).names if (many / name).read_bytes() != b"broken"]
  assert read_back(folder, "train") == [((many / name).read_bytes(), "ab".index(name[0])) for name in names]


@pytest.mark.parametrize("at", [0, 3, 7, 10])
def test_a_killed_run_goes_on_and_ends_in_the_same_bytes(many, tmp_path, monkeypatch, at):
  whole = contents(write_many(many, tmp_path / "whole"))
  names = sources.find_split(many, many).names
  asked, check = [], sources.check_image

  def killed(name, *args):
    if name == names[at]:
      raise KeyboardInterrupt
    return check(name, *args)

  def counted(name, *args):
    asked.append(name)
    return check(name, *args)

  monkeypatch.setattr(sources, "check_image", killed)
  with pytest.raises(KeyboardInterrupt):
    write_many(many, tmp_path / "out")
  assert [path.name for path in (tmp_path / "out" / "many").iterdir()] == ["incomplete.shards_1.0.0"]
  monkeypatch.setattr(sources, "check_image", counted)
  folder = write_many(many, tmp_path / "out")
  assert contents(folder) == whole
  if at > 6:
    assert len(asked) < len(names) - 2  # The finished shards were kept.


def test_a_kill_between_the_manifest_and_the_last_names_loses_no_shard(many, tmp_path, monkeypatch):
  whole = contents(write_many(many, tmp_path / "whole"))
  rename, left = pathlib.Path.rename, [2]

  def renamed(self, target):
    left[0] -= 1
    if left[0] < 0:
      raise KeyboardInterrupt
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", renamed)
  with pytest.raises(KeyboardInterrupt):
    write_many(many, tmp_path / "out")
  monkeypatch.undo()
  monkeypatch.setattr(sources, "check_image", lambda *args: pytest.fail("an image was read again"))
  assert contents(write_many(many, tmp_path / "out")) == whole


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "interrupted"])
@pytest.mark.parametrize("shard", [0, 1, 3])
def test_a_damaged_shard_is_found_and_only_it_is_written_again(many, tmp_path, capsys, finished, shard):
  folder = write_many(many, tmp_path)
  whole, stamps = contents(folder), {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  name = f"many-train.array_record-0000{shard}-of-00004"
  damaged = bytearray(whole[name])
  damaged[40] ^= 1
  (folder / name).write_bytes(damaged)
  if not finished:
    folder.rename(folder.with_name("incomplete.shards_1.0.0"))
  capsys.readouterr()
  write_many(many, tmp_path)
  assert contents(folder) == whole
  assert (f"{folder} is damaged ({name}): writing that again" in capsys.readouterr().out) == finished
  kept = [path.name for path in folder.glob("*array_record*") if path.stat().st_mtime_ns == stamps[path.name]]
  assert len(kept) == 3 and name not in kept


def test_a_damaged_shard_of_images_that_changed_is_an_error(many, tmp_path):
  folder = write_many(many, tmp_path)
  (folder / "many-train.array_record-00000-of-00004").write_bytes(b"")
  names = [name for name in sources.find_split(many, many).names if (many / name).read_bytes() != b"broken"]
  other = sources.to_png(np.zeros((9, 7, 3), np.uint8))
  (many / names[0]).write_bytes(other.ljust((many / names[0]).stat().st_size, b"\0"))
  with pytest.raises(UserError, match="its images have changed since: delete"):
    write_many(many, tmp_path)


def test_a_second_run_changes_nothing_and_another_source_is_refused(many, tmp_path, capsys):
  folder = write_many(many, tmp_path)
  stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
  write_many(many, tmp_path)
  assert "already prepared, nothing changed" in capsys.readouterr().out
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
  put(many, {"a/new.png": picture(50)})
  with pytest.raises(UserError, match=r"was not prepared from this source: delete it, or choose another"):
    write_many(many, tmp_path)
  assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
  (folder / "manifest.json").write_text("{")
  with pytest.raises(UserError, match=r"manifest.json is missing or damaged: delete"):
    write_many(many, tmp_path)


def test_an_interrupted_run_of_another_list_of_files_is_begun_anew(many, tmp_path):
  work = write_many(many, tmp_path / "out").rename(tmp_path / "out" / "many" / "incomplete.shards_1.0.0")
  put(many, {"a/00.png": picture(50)})
  folder = write_many(many, tmp_path / "out")
  assert not work.exists() and contents(folder) == contents(write_many(many, tmp_path / "whole"))


def test_two_runs_at_once_are_refused(many, tmp_path, monkeypatch):
  check = sources.check_image

  def beside(*args):
    monkeypatch.setattr(sources, "check_image", check)
    with pytest.raises(UserError, match="another run is writing"):
      write_many(many, tmp_path)
    return check(*args)

  monkeypatch.setattr(sources, "check_image", beside)
  assert len(read_back(write_many(many, tmp_path), "train")) == 8


@pytest.mark.parametrize(
  "args, message",
  [
    (["folder", "{}/none"], "there is no folder {}/none"),
    (["folder", "{}/empty"], "{}/empty holds no images"),
    (["folder", "{}/broken"], "none of the images of the split 'train' can be read, such as "),
    (["folder", "{}/bands"], "0.npy: 13 channels, not 3: train on the folder itself, with --config.data.channels"),
    (["folder", "{}/broken", "--name=9-x"], "got '9-x': pass --name=NAME"),
    (["folder", "{}/odd"], "the class 'a\\nb' has a name that label.labels.txt cannot hold"),
    (["cifar10", "--from={}/empty"], "there is no file {}/empty/cifar-10-python.tar.gz: download"),
    (["cifar100", "--from={}/broken/0.png"], "cannot be read (ReadError"),
    (["imagenet2012", "--from={}/empty"], "there is no file {}/empty/ILSVRC2012_img_train.tar"),
  ],
)
def test_mistakes_are_one_line(tmp_path, capsys, args, message):
  (tmp_path / "empty").mkdir()
  put(tmp_path, {"broken/0.png": b"broken", "odd/a\nb/0.png": picture(0), "bands/0.npy": b""})
  np.save(tmp_path / "bands" / "0.npy", np.zeros((4, 4, 13), np.uint8))
  args = [arg.replace("{}", str(tmp_path)) for arg in args]
  assert run(*args, f"--data_dir={tmp_path / 'out'}") == 1
  error = capsys.readouterr().err
  assert message.replace("{}", str(tmp_path)) in error and error.count("\n") == 1
  assert not list((tmp_path / "out").glob("*/1.0.0"))


# CIFAR.


def old_pickle(array, labels, key):
  """{"data": array, key: labels} as Python 2 and its numpy pickled it: byte strings, and numpy.core."""

  def text(content):
    return b"T" + struct.pack("<i", len(content)) + content

  dtype = (
    b"cnumpy\ndtype\n("
    + text(b"u1")
    + b"K\x00K\x01tR(K\x03"
    + text(b"|")
    + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
  )
  shape = b"".join(b"J" + struct.pack("<i", n) for n in array.shape)
  built = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00t" + text(b"b") + b"tR"
  built += b"(K\x01(" + shape + b"t" + dtype + b"I00\n" + text(array.tobytes()) + b"tb"
  numbers = b"](" + b"".join(b"K" + bytes([n]) for n in labels) + b"e"
  return b"\x80\x02}(" + text(b"data") + built + text(key) + numbers + b"u."


def add(tar, name, content):
  member = tarfile.TarInfo(name)
  member.size = len(content)
  tar.addfile(member, io.BytesIO(content))


def write_cifar(folder, name, batches=2, replace=None):
  """The published archive with few images, its files out of order. Returns {file: (images, labels)}."""
  ten = name == "cifar10"
  files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if ten else ["train", "test"]
  inside, key, meta = (
    ("cifar-10-batches-py", b"labels", "batches.meta") if ten else ("cifar-100-python", b"fine_labels", "meta")
  )
  names = {b"label_names" if ten else b"fine_label_names": [b"class%d" % i for i in range(10 if ten else 100)]}
  rng, made = np.random.default_rng(0), {}
  with tarfile.open(folder / f"cifar-{10 if ten else 100}-python.tar.gz", "w:gz") as tar:
    add(tar, f"{inside}/{meta}", pickle.dumps(names, protocol=4))
    for file in reversed(files):
      images, labels = (
        rng.integers(0, 256, (batches, 3072), np.uint8),
        rng.integers(0, len(names[next(iter(names))]), 2),
      )
      made[file] = images, labels.tolist()
      add(tar, f"{inside}/{file}", (replace or {}).get(file) or old_pickle(images, labels.tolist(), key))
  return made


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_is_loaded_as_published(tmp_path, name):
  made = write_cifar(tmp_path, name)
  assert run(name, f"--from={tmp_path}", f"--data_dir={tmp_path}") == 0
  for split, files in (
    ("train", [f for f in sorted(made) if not f.startswith("test")]),
    ("test", [f for f in made if f.startswith("test")]),
  ):
    got = data.load(name, split, data_dir=tmp_path)
    want = np.concatenate([made[f][0] for f in files]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(got.images, want)
    assert got.labels.tolist() == [label for f in files for label in made[f][1]]
  assert got.num_classes == (10 if name == "cifar10" else 100)
  label = tfds.builder_from_directory(tmp_path / name / "1.0.0").info.features["label"]
  assert label.int2str(3) == "class3"


def test_cifar_goes_on_within_a_file(tmp_path, monkeypatch):
  write_cifar(tmp_path, "cifar10")
  source = sources.cifar_source("cifar10", tmp_path)
  every = list(source.splits["train"](0))
  assert len(every) == 10
  for start in (1, 2, 5, 10):
    assert list(source.splits["train"](start)) == every[start:]


class Evil:
  def __reduce__(self):
    return os.system, ("touch pwned",)


class Sly:
  def __reduce__(self):
    return eval, ("open('pwned', 'w')",)


@pytest.mark.parametrize("attack", [Evil(), Sly()])
def test_a_pickle_that_calls_a_function_is_refused(tmp_path, capsys, monkeypatch, attack):
  monkeypatch.chdir(tmp_path)
  write_cifar(tmp_path, "cifar10", replace={"data_batch_2": pickle.dumps({b"data": attack})})
  assert run("cifar10", f"--from={tmp_path / 'cifar-10-python.tar.gz'}", f"--data_dir={tmp_path}") == 1
  error = capsys.readouterr().err
  assert "cifar-10-batches-py/data_batch_2 cannot be read (UnpicklingError: it asks for" in error
  assert not (tmp_path / "pwned").exists() and not (tmp_path / "cifar10" / "1.0.0").exists()


@pytest.mark.parametrize("labels", [[1], [1, 10], [1, -1]])
def test_cifar_labels_that_do_not_fit_are_refused(tmp_path, capsys, labels):
  content = pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": labels}, protocol=4)
  write_cifar(tmp_path, "cifar10", replace={"data_batch_1": content})
  assert run("cifar10", f"--from={tmp_path}", f"--data_dir={tmp_path}") == 1
  assert "data_batch_1 should hold" in capsys.readouterr().err


# ImageNet.


def write_imagenet(folder):
  """Both tar files, out of order. Returns the train images by class, and the validation images by name."""
  train = {wnid: {f"{wnid}_{i}.JPEG": picture(i + 10 * c, "jpeg") for i in range(3)} for c, wnid in enumerate(WNIDS)}
  val = {f"ILSVRC2012_val_0000000{i}.JPEG": picture(90 + i, "jpeg") for i in (3, 1, 2)}
  with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
    for wnid, images in train.items():
      inner = io.BytesIO()
      with tarfile.open(fileobj=inner, mode="w") as tar:
        for name, content in images.items():
          add(tar, name, content)
      add(outer, f"{wnid}.tar", inner.getvalue())
  with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
    for name, content in val.items():
      add(tar, name, content)
  return train, val


WNIDS = ("n00000002", "n00000001", "n00000003")  # in the order of the tar file


@pytest.mark.parametrize("by_name", [True, False])
def test_imagenet_is_read_from_its_tars_in_their_order(tmp_path, by_name):
  train, val = write_imagenet(tmp_path)
  want = {1: 2, 2: 0, 3: 1}
  rows = [(f"ILSVRC2012_val_0000000{i}.JPEG", sorted(WNIDS)[label]) for i, label in want.items()]
  lines = [f"{name} {wnid}" for name, wnid in reversed(rows)] if by_name else [wnid for _, wnid in rows]
  (tmp_path / "labels.txt").write_text("\n".join(lines) + "\n")
  args = ["imagenet2012", f"--from={tmp_path}", f"--data_dir={tmp_path}", f"--val_labels={tmp_path / 'labels.txt'}"]
  assert run(*args) == 0
  folder = tmp_path / "imagenet2012" / "1.0.0"
  label = {"n00000001": 0, "n00000002": 1, "n00000003": 2}
  assert read_back(folder, "train") == [(image, label[w]) for w in WNIDS for image in train[w].values()]
  assert read_back(folder, "validation") == [(val[name], want[int(name[-6])]) for name in val]
  assert (folder / "label.labels.txt").read_text().split() == sorted(WNIDS)


def test_imagenets_tars_joined_by_cat_lose_nothing(tmp_path):
  write_imagenet(tmp_path)
  path = tmp_path / "ILSVRC2012_img_train.tar"
  whole, inner = path.read_bytes(), io.BytesIO()
  with tarfile.open(fileobj=inner, mode="w") as tar:
    add(tar, "n00000004_0.JPEG", picture(0, "jpeg"))
  with tarfile.open(path, "w") as outer:
    add(outer, "n00000004.tar", 2 * inner.getvalue())
  path.write_bytes(whole + path.read_bytes())
  source = sources.imagenet_source(tmp_path, pathlib.Path("none"))
  assert [item.label for item in source.splits["train"](0)] == [1] * 3 + [0] * 3 + [2] * 3 + [3] * 2


def test_imagenet_goes_on_where_it_was_killed(tmp_path, monkeypatch):
  write_imagenet(tmp_path)
  source = sources.imagenet_source(tmp_path, pathlib.Path("none"))
  assert list(source.splits) == ["train"]
  every = list(source.splits["train"](0))
  assert len(every) == 9 and list(source.splits["train"](4)) == every[4:]


@pytest.mark.parametrize(
  "labels, message",
  [
    (None, "holds no labels: pass --val_labels=FILE"),
    ("n00000001\nn00000002\n", "should have 3 lines, one an image of"),
    ("490\n1\n2\n", "line 1 of"),
    ("ILSVRC2012_val_00000001.JPEG n00000001\n", "has no line for ILSVRC2012_val_00000002.JPEG, and 2 are missing"),
  ],
)
def test_imagenets_labels_are_checked_before_anything_is_written(tmp_path, capsys, labels, message):
  write_imagenet(tmp_path)
  args = ["imagenet2012", f"--from={tmp_path}", f"--data_dir={tmp_path / 'out'}"]
  if labels:
    (tmp_path / "labels.txt").write_text(labels)
    args.append(f"--val_labels={tmp_path / 'labels.txt'}")
  assert run(*args) == 1
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_a_tar_that_ends_early_is_an_error(tmp_path, capsys):
  write_imagenet(tmp_path)
  path = tmp_path / "ILSVRC2012_img_train.tar"
  path.write_bytes(path.read_bytes()[:-15_000])
  assert run("imagenet2012", f"--from={tmp_path}", f"--data_dir={tmp_path}", "--val_labels=none") == 1
  error = capsys.readouterr().err
  assert str(path) in error and "download it again" in error
  assert not (tmp_path / "imagenet2012" / "1.0.0").exists()
