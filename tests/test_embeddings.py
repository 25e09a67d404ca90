"""Files of features: killed at any instant and made whole, what is refused, neighbours, duplicates, loose weights."""

import csv
import importlib
import json
import os
import pathlib
import re
import shlex
import shutil
import sys
import tracemalloc

import jax
import numpy as np
import PIL.Image
import pytest
import safetensors.numpy
from absl import flags
from photographs import photograph
from test_export import FIXED, LEARNED, VIEW, make

from runs import ROOT
from ssl_jax.commands import duplicates, embed, encoders
from ssl_jax.errors import UserError
from ssl_jax.evaluation import embeddings, neighbours
from ssl_jax.evaluation.features import Features
from ssl_jax.models import resnet, vit
from ssl_jax.run import cli, cluster
from ssl_jax.weights import export, layouts, released

N, D, BATCH = 150, 5, 2  # five parts, the last one not full
ABOUT = {"weights": "w", "view": (1, 2), "data": {"folder": "here"}}
DOCS = (ROOT / "docs" / "embeddings.md").read_text()


class Killed(BaseException):
  """No handler of ours catches it."""


def images(n=N):
  return embeddings.Images(n, lambda i: f"{'äb'[i % 2]}/{i}.png", True, ("ä", "b"))


def compute(start, n=N):
  """Every seventh image cannot be read."""
  for first in range(start, n, BATCH):
    at = np.array([i for i in range(first, min(first + BATCH, n)) if i % 7 != 3], np.int64)
    rng = np.random.default_rng(first)
    yield Features(rng.normal(size=(len(at), D)).astype(np.float32), (at % 2).astype(np.int32), at)


def write(out, about=ABOUT, of=compute):
  return embeddings.write(out, images(), about, BATCH, of)


@pytest.mark.parametrize("suffix", [".npz", pytest.param(".parquet", marks=pytest.mark.slow)])
def test_killed_at_any_instant_it_goes_on_to_the_same_bytes(tmp_path, monkeypatch, suffix):
  if suffix == ".parquet":
    pytest.importorskip("pyarrow")
  whole, out, left = tmp_path / f"whole{suffix}", tmp_path / f"out{suffix}", [0]
  assert write(whole)

  def instant():
    left[0] -= 1
    if left[0] == 0:
      raise Killed

  def counted(real):  # dies before it, or after it
    def call(*args, **kwargs):
      instant()
      result = real(*args, **kwargs)
      instant()
      return result

    return call

  for module, name in ((os, "fsync"), (os, "replace"), (shutil, "rmtree"), (np, "savez")):
    monkeypatch.setattr(module, name, counted(getattr(module, name)))
  begun, kills = set(), 0
  while True:  # each time a little later
    left[0] = kills + 1
    try:
      write(out)
      break
    except Killed:
      kills += 1
    assert not out.exists() or out.read_bytes() == whole.read_bytes()
    write(out, of=lambda start: begun.add(start) or compute(start))
    assert out.read_bytes() == whole.read_bytes()
    assert [x.name for x in tmp_path.glob("out*")] == [out.name]
    out.unlink()
  assert kills > 35 and begun == {0, 32, 64, 96, 128}


def test_both_formats_hold_the_same_and_the_features_stay_on_the_disk(tmp_path):
  pytest.importorskip("pyarrow")
  for suffix in embeddings.FORMATS:
    write(tmp_path / f"x{suffix}")
  found = [embeddings.read(tmp_path / f"x{suffix}") for suffix in embeddings.FORMATS]
  want = [np.concatenate(x) for x in zip(*compute(0), strict=True)]
  for x in found:
    assert isinstance(x.features, np.memmap)
    for got, array in zip((x.features, x.labels, x.indices), want, strict=True):
      np.testing.assert_array_equal(got, array)
    assert list(x.names) == [images().name(i) for i in want[2]]
    assert x.classes == ("ä", "b") and x.about == json.loads(json.dumps(ABOUT))
  plain = np.load(tmp_path / "x.npz")
  np.testing.assert_array_equal(plain["features"], want[0])
  assert plain["names"][0] == "ä/0.png"


