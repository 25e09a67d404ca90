"""What a restored encoder gives, and eval_linear.py and eval_knn.py on it: figures, records, wrong use."""

import json
import pathlib
import re
import tarfile

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from test_all_methods import in_memory

import eval_knn
import eval_linear
from ssl_jax import build, parallel, restore, restore_encoder
from ssl_jax.commands import evaluate
from ssl_jax.errors import UserError
from ssl_jax.evaluation import accuracy, features, probe
from ssl_jax.run import log

flags.FLAGS.mark_as_parsed()  # eval_linear.main reads them


def test_classes_without_a_test_image_are_told(capsys):
  eval_linear.check_classes(np.array([0, 0, 1, 1, 2, 2, -1]), np.array([0, 2, -1]), probe.parse_labels("all"), True)
  assert capsys.readouterr().out == "note: 1 of the 3 classes have no test image: no figure speaks of them\n"
  one = np.array([0, 1]), np.array([0, 1]), probe.parse_labels("1-per-class")
  eval_linear.check_classes(*one, False)  # where nothing is chosen, one is enough


@pytest.fixture(scope="module")
def old_run(tmp_path_factory):
  """A short run that an older version wrote: (workdir, its encoder on one device)."""
  folder = tmp_path_factory.mktemp("run")
  with tarfile.open(pathlib.Path(__file__).parent / "golden" / "old_run.tar.gz") as file:
    file.extractall(folder, filter="data")
  with pytest.MonkeyPatch.context() as patch:
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    patch.setattr(parallel, "make_mesh", lambda: one)
    yield folder, restore_encoder(folder)


def test_images_in_memory_have_the_features_that_the_extractor_gives(old_run):
  _, run = old_run
  dataset = build.dataset(run.config, "test[:100]")
  want, labels, indices = run.extractor.all(run.variables, dataset)
  assert want.dtype == np.float32 and want.std() > 0
  np.testing.assert_array_equal(labels, dataset.labels)
  np.testing.assert_array_equal(indices, np.arange(100))
  np.testing.assert_array_equal(run.features(dataset.images), want)
  rng = np.random.default_rng(0)
  between = np.clip(dataset.images + rng.uniform(-0.4, 0.4, dataset.images.shape), 0, 255)  # the levels of a file
  np.testing.assert_array_equal(run.features(np.float32(between / 255)), want)
  sizes = [(28, 40, 1), (90, 31, 1), (20, 20, 1)]
  several = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
  each = [run.extractor.all(run.variables, in_memory(x[None], np.array([-1]))).features[0] for x in several]
  np.testing.assert_array_equal(run.features([several[0], several[1] / 255, several[2]]), each)


def test_images_without_a_label_have_features_and_those_unreadable_are_left_out(old_run, photographs, monkeypatch):
  _, run = old_run
  monkeypatch.setattr(run.extractor, "batch_size", 8)  # several batches, the last one not full
  config = run.config.copy_and_resolve_references()
  config.data.folder, config.data.channels = str(photographs), 1
  (photographs / "train" / "0_stray.png").write_bytes((photographs / "train" / "b" / "1.png").read_bytes())
  dataset = build.dataset(config, "train")
  found = run.extractor.all(run.variables, dataset)
  assert len(found.features) == len(dataset) - 1 == 24  # a/4.png is broken
  names = [dataset.image_name(i) for i in found.indices]
  assert "a/4.png" not in names and found.labels[names.index("0_stray.png")] == -1
  same = [names.index(name) for name in ("0_stray.png", "b/1.png")]
  np.testing.assert_array_equal(*found.features[same])
  labelled = run.extractor(run.variables, dataset)[0]
  np.testing.assert_array_equal(labelled, found.features[found.labels >= 0])
  assert len(labelled) == 23
  originals = [dataset.original(i) for i in found.indices]
  np.testing.assert_array_equal(run.features(originals), found.features)
  margin = run.eval_view._replace(resize=32)  # more than its size
  cropping = features.Extractor(run.encoder, margin, parallel.make_mesh(), 8)
  want = cropping.all(run.variables, dataset).features
  np.testing.assert_array_equal(run._replace(eval_view=margin, extractor=cropping).features(originals), want)


