"""Tar shards and parquet files become prepared sets: images byte by byte, labels, names, splits, and a restart."""

import io
import json
import tarfile
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_prepare import contents, picture, put, read_back, run

from ssl_jax import data
from ssl_jax.commands import prepare
from ssl_jax.data import shards
from ssl_jax.errors import UserError


def write_tar(path, files):
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, "w") as tar:
    for name, content in files.items():
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  return path


def write_parquet(path, images, labels=None, names=None, group=2, **others):
  path.parent.mkdir(parents=True, exist_ok=True)
  columns = {"image": [{"bytes": image, "path": f"{i}.png"} for i, image in enumerate(images)]}
  if labels is not None:
    columns["label"] = labels
  table = pa.table(columns | others)
  if names:
    features = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
  pq.write_table(table, path, row_group_size=group)


def labels_of(root, split="train"):
  """[(label, or its class's name where there are such)] of a split's images."""
  source = shards.shards_source(root)
  return [source.classes[item.label] if item.label >= 0 else None for item in source.splits[split](0)]


def test_tars_keep_their_images_their_order_their_classes_and_their_splits(tmp_path, capsys):
  root = tmp_path / "in"
  write_tar(
    root / "set-train-0000.tar",
    {"a/0.jpg": picture(0, "jpeg"), "a/0.cls": b"2\n", "a/1.cls": b"0", "a/1.png": picture(1), "._x.png": b"junk"},
  )
  write_tar(root / "set-train-0001.tar", {"2.png": picture(2), "3.png": b"broken", "3.cls": b"1", "4.cls": b"1"})
  write_tar(root / "set-val-0000.tar", {"9.png": picture(9), "9.json": b'{"label": 1, "caption": "x"}'})
  assert run("shards", root, f"--data_dir={tmp_path}", "--name=tars") == 0
  folder = tmp_path / "tars" / "1.0.0"
  assert "2 not readable" in capsys.readouterr().out
  assert read_back(folder, "train") == [(picture(0, "jpeg"), 2), (picture(1), 0), (picture(2), -1)]
  assert read_back(folder, "val") == [(picture(9), 1)]
  assert (folder / "label.labels.txt").read_text().split() == ["0", "1", "2"]
  skipped = (folder / "skipped.txt").read_text().splitlines()
  assert [line.split("\t")[0] for line in skipped] == ["set-train-0001.tar/3", "set-train-0001.tar/4"]
  assert len(data.load("tars", "train", data_dir=tmp_path)) == 3


def test_classes_that_are_names_are_numbered_over_all_splits(tmp_path):
  root = tmp_path / "in"
  write_tar(root / "train" / "0.tar", {"0.png": picture(0), "0.cls": b"dog", "1.png": picture(1), "1.cls": b"bird"})
  write_tar(root / "test" / "0.TAR", {"0.png": picture(2), "0.cls": b"cat"})
  put(root, {"train/1.tar.gz": b"", "README.md": b"", ".cache/0.json": b""})
  source = shards.shards_source(root)
  assert source.notes[0] == "left out: 2 of other kinds (README.md, 1.tar.gz)"
  assert source.classes == ["bird", "cat", "dog"] and list(source.splits) == ["train", "test"]
  assert [[item.label for item in source.splits[split](0)] for split in source.splits] == [[2, 0], [1]]