def test_memory_holds_a_part_and_not_the_features(tmp_path):
  peaks = []
  for n in (2048, 16384):
    of = lambda start, n=n: (  # noqa: E731
      Features(np.ones((64, 128), np.float32), np.zeros(64, np.int32), np.arange(i, i + 64))
      for i in range(start, n, 64)
    )
    tracemalloc.start()
    embeddings.write(tmp_path / f"{n}.npz", images(n), {}, 64, of)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
  assert peaks[1] < 1.2 * peaks[0] < 16384 * 128 * 4 / 2


def test_work_on_anything_else_is_refused_and_a_damaged_part_made_again(tmp_path):
  out = tmp_path / "x.npz"
  write(tmp_path / "whole.npz")

  def some(start):
    for i, batch in enumerate(compute(start)):
      if i == 3 * embeddings.BATCHES_A_PART:
        raise Killed
      yield batch

  with pytest.raises(Killed):
    write(out, of=some)
  with pytest.raises(UserError, match=r"x\.npz is not finished"):
    embeddings.read(out)
  np.save(tmp_path / "loose.npy", np.ones((3, 4)))
  for other, why in ((tmp_path, "is a folder"), (tmp_path / "loose.npy", "holds one array, without names")):
    with pytest.raises(UserError, match=f"{why}: give a file that embed wrote"):
      embeddings.read(other)
  (tmp_path / "empty.npz").write_bytes(b"")
  (tmp_path / "loose.npy").rename(tmp_path / "renamed.npz")
  for name in ("empty.npz", "renamed.npz"):
    with pytest.raises(UserError, match=f"{name} does not hold embeddings, or is damaged: it is no archive of arrays"):
      embeddings.read(tmp_path / name)
  with pytest.raises(UserError, match=r"x\.npz\.parts was made from something else \(weights: w there, now v\)"):
    write(out, {**ABOUT, "weights": "v"})
  part = tmp_path / "x.npz.parts" / "000001.npz"
  content = bytearray(part.read_bytes())
  content[len(content) // 2] ^= 1
  part.write_bytes(content)
  started = []

  def second_job(start):
    started.append(start)
    with pytest.raises(UserError, match="another job is writing"):
      write(out)
    yield from compute(start)

  write(out, {**ABOUT, "data": "elsewhere"} | {"data": ABOUT["data"]}, second_job)
  assert started == [2 * embeddings.BATCHES_A_PART] and out.read_bytes() == (tmp_path / "whole.npz").read_bytes()
  with pytest.raises(UserError, match=r"x\.npz was made from something else"):
    write(out, {**ABOUT, "view": 3})
  assert not write(out, {**ABOUT, "data": "moved"})
  changed = {**ABOUT, "images": "f" * 64}
  for size, first, text in (
    (3, 0, r"129 there, now 3: 126 no longer there, such as ä/4\.png; others may be written since"),
    (N, 1, r"129 there, now 150: 1 no longer there, such as ä/0\.png; 22 not in it, .*, such as b/3\.png; others may"),
  ):
    others = images(size)._replace(name=lambda i, first=first: images().name(i + first))
    with pytest.raises(UserError, match=text) as told:
      embeddings.write(out, others, changed, BATCH, compute)
    assert "ffff" not in str(told.value)


def test_features_that_are_not_finite_are_not_written(tmp_path):
  bad = lambda start: (x._replace(features=x.features * np.inf) for x in compute(start))  # noqa: E731
  with pytest.raises(UserError, match="27 of 27 images have features that are not finite"):
    write(tmp_path / "x.npz", of=bad)


@pytest.fixture
def blocks(monkeypatch):
  """Small blocks, none of which the sizes below are multiples of."""
  monkeypatch.setattr(neighbours, "QUERIES", 8)
  monkeypatch.setattr(neighbours, "CHUNK", 16)


def test_neighbours_are_those_of_all_similarities_at_once(blocks, mesh):
  rng = np.random.default_rng(0)
  bank, queries = rng.normal(size=(37, 6)) + 1, rng.normal(size=(11, 6))
  bank[20] = bank[4]  # equally similar: the lower row comes first
  queries[3], queries[5] = bank[4], -1  # the other one is more like the zeros that fill a block up than like any row
  for itself in (None, np.arange(11) + 5):
    queries = queries if itself is None else bank[itself]
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (bank, queries)]
    similarity = unit[1] @ unit[0].T
    if itself is not None:
      similarity[np.arange(11), itself] = -np.inf
    parts = list(neighbours.nearest(bank, queries, 3, mesh(4), itself))
    assert [first for first, *_ in parts] == [0, 8]
    values, rows = (np.concatenate(x) for x in list(zip(*parts, strict=True))[1:])
    np.testing.assert_allclose(values, -np.sort(-similarity)[:, :3], atol=1e-6)
    np.testing.assert_array_equal(rows, np.argsort(-similarity.round(9), kind="stable")[:, :3])
  assert next(neighbours.nearest(bank[:2], bank[:2], 5, mesh(4), np.arange(2)))[1].shape == (2, 1)


