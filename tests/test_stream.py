"""Images that are read one by one: order, crops, reduced decoding, and what cannot be read."""

import gc

import jax
import numpy as np
import PIL.Image
import pytest
from photographs import photograph
from test_augment import kolmogorov_smirnov
from test_train import small_config

from ssl_jax import augment, data
from ssl_jax import config as configs
from ssl_jax.augment import EvaluationView, View
from ssl_jax.data import Reading, stream
from ssl_jax.data import crop as cropping
from ssl_jax.data.crop import centre_crop, cut_views, least_pixels
from ssl_jax.data.image import ImageError
from ssl_jax.data.memory import InMemory
from ssl_jax.data.stream import Streamed
from ssl_jax.errors import UserError

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


class Given(Noise):
  """Images of an array."""

  def __init__(self, pixels):
    super().__init__(len(pixels))
    self.pixels = pixels

  def read(self, i):
    return self.pixels[i]


def streamed(images, threads=2, workers=0, reduced=False):
  about = dict(labels=None, num_classes=3, name="noise", split="train")
  return Streamed(images=images, reading=Reading(threads, workers, reduced), **about)


def read(images, start=0, stop=9, threads=2, workers=0, reduced=False, **kwargs):
  run = dict(batch_size=4, seed=3, start=start, stop=stop)
  return list(streamed(images, threads, workers, reduced).batches(VIEWS, **{**run, **kwargs}))


def assert_equal(got, want):
  jax.tree.map(np.testing.assert_array_equal, got, want)


# Order.


@pytest.mark.parametrize("threads", [0, 3])
def test_batches_depend_on_seed_and_step_alone_however_they_are_read_and_wherever_one_begins(threads):
  want = read(Noise(13))
  assert_equal(read(Noise(13), 0, 4, threads) + read(Noise(13), 4, 9, threads), want)
  order = np.concatenate([batch["index"] for batch in want])
  for epoch in range(3):  # three batches of four an epoch, of thirteen
    assert len(set(order[12 * epoch : 12 * (epoch + 1)].tolist())) == 12


def test_workers_read_the_same_and_nothing_holds_their_shared_memory_after_the_last_batch():
  want = read(Noise(13))  # and nobody has parsed absl's flags, which Grain sends to its workers
  gc.collect()
  gc.disable()  # Python would warn of what is held in a cycle when it ends.
  try:
    batches = streamed(Noise(13), threads=1, workers=2).batches(VIEWS, batch_size=4, seed=3, start=0, stop=9)
    for step in range(9):
      batch = next(batches)
      jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.array(a), b), batch, want[step])
    assert type(batch["index"]).__name__ == "SharedMemoryArray"
    batches.close()
    del batch
    assert not [x for x in gc.get_objects() if type(x).__name__ == "SharedMemoryArray"]
  finally:
    gc.enable()


def test_processes_share_a_batch_in_order():
  want = read(Noise(13))
  parts = [read(Noise(13), part=data.Part(i, 2)) for i in range(2)]
  for whole, *halves in zip(want, *parts, strict=True):
    assert_equal(jax.tree.map(lambda *x: np.concatenate(x), *halves), whole)


def test_crops_differ_between_views_steps_places_and_seeds(monkeypatch):
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
  monkeypatch.setattr(cropping, "crop_box", lambda *_: tuple(map(int, g["boxes_top_left_height_width"][i])))
  (crop,) = cut_views(g["image"], (View(32, interpolation=interpolation),), (0,))
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
  got = np.float64([cropping.crop_box(rng, image_size, (scale, 1.0), (3 / 4, 4 / 3)) for _ in range(5000)])
  for statistic in (
    lambda b: b[:, 2] * b[:, 3],
    lambda b: np.log(b[:, 3] / b[:, 2]),
    lambda b: b[:, 0],
    lambda b: b[:, 1],
  ):
    # The critical value at the level 1e-3 for 5,000 against 20,000: 1.95 sqrt(1/5000 + 1/20000).
    assert kolmogorov_smirnov(statistic(got), statistic(want)) < 0.0308


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (2, 300)])
def test_tiny_and_narrow_images_are_enlarged(size):
  pixels = np.full((*size, 3), 77, np.uint8)
  for crop in cut_views(pixels, VIEWS, (0,)):
    assert np.all(crop == 77)


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_any_number_of_channels_is_cropped_plane_by_plane(channels):
  pixels = np.random.default_rng(0).integers(0, 256, (20, 30, channels), dtype=np.uint8)
  crops = cut_views(pixels, VIEWS, (5,))
  for c in range(channels):
    assert_equal(tuple(x[..., c : c + 1] for x in crops), cut_views(pixels[..., c : c + 1], VIEWS, (5,)))