def test_parquet_keeps_what_hugging_face_wrote(tmp_path):
  root, names = tmp_path / "in", ["cat", "dog", "owl"]
  images = [picture(i) for i in range(5)]
  write_parquet(root / "data" / "train-00000-of-00002.parquet", images[:3], [0, 1, None], names)
  write_parquet(root / "data" / "train-00001-of-00002.parquet", images[3:], [1, 0], names)
  write_parquet(root / "data" / "test-00000-of-00001.parquet", [picture(7)], [2], names)
  folder = prepare.write(shards.shards_source(root), "hf", tmp_path)
  assert read_back(folder, "train") == list(zip(images, [0, 1, -1, 1, 0], strict=True))
  assert read_back(folder, "test") == [(picture(7), 2)]
  assert (folder / "label.labels.txt").read_text().split() == names


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_a_killed_run_goes_on_in_the_middle_and_ends_in_the_same_bytes(tmp_path, monkeypatch, kind):
  root = tmp_path / "in"
  images = [b"broken" if i in (0, 6) else picture(i) for i in range(11)]
  for part in (0, 1):
    some = range(11)[6 * part : 6 * part + 6]
    if kind == "tar":
      files = {
        name: content for i in some for name, content in ((f"{i}.png", images[i]), (f"{i}.cls", b"%d" % (i % 2)))
      }
      write_tar(root / f"{part}.tar", files)
    else:
      write_parquet(root / f"{part}.parquet", [images[i] for i in some], [i % 2 for i in some], group=4)

  def write(data_dir):
    return prepare.write(shards.shards_source(root), "many", data_dir, shard_bytes=700)

  whole = write(tmp_path / "whole")
  want = [(images[i], i % 2) for i in range(11) if images[i] != b"broken"]
  assert read_back(whole, "train") == want
  check, seen = shards.check_image, []

  def killed(name, *args):
    if len(seen) == 8:
      raise KeyboardInterrupt
    seen.append(name)
    return check(name, *args)

  monkeypatch.setattr(shards, "check_image", killed)
  with pytest.raises(KeyboardInterrupt):
    write(tmp_path / "parts")
  seen.clear()
  folder = write(tmp_path / "parts")
  assert 0 < len(seen) < 8 and contents(folder) == contents(whole)
  monkeypatch.setattr(shards, "check_image", check)
  for start in range(12):
    labels = [item.label for item in shards.shards_source(root).splits["train"](start)]
    assert labels == [i % 2 for i in range(start, 11)]


@pytest.mark.parametrize(
  "files, text",
  [
    ({}, "no .tar or .parquet files"),
    ({"a.tar": b"", "b.parquet": b""}, "both .tar and .parquet files"),
    ({"a.tar": b"no tar at all" * 99}, "a.tar is damaged, or no tar file"),
    ({"a.parquet": b"no parquet"}, "a.parquet is damaged, or no parquet file"),
  ],
)
def test_mistakes_are_told_in_a_line(tmp_path, capsys, files, text):
  root = put(tmp_path / "in", files)
  root.mkdir(exist_ok=True)
  assert run("shards", root, f"--data_dir={tmp_path}", "--name=odd") == 1
  err = capsys.readouterr().err
  assert text in err and len(err.splitlines()) == 1


def test_labels_of_two_kinds_and_files_without_images_are_refused(tmp_path):
  write_tar(tmp_path / "in" / "0.tar", {"0.cls": b"1", "1.cls": b"dog"})
  with pytest.raises(UserError, match="some labels are numbers and some are names"):
    shards.shards_source(tmp_path / "in")
  pq.write_table(pa.table({"text": ["a"], "n": np.arange(1)}), tmp_path / "0.parquet")
  (tmp_path / "in" / "0.tar").unlink()
  with pytest.raises(UserError, match=r"has no column of images, .* only text \(string\), n \(int64\)"):
    shards.shards_source(tmp_path)


def test_a_tar_that_is_cut_anywhere_is_an_error_that_names_it(tmp_path):
  path = write_tar(tmp_path / "in" / "0.tar", {f"{i}.{kind}": b"a" * 40 for i in range(3) for kind in ("png", "cls")})
  whole = path.read_bytes()
  for end in range(256, 6 * 1024 + 512, 256):  # in headers, in contents, in what fills blocks, and between members
    path.write_bytes(whole[:end])
    with pytest.raises(UserError, match=r"0\.tar (ends|is damaged).*: copy or download it again"):
      shards.shards_source(tmp_path / "in")
  path.write_bytes(whole[:2048] + b"\xff" * 512 + whole[2560:])
  with pytest.raises(UserError, match=r"0\.tar is damaged, after 0\.cls: copy"):
    shards.shards_source(tmp_path / "in")
  path.write_bytes(whole[: 6 * 1024 + 512])
  assert len(list(shards.shards_source(tmp_path / "in").splits["train"](0))) == 3
  path.write_bytes(whole[:2048] + bytes(512) + whole[2560:])  # a hole where a header was
  with pytest.raises(UserError, match=r"0\.tar is damaged, after 0\.cls: copy"):
    shards.shards_source(tmp_path / "in")