def test_groups_are_the_connected_ones_of_all_pairs(blocks, mesh):
  rng = np.random.default_rng(1)
  x = rng.normal(size=(45, 3)).astype(np.float32)
  unit = x / np.linalg.norm(x, axis=1, keepdims=True)
  similarity = unit @ unit.T
  np.fill_diagonal(similarity, -np.inf)
  for least in (0.97, -0.5, 2.0):  # some groups, one group of all, none
    group = np.arange(45)
    for _ in range(45):
      group = np.array([min(group[i], *group[similarity[i] >= least], 45) for i in range(45)])
    got, highest = neighbours.similar_groups(x, least, mesh(4))
    np.testing.assert_array_equal(got, group)
    want = np.where(similarity.max(axis=1) >= least, similarity.max(axis=1), -np.inf)
    np.testing.assert_allclose(highest, want, atol=1e-6)
  assert len(set(group)) == 45 and 1 < len(set(neighbours.similar_groups(x, 0.97, mesh(4))[0])) < 40


@pytest.mark.parametrize("target", ["timm", "hf", "torchvision", "safetensors"])
def test_an_exported_folder_tells_all_about_its_encoder(tmp_path, target):
  variables, made = make(LEARNED, target, VIEW, channels=3) if target == "torchvision" else make(FIXED, target)
  if target == "torchvision":
    made.config["ssl_jax"]["eval_view"].update(mean=(0.5,) * 3, std=(0.2,) * 3)
  export.write(made, tmp_path / "out")
  for path in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
    found = released.read(path)
    want = LEARNED if target == "torchvision" else FIXED
    assert export.shape_of(found.encoder) == export.shape_of(want)
    jax.tree.map(np.testing.assert_array_equal, found.variables, variables)
    assert found.view == VIEW._replace(mean=(0.5,) * found.channels, std=(0.2,) * found.channels)


def test_other_peoples_folders_and_files_say_it_or_have_to_be_told(tmp_path):
  variables, made = make(LEARNED, "hf", VIEW, channels=3)
  del made.config["ssl_jax"]
  made.preprocessor.update(image_mean=[0.5, 0.4, 0.3], image_std=[0.2] * 3)
  export.write(made, tmp_path / "hf")
  found = released.read(tmp_path / "hf")
  assert export.shape_of(found.encoder) == export.shape_of(LEARNED)
  assert found.view == VIEW._replace(mean=(0.5, 0.4, 0.3), std=(0.2,) * 3)
  assert released.read(tmp_path / "hf", size=8, resize=12).view[:2] == (12, 8)
  (tmp_path / "hf" / "preprocessor_config.json").unlink()
  with pytest.raises(UserError, match=r"not known, since no preprocessor_config\.json.*--size=224 --mean=0\.485"):
    released.read(tmp_path / "hf")
  path = tmp_path / "loose.safetensors"
  safetensors.numpy.save_file(layouts.whole_state(LEARNED, variables), path)
  sight = dict(size=16, mean=[0.5] * 3, std=[0.2] * 3)
  with pytest.raises(UserError, match=r"width 24 may have any number of heads.*--heads=N"):
    released.read(path, **sight)
  found = released.read(path, heads=3, **sight)
  assert export.shape_of(found.encoder) == export.shape_of(LEARNED) and found.view.resize == 16
  with pytest.raises(UserError, match="--mean must be 3 numbers"):
    released.read(path, heads=3, **{**sight, "mean": [0.5]})
  model = resnet.ResNet(stages=(1, 2), width=0.125, stem="small", bottleneck=True)
  variables, _ = make(model, "safetensors", channels=3)
  safetensors.numpy.save_file(layouts.whole_state(model, variables), path)
  assert export.shape_of(released.read(path, **sight).encoder) == export.shape_of(model)