@pytest.mark.parametrize(
  "images, error, text",
  [
    (np.zeros((0, 28, 28, 1), np.uint8), ValueError, "images must hold one at least"),
    (np.zeros((2, 28, 28, 1), np.int32), TypeError, r"uint8, or floating point in \[0, 1\], got int32"),
    (np.full((2, 28, 28, 1), 255.0), ValueError, r"must be in \[0, 1\], got 255.0 to 255.0: divide by 255"),
    (np.full((2, 28, 28, 1), np.nan), ValueError, r"must be in \[0, 1\], got nan"),
    (np.zeros((2, 28, 28, 3), np.uint8), ValueError, r"number of channels, 1, got \[28, 28, 3\]"),
    (
      np.zeros((28, 28, 1), np.uint8),
      ValueError,
      r"\[n, H, W, C\] or a list of \[H, W, C\], got one image of \[28, 1\]",
    ),
    ([np.zeros((0, 28, 1), np.uint8)], ValueError, r"got one image of \[0, 28, 1\]"),
  ],
)
def test_images_that_are_none_are_refused(old_run, images, error, text):
  with pytest.raises(error, match=text):
    old_run[1].features(images)


def test_eval_linear_tells_what_the_encoder_its_untrained_self_and_pixels_are_worth(old_run, capsys):
  workdir, run = old_run
  with flagsaver.flagsaver(workdir=str(workdir), labels="5-per-class", draws=2, C=["0.1"], per_class=True):
    assert eval_linear.main() == 0
  out = capsys.readouterr().out.splitlines()
  figures = json.loads(out[-1])
  assert figures == json.loads((workdir / "linear_labels-5-per-class.json").read_text())
  assert not (workdir / "linear.json").exists()  # which is of all labels
  made_of = dict(data="fashion_mnist_mini", data_dir=None, train_split="train[:256]", train_images=256, seed=0)
  made_of |= dict(test_split="test[:100]", test_images=100, features=run.config.encoder.features, blocks=None)
  assert made_of.items() <= figures.items()
  for name in ("", "untrained_", "pixels_", "pixels_standardised_"):
    for key in ("top1", "top5", "balanced"):
      assert figures[f"{name}{key}_low"] < figures[f"{name}{key}"] < figures[f"{name}{key}_high"]
    assert figures[f"{name}images"] == 50 and figures[f"{name}C"] == 0.1 and figures[f"{name}top1_std"] >= 0
    assert figures[f"{name}top1"] > 25  # of ten classes
  assert figures["guessing_top1"] < 20 and (figures["step"], figures["protocol"], figures["draws"]) == (5, "logreg", 2)
  begins = ("raw pixels  ", "pixels, standardised ", "encoder, untrained  ", "encoder   ")
  at = out.index(next(line for line in out if line.startswith("raw pixels")))
  assert all(line.startswith(text) for line, text in zip(out[at:], begins, strict=False))
  pixels = build.dataset(run.config, run.config.data.split).images.reshape(256, -1) / 255
  norm, spread = (np.mean(np.linalg.norm(x, axis=1)) for x in (pixels, pixels - pixels.mean(axis=0)))
  assert figures["pixels_feature_norm"] == pytest.approx(norm, rel=1e-5) and spread < norm
  varies = np.sqrt(np.sum(pixels.std(axis=0) > 0))
  assert 0.9 * varies < figures["pixels_standardised_feature_norm"] < varies  # each is 1 in the mean square
  head, *classes = [line.split(",") for line in (workdir / "linear_labels-5-per-class.csv").read_text().splitlines()]
  assert head[:3] == ["class", "images", "top1"] and head[5:] == [f"answered {c}" for c in range(10)]
  counts = np.array([row[5:] for row in classes], int)
  assert figures["top1"] == pytest.approx(100 * np.trace(counts) / counts.sum()) and counts.sum() == 2 * 100
  assert figures["balanced"] == pytest.approx(np.mean([float(row[2]) for row in classes]))
  # The untrained encoder is the one that the run's first evaluation saw.
  sets = [build.dataset(run.config, split) for split in (run.config.data.split, run.config.data.test_split)]
  found = [x for dataset in sets for x in run.extractor(run.untrained(), dataset)]
  then = next(row["knn_top1"] for row in log.read_rows(workdir / "metrics.jsonl") if "knn_top1" in row)
  scores = accuracy.knn_accuracy(*found, k=run.config.knn.k, temperature=run.config.knn.temperature)
  assert abs(scores["top1"] - then) <= 1  # one of a hundred images


