"""Images that are read one by one: order, crops, what cannot be read, and a whole run on a folder of photographs."""

import gc
import os
import pathlib

import jax
import numpy as np
import orbax.checkpoint as ocp
import PIL.Image
import pytest
from absl import flags
from absl.testing import flagsaver
from test_augment import kolmogorov_smirnov
from test_train import small_config

import eval_knn
import train
from ssl_jax import augment, data, evaluate, metrics, parallel, report
from ssl_jax import config as configs
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import check, folder, stream
from ssl_jax.data.image import ImageError
from ssl_jax.errors import UserError
from ssl_jax.methods.base import Aux

flags.FLAGS.mark_as_parsed()  # Grain's worker processes read flags
VIEWS = (View(12, scale=(0.2, 1.0)), View(8, scale=(0.1, 0.4)), View(12, interpolation="bicubic"))


class Noise:
  """Images of different sizes, made when they are asked for; those in `bad` cannot be read."""

  channels = 3

  def __init__(self, n, bad=()):
    self.n, self.bad = n, bad

  def __len__(self):
    return self.n

  def read(self, i):
    if i in self.bad:
      raise ImageError("broken")
    rng = np.random.default_rng(i)
    return rng.integers(0, 256, (*rng.integers(10, 40, 2), 3), dtype=np.uint8)

  def label(self, i):
    return i % 3

  def name(self, i):
    return f"{i}.png"


def read(images, start=0, stop=9, threads=2, workers=0, **kwargs):
  run = dict(batch_size=4, seed=3, start=start, stop=stop, threads=threads, workers=workers)
  return list(stream.batches(images, VIEWS, **{**run, **kwargs}))


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


# Order.


@pytest.mark.parametrize("threads, workers", [(0, 0), (3, 0), (1, 2)])
def test_batches_depend_on_seed_and_step_alone_however_they_are_read_and_wherever_one_begins(threads, workers):  # C34
  want = read(Noise(13))
  assert_equal(read(Noise(13), 0, 4, threads, workers) + read(Noise(13), 4, 9, threads, workers), want)
  order = np.concatenate([batch["index"] for batch in want])
  for epoch in range(3):  # three batches of four an epoch, of thirteen
    assert len(set(order[12 * epoch : 12 * (epoch + 1)].tolist())) == 12


def test_nothing_holds_the_shared_memory_of_workers_after_the_last_batch():
  gc.collect()
  gc.disable()  # Python would warn of what is held in a cycle when it ends.
  try:
    batches = stream.batches(Noise(13), VIEWS, batch_size=4, seed=3, start=0, stop=9, threads=1, workers=2)
    for _ in range(9):
      batch = next(batches)
    assert type(batch["index"]).__name__ == "SharedMemoryArray"
    batches.close()
    del batch
    assert not [x for x in gc.get_objects() if type(x).__name__ == "SharedMemoryArray"]
  finally:
    gc.enable()


def test_processes_share_a_batch_in_order():
  want = read(Noise(13))
  parts = [read(Noise(13), process_index=i, process_count=2) for i in range(2)]
  for whole, *halves in zip(want, *parts, strict=True):
    assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *halves), whole)


def test_crops_differ_between_views_steps_places_and_seeds(monkeypatch):  # C112
  monkeypatch.setattr(f"{__name__}.VIEWS", 2 * VIEWS[:1])  # of one description: only the randomness tells them apart

  class Same(Noise):
    def read(self, i):
      return super().read(0)

  one = read(Same(8), 0, 2)
  crops = [batch["image"][0][i, v] for batch in one for i in range(4) for v in range(2)]
  crops += list(read(Same(8), 0, 1, seed=4)[0]["image"][0][:, 0])
  assert len({crop.tobytes() for crop in crops}) == len(crops)


# Crops.


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("i", range(4))
def test_crops_are_pillows(golden, monkeypatch, i, interpolation):
  g = golden("augment")
  monkeypatch.setattr(stream, "crop_box", lambda *_: tuple(map(int, g["boxes_top_left_height_width"][i])))
  (crop,) = stream.cut_views(g["image"], (View(32, interpolation=interpolation),), (0,))
  assert crop.shape == (1, 32, 32, 3) and crop.dtype == np.uint8
  assert np.max(np.abs(crop[0].astype(int) - g[f"crop{i}_{interpolation}_32_pil"])) <= 1