def test_tars_joined_by_cat_lose_nothing(tmp_path):
  parts = []
  for part in range(3):
    files = {f"{i}.{kind}": b"%d" % i for i in range(2 * part, 2 * part + 2) for kind in ("png", "cls")}
    parts.append(write_tar(tmp_path / "part.tar", files).read_bytes())
  parts[1] = parts[1][: 4 * 1024 + 512]  # one block of zeros, the least that a whole tar has
  path = write_tar(tmp_path / "in" / "0.tar", {})
  path.write_bytes(b"".join(parts))
  assert labels_of(tmp_path / "in") == list("012345")
  source = shards.shards_source(tmp_path / "in")
  assert [item.label for item in source.splits["train"](3)] == [3, 4, 5]
  for last in (parts[2][:1024], parts[2][:1300], b"junk" + parts[2][4:]):
    path.write_bytes(parts[0] + parts[1] + last)
    with pytest.raises(UserError, match=r"0\.tar (ends early|is damaged), after .*: copy"):
      shards.shards_source(tmp_path / "in")


def test_a_kind_of_file_that_a_sample_has_already_begins_the_next_one(tmp_path):
  path = tmp_path / "in" / "0.tar"
  path.parent.mkdir()
  rows = [("a.png", b"0"), ("a.cls", b"0"), ("a.PNG", b"1"), ("a.cls", b"1"), ("b.png", b"2"), ("b.png", b"3")]
  rows += [("b.cls", b"2"), ("c.cls", b"1"), ("c.cls", b"0"), ("c.png", b"4")]
  with tarfile.open(path, "w") as tar:
    for name, content in rows:
      member = tarfile.TarInfo(name)
      member.size = len(content)
      tar.addfile(member, io.BytesIO(content))
  assert labels_of(path.parent) == ["0", "1", None, "2", "1", "0"]
  assert shards.shards_source(path.parent).notes == (
    "train: images: .png; labels: .cls",
    "train: samples without an image: 1 (0.tar/c)",
    "train: samples without a label: 1 of 6 (0.tar/b)",
  )


def test_classes_in_another_order_are_told_by_their_names(tmp_path):
  write_parquet(tmp_path / "train-0.parquet", [b""] * 3, [0, 1, 2], ["cat", "dog", "cow"])
  write_parquet(tmp_path / "train-1.parquet", [b""] * 3, [0, 1, -1], ["cow", "cat"])
  write_parquet(tmp_path / "test.parquet", [b""] * 3, [0, 1, 2], ["cow", "dog", "cat"])
  write_parquet(tmp_path / "val.parquet", [b""], [1])
  assert labels_of(tmp_path) == ["cat", "dog", "cow", "cow", "cat", None]
  assert labels_of(tmp_path, "test") == ["cow", "dog", "cat"] and labels_of(tmp_path, "val") == ["dog"]
  notes = shards.shards_source(tmp_path).notes
  assert notes[1] == (
    "train: files whose classes are in another order, and numbered anew by their names: 1 (train-1.parquet)"
  )
  told = "files without names of classes, with numbers that are taken for those of the others: 1 (val.parquet)"
  assert f"val: {told}" in notes
  write_parquet(tmp_path / "val.parquet", [b""], [2], ["cat", "dog"])
  with pytest.raises(UserError, match=r"val\.parquet: there is the label 2, where its metadata names 2 classes"):
    shards.shards_source(tmp_path)
  write_parquet(tmp_path / "val.parquet", [b""], [1], ["cat", "emu"])
  told = r"val\.parquet names its classes cat, emu, and .*/train-0\.parquet cat, dog, cow, without emu: give"
  with pytest.raises(UserError, match=told):
    shards.shards_source(tmp_path)


NAMES = "label or labels or fine_label or class or cls"


@pytest.mark.parametrize(
  "columns, labels, line",
  [
    ({"label": [0.0, None, 2.0]}, ["0", None, "2"], "labels: column label"),
    ({"label": [0.0, float("nan"), 2.0]}, ["0", None, "2"], "labels: column label"),
    ({"label": [True, False, None]}, ["1", "0", None], "labels: column label"),
    ({"label": pa.array(["a", "b", "a"]).dictionary_encode()}, ["a", "b", "a"], "labels: column label"),
    ({"x": [1] * 3, "fine_label": [0, 1, 2]}, ["0", "1", "2"], "labels: column fine_label (others: x)"),
    (
      {"label": [[0]] * 3, "cls": [0, 1, 1]},
      ["0", "1", "1"],
      "labels: column cls (others: label (list<element: int64>))",
    ),
    ({"text": ["a"] * 3, "label": [b"a"] * 3}, [None] * 3, f"called {NAMES}, only label (binary), text"),
    ({"label": [Decimal(1)] * 3}, [None] * 3, f"called {NAMES}, only label (decimal128(1, 0))"),
    ({"target": [0, 1, 2]}, [None] * 3, f"called {NAMES}, only target"),
    ({}, [None] * 3, f"called {NAMES}, and no other one"),
    ({"label": [None] * 3}, [None] * 3, "labels: column label"),
  ],
)
def test_every_column_of_labels_is_taken_or_told(tmp_path, columns, labels, line):
  write_parquet(tmp_path / "0.parquet", [b""] * 3, **columns)
  assert labels_of(tmp_path) == labels
  notes = shards.shards_source(tmp_path).notes
  assert notes[0].startswith("train: images: column image; ") and notes[0].endswith(line)
  missing = labels.count(None)
  first = "" if not missing else f"0.parquet/{labels.index(None)}"
  assert notes[1:] == ((f"train: samples without a label: {missing} of 3 ({first})",) if missing else ())