@pytest.mark.parametrize(
  "given, text",
  [
    (dict(protocol="sgd"), "there is no --protocol=sgd; there is logreg, heads"),
    (dict(protocol="heads", C=["1"]), "--C is for --protocol=logreg, and this is heads"),
    (dict(rates=["0.1"]), "--rates is for --protocol=heads"),
    (dict(protocol="heads", rates=["-1"]), "--rates must be positive numbers with commas between, got '-1'"),
    (dict(blocks=["1", "4"]), "--blocks must be one number for --protocol=logreg, got 2"),
    (dict(protocol="heads", blocks=["x"]), "--blocks must be whole numbers from 1 on with commas between, got 'x'"),
    (dict(protocol="heads", blocks=["2"]), "--blocks=2: a ResNet has no class token and no patches"),
    (dict(features="cls"), "--features=cls: a ResNet has no class token and no patches"),
    (dict(labels="some"), "--labels must be all"),
    (dict(draws=3), "--draws must be at least 1, and 1 where all labels are used, got 3"),
    (dict(draws=0, labels="10%"), "--draws must be at least 1"),
    (dict(C=["1", "0"]), "--C must be positive numbers with commas between, got '1,0'"),
    (dict(C=["one"]), "--C must be positive numbers"),
    (dict(test_split="train[:256]"), r"both are 'train\[:256\]'"),
    (dict(test_split="train[255:300]"), r"'train\[:256\]' shares images with 'train\[255:300\]'"),
    *(
      ({"protocol": "linear", name: value}, f"--{name} is for --protocol=.*, and this is linear")
      for name, value in {
        **dict(C=["3"], features="cls", blocks=["77"], rates=["5"], head_steps=9, head_batch=8, draws=3),
        **dict(per_class=True, cache=True, batch_size=8, step=5, pixels=False),
      }.items()
    ),
    (dict(train_split="train[:9]"), "the training split has no image of class"),
    (dict(labels="1%"), r"1% of 256 images is fewer than the 10 classes"),
  ],
)
def test_wrong_use_is_told_before_work_begins(old_run, monkeypatch, given, text):
  monkeypatch.setattr(eval_linear, "Extractor", None)  # work
  monkeypatch.setattr(restore, "restore_encoder", lambda *_: old_run[1])
  with flagsaver.flagsaver(workdir=str(old_run[0]), **given), pytest.raises(UserError, match=text):
    eval_linear.main()


def test_a_set_without_labels_is_told_with_what_needs_them(old_run, tmp_path):
  import PIL.Image

  for i in range(3):
    PIL.Image.fromarray(np.full((28, 28), 9 * i, np.uint8)).save(tmp_path / f"{i}.png")
  given = dict(workdir=str(old_run[0]), folder=str(tmp_path), train_split="train")
  with (
    flagsaver.flagsaver(**given),
    pytest.raises(UserError, match="no labels, and a classifier is trained and scored"),
  ):
    eval_linear.main()