def test_the_device_finishes_cut_crops_as_it_finishes_its_own():
  whole = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0))  # the crop is the image
  look = dict(jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.5, blur_p=0.5, solarize_p=0.5, flip=0.5)
  views = (View(16, **whole, **look), View(12, **whole, flip=1.0), View(16, **whole, **look), View(16, **whole))
  images = np.random.default_rng(0).integers(0, 256, (6, 16, 16, 3), dtype=np.uint8)
  images[:, 8:] //= 4
  cut = [cut_views(image, views, (0, i)) for i, image in enumerate(images)]
  crops = jax.tree.map(lambda *x: np.stack(x), *cut)
  assert [x.shape for x in crops] == [(6, 3, 16, 16, 3), (6, 1, 12, 12, 3)]
  keys = augment.example_keys(0, np.int32(5), np.arange(6))
  make = jax.jit(lambda images: augment.make_views(keys, images, views))
  got, want = make(crops), make(images)
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)  # a crop of 16 from 16 pixels is the pixels
  np.testing.assert_allclose(got[1], want[1], atol=1.01 / 255)  # Pillow rounds


@pytest.mark.parametrize(("resize", "size", "resized"), [(32, 28, (32, 41)), (80, 75, (80, 102)), (56, 56, (56, 72))])
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_evaluation_is_pillows_resize_and_torchvisions_centre_crop(
  golden, resize, size, resized, turned, interpolation
):
  image = golden("augment")["image"]
  image = image.swapaxes(0, 1) if turned else image
  height, width = resized[::-1] if turned else resized  # int(resize * long / short): cut down, not rounded
  method = getattr(PIL.Image.Resampling, interpolation.upper())
  want = np.asarray(PIL.Image.fromarray(image).resize((width, height), method))
  top, left = round((height - size) / 2), round((width - size) / 2)
  got = centre_crop(image, EvaluationView(resize, size, interpolation))
  assert np.abs(got.astype(int) - want[top : top + size, left : left + size]).max() <= 1


# Reduced decoding.