@pytest.mark.parametrize("target", ["timm", "hf"])
def test_dinov2s_parts_are_seen_in_its_weights(tmp_path, target):
  parts = dict(registers=2, layer_scale=1e-5, ffn="swiglu", mlp_ratio=3, resize="antialiased")
  model = vit.ViT(patch_size=4, dim=24, depth=1, heads=3, image_size=16, **parts)
  _, made = make(model, target, VIEW, channels=1)
  del made.config["ssl_jax"]
  export.write(made, tmp_path / "out")
  assert export.shape_of(released.read(tmp_path / "out").encoder) == export.shape_of(model)


def test_an_altered_copy_is_as_the_page_says():
  pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), np.uint8)
  shapes = [duplicates.altered(pixels, np.random.default_rng(i)).shape for i in range(50)]
  sides = np.array(shapes)[:, :2]
  assert {shape[2] for shape in shapes} == {3} and np.all(sides <= (90, 60)) and np.all(sides >= (90 * 0.46, 60 * 0.46))
  assert duplicates.altered(pixels[..., :2], np.random.default_rng(0)).shape[2] == 2


TAKEN = {"workdir", "step", "batch_size", "folder", "split", "out", "k"}


@pytest.fixture
def command(monkeypatch, capsys):
  """Runs a command of the package in this process; returns what it printed, and its status with what it said."""
  monkeypatch.setattr(cluster, "connect", lambda *_: None)  # JAX has begun
  for name in ("_quiet_libraries", "_use_compilation_cache"):
    monkeypatch.setattr(cli, name, lambda: None)

  def call(line):
    before, parsed = set(flags.FLAGS), flags.FLAGS.is_parsed()
    others = {flag: flags.FLAGS[flag] for flag in before & TAKEN}  # of the commands beside it, in this process only
    for flag in others:
      delattr(flags.FLAGS, flag)
    name, *words = shlex.split(line)
    monkeypatch.setattr(sys, "argv", [f"python -m ssl_jax {name}", *words])
    with pytest.raises(SystemExit) as ended:
      importlib.import_module(f"ssl_jax.commands.{name}").main()
    flags.FLAGS.unparse_flags()
    for flag in set(flags.FLAGS) - (before - others.keys()):
      delattr(flags.FLAGS, flag)
    for flag, definition in others.items():
      flags.FLAGS[flag] = definition
    if parsed:
      flags.FLAGS.mark_as_parsed()
    return capsys.readouterr().out, ended.value.code

  return call


def table(path):
  with path.open(newline="", encoding="utf-8") as file:
    return list(csv.DictReader(file))