def test_only_figures_of_the_runs_own_data_and_features_have_the_plain_name(tmp_path):
  assert evaluate.place(tmp_path, "knn", "json") == tmp_path / "knn.json"
  names = []
  for given, text in (
    (dict(features="flat"), "_features-flat"),
    (dict(features="cls+mean", blocks=["1", "4"]), r"_features-cls\+mean_blocks-1-4"),
    (dict(labels="1%"), "_labels-1pct"),
    (dict(step=500, seed=3), "_step-500_seed-3"),
    (dict(data="fashion_mnist", data_dir="D"), r"_data-fashion_mnist_data_dir-D-\w{8}"),
    (dict(data_dir=str(tmp_path / "D")), r"_data_dir-D-\w{8}"),
    (dict(folder="one/photographs"), r"_folder-photographs-\w{8}"),
    (dict(folder="two/photographs"), r"_folder-photographs-\w{8}"),
    (dict(test_split="train[:50%]"), r"_test_split-train_50pct-\w{8}"),
    (dict(test_split="train[50%:]"), r"_test_split-train_50pct-\w{8}"),
    (dict(bank_split="train_50"), "_bank_split-train_50"),
    (dict(train_split="x" * 300), r"_train_split-x{40}-\w{8}"),
  ):
    with flagsaver.flagsaver(**given):
      names.append(evaluate.place(tmp_path, "knn", "json").name)
    assert re.fullmatch(rf"knn{text}\.json", names[-1]), names[-1]
  assert len(set(names)) == len(names)


def test_splits_share_images_where_their_slices_meet_or_one_folder_holds_the_other(old_run, tmp_path):
  config = old_run[1].config.copy_and_resolve_references()
  for one, other, want in (
    ("train[:50%]", "train[1499:1501]", True),
    ("train[:50%]", "train[50%:]", False),
    ("train[:100]+train[200:300]", "train[250:]", True),
    ("train", "test", False),
    ("train", "train", True),
  ):
    assert build.overlap(config, one, other) == build.overlap(config, other, one) == want, (one, other)
  config.data.folder = str(tmp_path)
  for name in ("train/a", "val/a", "more/val"):
    (tmp_path / name).mkdir(parents=True)
  pairs = ("train", "val"), ("val", "validation"), (".", "val"), ("more", "more/val"), ("val", "test")
  assert [build.overlap(config, *pair) for pair in pairs] == [False, True, True, True, False]


def test_k_nn_on_images_that_the_bank_has_too_says_so_in_its_record(old_run, monkeypatch, capsys):
  workdir, run = old_run
  monkeypatch.setattr(restore, "restore_encoder", lambda *_: run)
  made_up = lambda _, __, dataset, *___: (np.eye(len(dataset), 9, dtype=np.float32) + 1, dataset.labels)  # noqa: E731
  monkeypatch.setattr(eval_knn, "features_of", made_up)
  monkeypatch.setattr(eval_knn, "knn_scores", lambda bank, numbers, queries, labels, **_: np.eye(10)[labels])
  for split, overlap in (("train[200:300]", True), ("train[256:300]", False)):
    with flagsaver.flagsaver(workdir=str(workdir), test_split=split, k=["3"], temperature=0.2):
      assert eval_knn.main() == 0
      figures = json.loads(evaluate.place(workdir, "knn", "json").read_text())
    assert ("an image that is in both finds itself" in capsys.readouterr().out) == figures["overlap"] == overlap
    assert (figures["test_split"], figures["temperature"], figures["bank_images"]) == (split, 0.2, 256)
  assert not (workdir / "knn.json").exists()


def test_another_seed_of_the_linear_protocol_draws_other_labels_into_another_folder(old_run, monkeypatch):
  seen = []
  monkeypatch.setattr(eval_linear.train, "main", lambda config, workdir: seen.append((config, workdir)) or 1)
  monkeypatch.setattr(eval_linear, "version_for", lambda config: "simclr")
  given = dict(workdir=str(old_run[0]), protocol="linear", labels="10%")
  for seed, name in (({}, "linear_simclr_labels-10pct"), ({"seed": 7}, "linear_simclr_labels-10pct_seed-7")):
    with flagsaver.flagsaver(**given, **seed):
      assert eval_linear.main() == 1
    config, workdir = seen[-1]
    assert (config.seed, config.method.labels, workdir) == (seed.get("seed", 0), "10%", old_run[0] / name)
  wrong = flagsaver.flagsaver(**given | {"test_split": "train[:9]"})
  with wrong, pytest.raises(UserError, match=r"'train\[:256\]' shares images with 'train\[:9\]'"):
    eval_linear.main()