@pytest.mark.parametrize("n, size", [(1, (90, 120)), (2, (179, 240)), (4, (361, 478)), (8, (720, 960))])
def test_crops_of_a_reduced_image_are_of_the_same_parts_of_it(n, size, monkeypatch):
  y, x = np.mgrid[: size[0], : size[1]] / n
  whole = np.stack([2 * y, x, 128 + 100 * np.sin(x / 9)], axis=-1).astype(np.uint8)
  padded = np.pad(whole, [(0, -s % n) for s in size] + [(0, 0)], mode="edge")
  reduced = padded.reshape(padded.shape[0] // n, n, padded.shape[1] // n, n, 3).mean((1, 3)).round().astype(np.uint8)
  drawn, cut = [], cropping.crop_box
  monkeypatch.setattr(cropping, "crop_box", lambda *args: drawn.append(cut(*args)) or drawn[-1])
  for i in range(20):
    for a, b in zip(cut_views(whole, VIEWS, (i,)), cut_views(reduced, VIEWS, (i,), whole.shape[:2]), strict=True):
      assert np.max(np.abs(a.astype(int) - b)) <= 4 and np.mean(np.abs(a.astype(int) - b)) < 1
    assert drawn[-2 * len(VIEWS) : -len(VIEWS)] == drawn[-len(VIEWS) :]


def test_jpegs_are_reduced_only_if_asked_and_as_far_as_the_smallest_crop_allows(tmp_path, monkeypatch):
  for i in range(5):
    photograph(tmp_path / f"{i}.jpg", i, (240 + i, 160))
  images, read_image, seen = data.load_folder(tmp_path, "train").images, stream.read_reduced, []

  def noted(*args):
    pixels, size = read_image(*args)
    seen.append((pixels.shape[1], size[1]))
    return pixels, size

  monkeypatch.setattr(stream, "read_reduced", noted)
  plain = read(images, 0, 2, threads=0)
  assert not seen
  reduced = read(images, 0, 2, threads=0, reduced=True)
  # A view of 12 pixels of 8 % of the area needs 1,800; a quarter of the sides leaves 2,400.
  assert least_pixels(VIEWS, True) == 12**2 / 0.08 and len(seen) == 8
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


def test_an_unreadable_image_is_replaced_by_the_next_that_can_be_read():
  good, some = read(Noise(13)), read(Noise(13, bad=(4, 5, 12)))
  replaced = {4: 6, 5: 6, 12: 0}
  for a, b in zip(good, some, strict=True):
    assert_equal(b["wanted"], a["wanted"])
    assert [replaced.get(i, i) for i in a["wanted"].tolist()] == b["index"].tolist()
    same = a["index"] == b["index"]
    assert_equal([x[same] for x in b["image"]], [x[same] for x in a["image"]])
  with pytest.raises(UserError, match="none of the 3 images of noise can be read"):
    streamed(Noise(3, bad=range(3))).read_or_next(1)


def test_a_run_does_not_begin_where_more_than_a_tenth_cannot_be_read():
  streamed(Noise(1000, bad=range(0, 1000, 20))).tried()
  with pytest.raises(UserError, match=r"[0-9]+ of 256 images .*0.png: broken.*ssl_jax check"):
    streamed(Noise(1000, bad=range(0, 1000, 2))).tried()
  streamed(Noise(5, bad=(3,))).tried()
  with pytest.raises(UserError, match="2 of 5 images"):
    streamed(Noise(5, bad=(1, 3))).tried()


@pytest.mark.parametrize("threads", [0, 3])
def test_evaluation_visits_every_image_once_and_marks_what_it_cannot_read(threads):
  images, view = Noise(10, bad=(2, 7)), EvaluationView(resize=9, size=8)
  got = list(streamed(images, threads).in_order(view, 4))
  pixels, labels, keep = (np.concatenate(x) for x in zip(*got, strict=True))
  assert labels[keep].tolist() == [i % 3 for i in (0, 1, 3, 4, 5, 6, 8, 9)]
  assert pixels.shape == (12, 8, 8, 3)
  assert np.flatnonzero(keep).tolist() == [0, 1, 3, 4, 5, 6, 8, 9]
  for i in np.flatnonzero(keep):
    assert_equal(pixels[i], centre_crop(images.read(i), view))


@pytest.mark.parametrize("side", [8, 6])  # as they are, and cut from what is larger
@pytest.mark.parametrize("in_memory", [True, False])
def test_the_processes_parts_of_an_evaluation_are_the_whole_in_order(side, in_memory):
  pixels = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), dtype=np.uint8)
  labels, view = np.arange(10, dtype=np.int32), EvaluationView(resize=side, size=side)
  about = dict(num_classes=10, name="random", split="train", reading=Reading(0))
  if in_memory:
    dataset = InMemory(images=pixels, labels=labels, **about)
  else:
    dataset = Streamed(images=Given(pixels), labels=labels, **about)
  whole = list(dataset.in_order(view, 4))
  parts = [list(dataset.in_order(view, 4, part=data.Part(i, 2))) for i in range(2)]
  assert len(whole) == len(parts[0]) == len(parts[1]) == 3
  for batch, *halves in zip(whole, *parts, strict=True):
    for x, *y in zip(batch, *halves, strict=True):
      np.testing.assert_array_equal(np.concatenate(y), x)
  images, known, keep = (np.concatenate(x) for x in zip(*whole, strict=True))
  assert_equal(images[keep], np.stack([centre_crop(x, view) for x in pixels]))
  assert known[keep].tolist() == list(range(10))  # what fills the last one up does not count


@pytest.mark.parametrize("size", [(40, 30), (16, 16), (20, 20)])  # to be reduced, enlarged, and as it is to be cut
def test_images_in_memory_and_on_disk_are_evaluated_alike(tmp_path, size):
  for i in range(3):
    photograph(tmp_path / f"{i}.png", i, size)
  view = EvaluationView(resize=20, size=16)
  in_memory, on_disk = (data.load_folder(tmp_path, "train", max_bytes=most) for most in (1 << 20, 0))
  assert isinstance(in_memory, InMemory) and isinstance(on_disk, Streamed)
  (a,), (b,) = (list(dataset.in_order(view, 3)) for dataset in (in_memory, on_disk))
  assert_equal(a, b)
  assert_equal(in_memory.pixels(view, 16 * 16 * 3), a[0])
  assert in_memory.pixels(view, 16 * 16 * 3 - 1) is None and on_disk.pixels(view, 1 << 20) is None