def test_labels_in_tars_are_taken_or_told(tmp_path):
  held = {"a": b'{"label": 1.0}', "b": b'{"label": null}', "c": b'{"label": [0, 1], "x": 1}'}
  held["d"] = b'{"label": null, "labels": true}'
  files = {f"{name}.{kind}": held[name] if kind == "json" else b"" for name in held for kind in ("png", "json")}
  write_tar(tmp_path / "0.tar", files | {"e.png": b"", "e.cls": b"0.0"})
  assert labels_of(tmp_path) == ["1", None, None, "1", "0"]
  assert shards.shards_source(tmp_path).notes == (
    'train: images: .png; labels: "label" of .json and "labels" of .json and .cls (others: "x" of .json)',
    'train: "label" of .json passed over, where it is a list and no number or name: 1 (0.tar/c)',
    "train: samples without a label: 2 of 5 (0.tar/b)",
  )
  write_tar(tmp_path / "0.tar", {"a.png": b"", "a.txt": b"a cat", "a.json": b'{"category": 2}'})
  line = f'no labels: there is no .cls, and no .json with {NAMES}, only .txt, "category" of .json'
  assert shards.shards_source(tmp_path).notes[0] == f"train: images: .png; {line}"


def test_labels_that_are_no_classes_are_refused(tmp_path):
  write_parquet(tmp_path / "p" / "0.parquet", [b""] * 2, [1.0, 0.5])
  with pytest.raises(
    UserError, match=r"0\.parquet: the column label holds 0\.5, and classes are whole numbers or names"
  ):
    shards.shards_source(tmp_path / "p")
  for name, content in (("0.json", b'{"label": 1e999}'), ("0.cls", b"\xff")):
    write_tar(tmp_path / "t" / "0.tar", {"0.png": b"", name: content})
    with pytest.raises(UserError, match=r't/0\.tar/0(: "label" of its \.json holds inf|\.cls is no text)'):
      shards.shards_source(tmp_path / "t")


def test_other_columns_and_metadata_that_cannot_be_understood_are_no_traceback(tmp_path):
  first = tmp_path / "train-0.parquet"
  write_parquet(first, [b""], [0])
  for others in ({"y": [0]}, {"label": [[0]]}, {}):
    write_parquet(tmp_path / "train-1.parquet", [b""], **others)
    with pytest.raises(
      UserError, match=r"train-0\.parquet has .*labels: column label; .*train-1\.parquet has .*no labels"
    ):
      shards.shards_source(tmp_path)
  (tmp_path / "train-1.parquet").unlink()
  (tmp_path / "train-1.parquet").symlink_to(tmp_path / "nowhere")
  with pytest.raises(UserError, match=r"train-1\.parquet is damaged, or no parquet file"):
    shards.shards_source(tmp_path)
  (tmp_path / "train-1.parquet").unlink()
  for text in ("{no json", "null", "[]", '{"info": null}', '{"info": {"features": {"label": {"names": 5}}}}'):
    table = pa.table({"image": [b""] * 2, "label": [0, 1]}).replace_schema_metadata({"huggingface": text})
    pq.write_table(table, first)
    assert labels_of(tmp_path) == ["0", "1"]
    note = "train: files whose Hugging Face metadata cannot be understood: 1 (train-0.parquet)"
    assert shards.shards_source(tmp_path).notes[1:] == (note,)