@pytest.mark.parametrize(
  "image_size, scale, key",
  [
    ((375, 500), 0.08, "375x500_scale0.08"),
    ((28, 28), 0.2, "28x28_scale0.2"),
    ((90, 400), 0.4, "90x400_scale0.4"),
  ],
)
def test_boxes_are_distributed_as_torchvisions(golden, image_size, scale, key):
  want = np.float64(golden("augment")[f"random_resized_crop_{key}"])
  rng = np.random.default_rng(0)
  got = np.float64([stream.crop_box(rng, image_size, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)])
  for statistic in (
    lambda b: b[:, 2] * b[:, 3],
    lambda b: np.log(b[:, 3] / b[:, 2]),
    lambda b: b[:, 0],
    lambda b: b[:, 1],
  ):
    # The critical value at the level 1e-3 for 5,000 against 20,000: 1.95 sqrt(1/5000 + 1/20000).
    assert kolmogorov_smirnov(statistic(got), statistic(want)) < 0.0308


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 300)])
def test_tiny_and_narrow_images_are_enlarged(size):  # C84
  pixels = np.full((*size, 3), 77, np.uint8)
  for crop in stream.cut_views(pixels, VIEWS, (0,)):
    assert np.all(crop == 77)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_cropped_plane_by_plane(channels):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
  crops = stream.cut_views(pixels, VIEWS, (5,))
  for c in range(channels):
    assert_equal(tuple(x[..., c : c + 1] for x in crops), stream.cut_views(pixels[..., c : c + 1], VIEWS, (5,)))


def test_the_device_finishes_cut_crops_as_it_finishes_its_own():
  whole = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # the crop is the image
  look = dict(jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.5, blur_p=0.5, solarize_p=0.5, flip=0.5)
  views = (View(16, **whole, **look), View(12, **whole, flip=1.0), View(16, **whole, **look), View(16, **whole))
  images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
  images[:, 8:] //= 4
  cut = [stream.cut_views(image, views, (0, i)) for i, image in enumerate(images)]
  crops = jax.tree.map(lambda *x: np.stack(x), *cut)
  assert [x.shape for x in crops] == [(6, 3, 16, 16, 3), (6, 1, 12, 12, 3)]
  keys = augment.example_keys(0, np.int32(5), np.arange(6))
  make = jax.jit(lambda images: augment.make_views(keys, images, views))
  got, want = make(crops), make(images)
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)  # a crop of 16 from 16 pixels is the pixels
  np.testing.assert_allclose(got[1], want[1], atol=1.01 / 255)  # Pillow rounds


@pytest.mark.parametrize("shape", [(40, 30), (30, 47)])
def test_evaluation_crops_are_the_devices(golden, shape):
  pixels = golden("augment")["image"][: shape[0], : shape[1]]
  view = EvaluationView(resize=24, size=20)
  want = 255 * jax.jit(lambda x: augment.evaluation_view(x, view))(pixels[None])[0]
  assert np.max(np.abs(stream.centre_crop(pixels, view) - want)) <= 1.5  # bicubic in gray levels


# Reduced decoding.