def test_the_page_runs_as_it_stands_and_finds_the_copies(unbroken, tmp_path, monkeypatch, command):
  root = tmp_path / "photographs"
  for i in range(40):
    photograph(root / "ab"[i % 2] / f"{i}.jpg", i, (60, 44))
  shutil.copy(root / "a" / "0.jpg", root / "b" / "same.jpg")
  with PIL.Image.open(root / "a" / "2.jpg") as image:
    image.resize((45, 33)).save(root / "b" / "smaller.jpg", quality=80)
  (root / "a" / "broken.jpg").write_bytes(b"\xff\xd8\xffno more")
  (tmp_path / "runs").mkdir()
  (tmp_path / "runs" / "quickstart").symlink_to(unbroken[0])
  monkeypatch.chdir(tmp_path)
  said = []
  for line in re.findall(r"^python -m ssl_jax (.*)$", DOCS, re.MULTILINE):
    out, status = command(line)
    assert status == 0, out
    said.append(out)
  assert len(said) == 4 and "1 cannot be read and are left out, such as a/broken.jpg" in said[0]
  for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL):
    here: dict = {}
    exec(block, here)
    assert here["features"].shape[0] == 42 and here["found"].classes == ("a", "b")
  nearest = {(row["query"], row["rank"]): row["neighbour"] for row in table(pathlib.Path("found/neighbours.csv"))}
  assert (
    len(nearest) == 42 * 10 and nearest["a/0.jpg", "1"] == "b/same.jpg" and nearest["b/smaller.jpg", "1"] == "a/2.jpg"
  )
  assert len(table(pathlib.Path("found/of_one/neighbours.csv"))) == 20
  groups = {frozenset((row["group"], row["image"])) for row in table(pathlib.Path("found/duplicates.csv"))}
  assert groups == {
    frozenset(x) for x in (("1", "a/0.jpg"), ("1", "b/same.jpg"), ("2", "a/2.jpg"), ("2", "b/smaller.jpg"))
  }
  assert json.loads(said[3].splitlines()[-1])["superfluous"] == 2
  for name in ("neighbours", "duplicates"):
    assert pathlib.Path(f"found/{name}.png").read_bytes()[:4] == b"\x89PNG"

  shutil.copytree(root, "copy", copy_function=shutil.copy)  # at another time
  again = "duplicates photographs.npz --workdir=runs/quickstart --out=again --folder=copy"
  for line in ("neighbours photographs.npz --out=again --folder=copy", again):
    out, status = command(line)
    assert status == 0 and "note: copy: the files are not those that were embedded" in out
    assert all("not those that were embedded" not in x for x in said)
  photograph(tmp_path / "copy" / "a" / "4.jpg", 98, (60, 44))
  (tmp_path / "copy" / "b" / "5.jpg").unlink()
  assert "2 of 42 that were looked at differ, such as a/4.jpg. Run embed again" in command(again)[1]

  photograph(root / "a" / "0.jpg", 99)
  out, status = command("embed --workdir=runs/quickstart --folder=photographs --out=photographs.npz")
  assert "photographs.npz was made from something else (the images: " in status
  shutil.move(root, tmp_path / "moved")
  out, status = command("neighbours photographs.npz --of=0.jpg --out=moved_from")
  assert status == 0 and "no picture: the images cannot be read" in out


def test_splits_in_a_folder_are_no_classes_unless_they_are_named(unbroken, photographs, capsys):
  source = encoders.of_run(unbroken[0])
  everything, _ = encoders.images_of(source, str(photographs), None)
  assert len(everything) == 32 and not everything.num_classes and everything.image_name(0) == "train/a/0.jpg"
  assert "has the folders train, val: all images, without labels" in capsys.readouterr().out
  train, place = encoders.images_of(source, str(photographs), "train")
  assert train.classes == ("a", "b") and place == {"folder": str(photographs / "train")}
  assert f"{photographs}: data.channels=1: 23 of 23 images looked at have colours" in capsys.readouterr().out
  with pytest.raises(UserError, match=r"--split: .*/a has no folder 'train' of a split"):
    encoders.images_of(source, str(photographs / "train" / "a"), "train")
  test, place = encoders.images_of(source, None, "test[:9]")
  assert len(test) == 9 and place["name"] == "fashion_mnist_mini"


def test_originals_and_altered_copies_are_seen_as_they_were_embedded_with_a_margin(photographs, tmp_path):
  variables, _ = make(LEARNED, "hf", VIEW, channels=3)
  source = encoders.Source("it", LEARNED, variables, VIEW._replace(resize=2 * VIEW.size), 3, None, None)
  assert embed.run(source, str(photographs), "train", tmp_path / "it.npz", 8) == 0
  found = embeddings.read(tmp_path / "it.npz")
  measured = duplicates.measure(found, source, encoders.reader_of(found, None), 0.95, 8)
  assert len(measured.copies) == 23