@pytest.mark.parametrize("name", ["a\nb", "", " a", "a\x85b", "a\u2028b"])
def test_names_that_would_shift_the_list_of_classes_are_refused(tmp_path, name):
  write_parquet(tmp_path / "0.parquet", [b""] * 3, ["a", name, "b"])
  with pytest.raises(UserError, match=r"has a name that label\.labels\.txt cannot hold: rename it") as error:
    shards.shards_source(tmp_path)
  assert repr(name) in str(error.value)
  write_parquet(tmp_path / "0.parquet", [b""] * 3, [0, 1, 2], ["a", name, "b"])
  with pytest.raises(UserError, match=r"has a name that label\.labels\.txt cannot hold"):
    shards.shards_source(tmp_path)
  write_parquet(tmp_path / "0.parquet", [b""] * 3, [0, 1, 2], ["a", "b", "b"])
  with pytest.raises(UserError, match="2 classes have the name 'b'"):
    shards.shards_source(tmp_path)


def test_labels_that_changed_in_place_are_no_longer_the_set_that_was_prepared(tmp_path):
  write_tar(tmp_path / "in" / "0.tar", {"0.png": picture(0), "0.cls": b"0", "1.png": picture(1), "1.cls": b"1"})
  prepare.write(shards.shards_source(tmp_path / "in"), "mine", tmp_path)
  write_tar(tmp_path / "in" / "0.tar", {"0.png": picture(0), "0.cls": b"1", "1.png": picture(1), "1.cls": b"0"})
  with pytest.raises(UserError, match="was not prepared from this source"):
    prepare.write(shards.shards_source(tmp_path / "in"), "mine", tmp_path)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_files_that_are_missing_by_the_names_of_the_others_are_counted(tmp_path, kind):
  def add(name):
    path = tmp_path / "in" / f"{name}.{kind}"
    write_tar(path, {"0.png": picture(0)}) if kind == "tar" else write_parquet(path, [picture(0)])

  add("a/train-00000-of-00003-0a1b")
  add("a/test-00001-of-00001")  # some count from one
  add("b/train-00002-of-00003-2c3d")
  with pytest.raises(UserError, match=rf"2 of the 3 files a/train-\*-of-00003\.{kind} are missing"):
    shards.shards_source(tmp_path / "in")
  for name in ("a/train-00001-of-00003-4e5f", "a/train-00002-of-00003-6a7b", "b/train-00000-of-00003"):
    add(name)
  with pytest.raises(UserError, match="1 of the 3 files b/"):
    shards.shards_source(tmp_path / "in")
  add("b/train-00001-of-00003")
  assert set(shards.shards_source(tmp_path / "in").splits) == {"train", "test"}


def test_images_beside_the_first_labels_that_disagree_and_missing_ones_are_told(tmp_path, capsys):
  files = {}
  for i in range(3):
    files |= {f"{i}.left.png": picture(i), f"{i}.right.png": picture(9), f"{i}.cls": b"1"}
  files |= {"1.json": b'{"label": 0}', "0.json": b'{"label": 1}', "2.json": b'{"label": "dog"}', "2.x.cls": b""}
  files = dict(sorted(files.items())) | {"3.png": picture(3), "4.png": picture(4), "4.cls": b"-1", "about.txt": b"hi"}
  write_tar(tmp_path / "in" / "0.tar", files)
  write_tar(tmp_path / "in" / "val.tar", {"5.png": picture(5)})
  assert run("shards", tmp_path / "in", f"--data_dir={tmp_path}", "--name=told") == 0
  assert capsys.readouterr().out.splitlines()[:7] == [
    'train: images: .left.png, .right.png, .png; labels: .cls (others: .x.cls, .txt, "label" of .json)',
    "train: images left out, beside the first one of a sample: 3 (0.tar/0.right.png)",
    "train: labels of .cls taken where .json has another: 1 (0.tar/1: 1, 0)",
    "train: samples without an image: 1 (0.tar/about)",
    "train: samples without a label: 2 of 5 (0.tar/3)",
    f"val: images: .png; no labels: there is no .cls, and no .json with {NAMES}",
    "val: samples without a label: 1 of 1 (val.tar/5)",
  ]
  wanted = [(picture(i), 1) for i in range(3)] + [(picture(i), -1) for i in (3, 4)]
  assert read_back(tmp_path / "told" / "1.0.0", "train") == wanted


def test_splits_may_differ_in_that_one_has_no_labels(tmp_path):
  write_parquet(tmp_path / "train.parquet", [picture(0)] * 3, [0, None, 1])
  write_parquet(tmp_path / "test.parquet", [picture(0)] * 2)
  assert shards.shards_source(tmp_path).notes[1::2] == (
    "train: samples without a label: 1 of 3 (train.parquet/1)",
    "test: samples without a label: 2 of 2 (test.parquet/0)",
  )