@pytest.mark.parametrize("n, size", [(1, (90, 120)), (2, (179, 240)), (4, (361, 478)), (8, (720, 960))])
def test_crops_of_a_reduced_image_are_of_the_same_parts_of_it(n, size, monkeypatch):
  y, x = np.mgrid[: size[0], : size[1]] / n
  whole = np.stack([2 * y, x, 128 + 100 * np.sin(x / 9)], axis=-1).astype(np.uint8)
  padded = np.pad(whole, [(0, -s % n) for s in size] + [(0, 0)], mode="edge")
  reduced = padded.reshape(padded.shape[0] // n, n, padded.shape[1] // n, n, 3).mean((1, 3)).round().astype(np.uint8)
  drawn, cut = [], stream.crop_box
  monkeypatch.setattr(stream, "crop_box", lambda *args: drawn.append(cut(*args)) or drawn[-1])
  for i in range(20):
    for a, b in zip(
      stream.cut_views(whole, VIEWS, (i,)), stream.cut_views(reduced, VIEWS, (i,), whole.shape[:2]), strict=True
    ):
      assert np.max(np.abs(a.astype(int) - b)) <= 4 and np.mean(np.abs(a.astype(int) - b)) < 1
    assert drawn[-2 * len(VIEWS) : -len(VIEWS)] == drawn[-len(VIEWS) :]


def test_jpegs_are_reduced_only_if_asked_and_as_far_as_the_smallest_crop_allows(tmp_path, monkeypatch):
  for i in range(5):
    photograph(tmp_path / f"{i}.jpg", i, (240 + i, 160))
  images, read_image, seen = data.load_folder(tmp_path, "train").images, folder.read_reduced, []

  def noted(*args):
    pixels, size = read_image(*args)
    seen.append((pixels.shape[1], size[1]))
    return pixels, size

  monkeypatch.setattr(folder, "read_reduced", noted)
  plain = read(images, 0, 2, threads=0)
  assert not seen
  reduced = read(images, 0, 2, threads=0, reduced=True)
  # A view of 12 pixels of 8 % of the area needs 1,800; a quarter of the sides leaves 2,400.
  assert stream.least_pixels(VIEWS, True) == 12**2 / 0.08 and len(seen) == 8
  assert all(width == -(-whole // 4) for width, whole in seen)
  for a, b in zip(plain, reduced, strict=True):
    np.testing.assert_array_equal(a["index"], b["index"])
    for x, y in zip(a["image"], b["image"], strict=True):
      assert 0 < np.mean(np.abs(x.astype(int) - y)) < 2 and np.max(np.abs(x.astype(int) - y)) < 20
  assert_equal(read(images, 0, 2, threads=2, reduced=True), reduced)


@pytest.mark.slow
def test_workers_reduce_jpegs_too(tmp_path):
  for i in range(5):
    photograph(tmp_path / f"{i}.jpg", i, (240 + i, 160))
  images = data.load_folder(tmp_path, "train").images
  want = read(images, 0, 2, threads=0, reduced=True)
  assert_equal(read(images, 0, 2, threads=1, workers=1, reduced=True), want)


def test_another_decoding_is_another_run():
  config = small_config()
  saved = configs.to_json(config)
  del saved["data"]["reduced_decoding"]  # as of before it was there
  configs.check_same(config, saved)
  config.data.reduced_decoding = True
  with pytest.raises(UserError, match=r"data\.reduced_decoding: now True, then None"):
    configs.check_same(config, saved)


# What cannot be read.


def test_an_unreadable_image_is_replaced_by_the_next_that_can_be_read():  # C74
  good, some = read(Noise(13)), read(Noise(13, bad=(4, 5, 12)))
  replaced = {4: 6, 5: 6, 12: 0}
  for a, b in zip(good, some, strict=True):
    assert_equal(b["wanted"], a["wanted"])
    assert [replaced.get(i, i) for i in a["wanted"].tolist()] == b["index"].tolist()
    same = a["index"] == b["index"]
    assert_equal([x[same] for x in b["image"]], [x[same] for x in a["image"]])
  with pytest.raises(UserError, match="none of the 3 images can be read"):
    stream.read_or_next(Noise(3, bad=range(3)), 1)


def test_a_run_does_not_begin_where_more_than_a_tenth_cannot_be_read():
  stream.check_sample(Noise(1000, bad=range(0, 1000, 20)))
  with pytest.raises(UserError, match=r"[0-9]+ of 256 images .*0.png: broken.*ssl_jax.data.check"):
    stream.check_sample(Noise(1000, bad=range(0, 1000, 2)))
  stream.check_sample(Noise(5, bad=(3,)))
  with pytest.raises(UserError, match="2 of 5 images"):
    stream.check_sample(Noise(5, bad=(1, 3)))


@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_visits_every_image_once_and_marks_what_it_cannot_read(threads):
  images, view = Noise(10, bad=(2, 7)), EvaluationView(resize=9, size=8)
  got = list(stream.evaluation_batches(images, view, 4, threads))
  pixels, labels, keep = (np.concatenate(x) for x in zip(*got, strict=True))
  assert labels[keep].tolist() == [i % 3 for i in (0, 1, 3, 4, 5, 6, 8, 9)]
  assert pixels.shape == (12, 8, 8, 3)
  assert np.flatnonzero(keep).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
  for i in np.flatnonzero(keep):
    assert_equal(pixels[i], stream.centre_crop(images.read(i), view))


def test_the_processes_parts_of_an_evaluation_are_the_whole_in_order():
  pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
  images = stream.InMemory(pixels, np.arange(10, dtype=np.int32))
  whole = list(stream.evaluation_batches(images, EvaluationView(resize=8, size=8), 4, 0))
  parts = [
    list(stream.evaluation_batches(images, EvaluationView(resize=8, size=8), 4, 0, process_index=i, process_count=2))
    for i in range(2)
  ]
  assert len(whole) == len(parts[0]) == len(parts[1]) == 3
  for batch, *halves in zip(whole, *parts, strict=True):
    for x, *y in zip(batch, *halves, strict=True):
      np.testing.assert_array_equal(np.concatenate(y), x)
  assert np.concatenate([keep for _, _, keep in whole]).sum() == 10  # what fills the last one up does not count


# Folders.


def photograph(path, seed, size=None):
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng(seed)
  width, height = size or rng.integers(24, 60, 2).tolist()
  coarse = rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)
  PIL.Image.fromarray(coarse).resize((width, height)).save(path)


def names_of(root, *names):
  for name in names:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).touch()
  return folder.find_images(root)


def test_images_are_found_in_byte_order_without_what_is_hidden_or_none(tmp_path):  # C76, C80, C82
  wanted = ["B.JPG", "a b#%.png", "a/é.jpeg", "a/é.jfif", "b/c/d.webp", "ä.tiff", f"{'x' * 200}.bmp"]
  other = [".DS_Store", ".ipynb_checkpoints/a.png", "a/.hidden.jpg", "Thumbs.db", "notes.txt", "a/jpg"]
  (tmp_path / "empty").mkdir()
  assert names_of(tmp_path, *wanted, *other) == sorted(wanted, key=os.fsencode)


def test_links_are_followed_and_circles_left(tmp_path):
  names_of(tmp_path / "far", "a/1.png")
  names_of(tmp_path / "root", "0.png")
  (tmp_path / "root" / "link").symlink_to(tmp_path / "far")
  (tmp_path / "far" / "a" / "up").symlink_to(tmp_path / "root")
  assert folder.find_images(tmp_path / "root") == ["0.png", "link/a/1.png"]


def test_one_size_goes_into_memory_and_anything_else_is_streamed(tmp_path):
  for i in range(3):
    photograph(tmp_path / "same" / f"{i}.png", i, (20, 16))
  same = data.load_folder(tmp_path / "same", "train")
  assert not same.is_streamed and same.images.shape == (3, 16, 20, 3)
  assert data.load_folder(tmp_path / "same", "train", max_bytes=3 * 16 * 20 * 3 - 1).is_streamed
  (tmp_path / "same" / "9.png").write_bytes((tmp_path / "same" / "0.png").read_bytes()[:80])
  broken = data.load_folder(tmp_path / "same", "train")
  assert broken.is_streamed and len(broken.images) == 4 and broken.num_classes == 0
  assert_equal(broken.images.read(1), same.images[1])
  photograph(tmp_path / "mixed" / "b" / "0.png", 0, (20, 16))
  photograph(tmp_path / "mixed" / "a" / "1.png", 1, (20, 17))
  mixed = data.load_folder(tmp_path / "mixed", "train")
  assert mixed.is_streamed and mixed.labels.tolist() == [0, 1] and mixed.num_classes == 2
  assert mixed.images.take(np.array([1])).names == ["b/0.png"]
  assert mixed.images.take(np.array([1])).label(0) == 1


def test_images_of_other_channels_take_what_is_defined_for_them(tmp_path):
  rng = np.random.default_rng(0)
  for i in range(16):
    alpha = PIL.Image.fromarray(rng.integers(0, 256, (20, 20 + i % 2, 2), dtype=np.uint8), mode="LA")
    alpha.save(tmp_path / f"{i}.png")
  config = small_config(**{"data.folder": str(tmp_path), "data.split": "train", "data.channels": 2, "batch_size": 8})
  config.steps, config.stop_after_steps = 9, 2
  plan = train.make_plan(config)
  assert "2 channels: colour jitter and grayscale are left out" in "".join(report.describe(config, plan))
  assert plan.state.params["encoder"]["conv1"]["kernel"].shape[2] == 2
  batch = next(train.read_batches(config, plan, 0, tmp_path / "skipped.txt"))
  assert batch["image"][0].shape == (8, 2, 28, 28, 2)
  config.views = tuple({**view, "mean": (0.5,) * 3, "std": (0.2,) * 3} for view in config.views)
  with pytest.raises(UserError, match=r"views\[0\].mean must be one number for each of data.channels=2"):
    train.make_plan(config)
  color = jax.random.uniform(jax.random.key(0), (5, 9, 9))
  view = View(9, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0, jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=1.0, gray_p=1.0)
  np.testing.assert_allclose(augment.apply_view(jax.random.key(1), color, view), color, atol=1e-6)


def test_check_counts_names_and_measures(tmp_path, capsys):
  PIL.Image.fromarray(np.full((4, 6, 3), (0, 51, 255), np.uint8)).save(tmp_path / "a.png")
  PIL.Image.fromarray(np.full((4, 6, 3), (255, 51, 255), np.uint8)).save(tmp_path / "b.png")
  report = tmp_path / "report.txt"
  assert check.main([str(tmp_path), "--strict"]) == 0
  out = capsys.readouterr().out
  assert "2 images, 0 skipped\n" in out and "1 sizes, width x height: 6x4 (2)" in out
  assert "left out" not in out and "smallest" not in out
  assert "mean (0.5000, 0.2000, 1.0000), std (0.5000, 0.0000, 0.0000)" in out
  for name in ("empty.jpg", "none.gif"):
    (tmp_path / name).touch()
  assert check.main([str(tmp_path), f"--report={report}"]) == 0
  assert check.main([str(tmp_path), "--strict"]) == 1
  assert "4 images, 2 skipped:\n  2 empty file: empty.jpg, none.gif" in capsys.readouterr().out
  assert report.read_text() == "empty.jpg\tempty file\nnone.gif\tempty file\n"
  with pytest.raises(SystemExit):
    check.main([str(tmp_path / "nothing")])


def test_check_tells_the_range_of_sizes_what_is_left_out_and_where_all_names_are(tmp_path, capsys):
  for i, size in enumerate([(30, 20), (7, 9), (50, 40)]):
    photograph(tmp_path / f"{i}.png", i, size)
  for name in ("IMG_1.HEIC", "b/IMG_2.heic", "IMG_3", ".DS_Store", *(f"{i}.jpg" for i in range(3))):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  assert check.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "the smallest is 7x9, the largest 50x40\n" in out
  assert "left out by their names: .heic (2), no ending (1)\n" in out
  assert "--report" not in out  # All three names are there.
  (tmp_path / "3.jpg").touch()
  assert check.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "4 empty file: 0.jpg, 1.jpg, 2.jpg, ...\n  --report=FILE writes all names and reasons\n" in out


# A run.


@pytest.fixture
def photographs(tmp_path):
  """Twenty-four photographs of two classes, one of them broken, and eight to test, one broken."""
  root = tmp_path / "photographs"
  for i in range(24):
    photograph(root / "train" / "ab"[i % 2] / f"{i}.{('jpg', 'png', 'webp')[i % 3]}", i)
  for i in range(8):
    photograph(root / "val" / "ab"[i % 2] / f"{i}.png", 100 + i)
  (root / "train" / "a" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
  (root / "val" / "b" / "3.png").write_bytes(b"")
  return root


def folder_config(root, **overrides):
  given = {"data.folder": str(root), "data.split": "train", "data.test_split": "val", "data.channels": 3}
  return small_config(**given, **{"batch_size": 8, "steps": 9, "log_every_steps": 1, **overrides})


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
  rows = [row for row in metrics.read_rows(tmp_path / "whole" / "metrics.jsonl") if "knn_top1" in row]
  assert rows and all(row["knn_top1"] in 100 * np.arange(8) / 7 for row in rows)  # seven of eight can be read
  assert "knn.k=20 is more than" not in out
  with flagsaver.flagsaver(workdir=str(tmp_path / "whole"), k=["20", "30"], batch_size=8):
    assert eval_knn.main() == 0
  out = capsys.readouterr().out
  assert "1 of the bank cannot be read or has no label" in out and "1 of the queries cannot be read" in out
  assert "k=30 is more than the 23 images of the bank: all of them vote\nk=30 " in out and "k=20 is" not in out
  (photographs / "train" / "a" / "0.jpg").unlink()  # C94
  with pytest.raises(UserError, match=r"the images are not those .*24 files.* now 23 files"):
    train.main(folder_config(photographs, stop_after_steps=4), tmp_path / "stopped")


def test_more_neighbours_than_the_bank_has_are_told_in_a_line(photographs):
  config = folder_config(photographs, **{"knn.k": 25})
  plan = train.make_plan(config)
  assert "knn.k=25 is more than the 24 images of the bank: all of them vote" in report.describe(config, plan)
  config.data.test_split = "none"
  lines = report.describe(config, train.make_plan(config))
  assert "data.test_split='none' names no labelled images: the online k-NN is off" in lines


@pytest.mark.slow
@pytest.mark.parametrize("classes", [1, 16])
def test_a_single_class_and_classes_of_one_image_train_and_have_an_accuracy(classes, tmp_path):  # C92
  for i in range(16):
    for split in ("train", "val"):
      photograph(tmp_path / split / f"c{i % classes}" / f"{i}.png", i)  # the same images: each finds itself
  config = folder_config(tmp_path, **{"stop_after_steps": 2, "knn.k": 1})
  assert train.main(config, tmp_path / "run") == 0
  rows = [row for row in metrics.read_rows(tmp_path / "run" / "metrics.jsonl") if "knn_top1" in row]
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


def test_bank_and_queries_are_prepared_alike_and_share_class_numbers(tmp_path):  # C78
  for i, name in enumerate("abc"):
    for j in range(2):
      photograph(tmp_path / "train" / name / f"{j}.png", 10 * i + j, (20, 16 + (i == 2)))
      if name != "b":
        photograph(tmp_path / "test" / name / f"{j}.png", 10 * i + j + 5, (20, 16))
  (tmp_path / "test" / "b").mkdir()
  bank, queries = (data.load_folder(tmp_path, split) for split in ("train", "test"))
  assert bank.is_streamed and not queries.is_streamed
  bank, same = evaluate.match(bank, queries)
  assert bank.is_streamed and same.is_streamed
  assert same.labels.tolist() == [0, 0, 2, 2] == [same.images.label(i) for i in range(4)]
  np.testing.assert_array_equal(same.images.read(3), queries.images[3])
  assert same.images.take(np.array([2])).label(0) == 2
  with pytest.raises(UserError, match="'train' has classes that 'test' has not: b"):
    evaluate.match(queries, bank)


def test_a_crop_that_does_not_fit_and_negative_threads_are_told(photographs):
  with pytest.raises(UserError, match=r"crop of 28 pixels .* does not fit in eval_view.resize=16"):
    train.make_plan(folder_config(photographs, **{"eval_view.resize": 16}))
  with pytest.raises(UserError, match=r"data\.threads must not be negative, got -1"):
    train.make_plan(folder_config(photographs, **{"data.threads": -1}))
  with pytest.raises(ImageError, match="too long: 400000x1"):
    stream.centre_crop(np.zeros((1, 400_000, 3), np.uint8), EvaluationView(resize=256, size=224))


def test_names_of_any_bytes_can_be_written(tmp_path):
  photograph(tmp_path / "a.png", 0)
  os.rename(os.fsencode(tmp_path / "a.png"), os.fsencode(tmp_path) + b"/caf\xe9.png")
  files = folder.Files(str(tmp_path), folder.find_images(tmp_path), np.array([-1]), 3)
  assert files.read(0).shape[2] == 3
  (tmp_path / "out.txt").write_text(files.name(0), encoding="utf-8")
  assert files.name(0) == "caf\\xe9.png"


def test_a_folder_of_broken_images_is_told_before_the_run(photographs, tmp_path):
  for path in list((photographs / "train").rglob("*.*"))[:10]:
    pathlib.Path(path).write_bytes(b"broken")
  with pytest.raises(UserError, match="of 24 images that were tried cannot be read"):
    train.main(folder_config(photographs), tmp_path / "run")
  assert not (tmp_path / "run").exists()
