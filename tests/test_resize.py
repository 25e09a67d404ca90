"""Crops against Pillow's, bit for bit."""

import concurrent.futures
import math

import numba
import numpy as np
import PIL.Image
import pytest

from ssl_jax.data import resize
from ssl_jax.data.resize import resized_crop

INTERPOLATIONS = ("bilinear", "bicubic")


def pillows(pixels, box, size, interpolation):
  """Each channel on its own: the least crop that holds the box, then `resize` of the box within it."""
  top, left, height, width = box
  outer = math.floor(left), math.floor(top), math.ceil(left + width), math.ceil(top + height)
  inner = left - outer[0], top - outer[1], left + width - outer[0], top + height - outer[1]
  method = PIL.Image.Resampling[interpolation.upper()]
  planes = [PIL.Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0)]
  return np.stack([np.asarray(plane.crop(outer).resize(size[::-1], method, inner)) for plane in planes], axis=-1)


def noise(rng, *shape):
  """Of all levels, or of black and white alone, where bicubic sums overshoot most."""
  pixels = rng.integers(0, 256, shape, dtype=np.uint8)
  return pixels if rng.integers(2) else pixels // 128 * np.uint8(255)


def assert_pillows(pixels, box, size, interpolation):
  got = resized_crop(pixels, box, size, interpolation)
  assert got.dtype == np.uint8
  np.testing.assert_array_equal(got, pillows(pixels, box, size, interpolation), f"{pixels.shape} {box} {size}")


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_crops_of_any_place_and_size_are_pillows(channels, interpolation):
  rng = np.random.default_rng(channels)
  for _ in range(150):
    shape = rng.integers(1, (90, 160) if rng.integers(2) else (160, 90))
    height, width = rng.integers(1, shape + 1)
    top, left = rng.integers(0, shape - (height, width) + 1)
    size = tuple(rng.integers(1, 90, 2).tolist())
    assert_pillows(noise(rng, *shape, channels), (top, left, height, width), size, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_crops_that_begin_and_end_within_pixels_are_pillows(interpolation):
  rng = np.random.default_rng(0)
  for _ in range(150):
    shape, parts = rng.integers(2, 50, 2), rng.integers(2, 9)
    height, width = rng.integers(1, parts * shape + 1)
    top, left = rng.integers(0, parts * shape - (height, width) + 1)
    box = tuple(float(x) / parts for x in (top, left, height, width))
    assert_pillows(noise(rng, *shape, 3), box, tuple(rng.integers(1, 40, 2).tolist()), interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize(
  "shape, box, size",
  [
    ((375, 500), (20, 100, 340, 360), (224, 224)),
    ((375, 500), (11, 307, 190, 193), (96, 96)),
    ((375, 500), (0, 0, 375, 500), (256, 341)),  # an evaluation's
    ((40, 30), (0, 0, 40, 30), (40, 30)),  # Pillow copies
    ((40, 30), (3, 4, 20, 10), (20, 10)),
    ((40, 30), (0, 0, 40, 30), (40, 13)),  # and leaves a pass out where an axis stays as it is
    ((40, 30), (0, 0, 40, 30), (13, 30)),
    ((9, 9), (4, 5, 1, 1), (7, 8)),
    ((9, 9), (8, 8, 1, 1), (1, 1)),
    ((1, 1), (0, 0, 1, 1), (64, 64)),
    ((50, 40), (0, 0, 50, 40), (30, 30)),  # the height loses just twice as much as the width: columns first
    ((50, 40), (0, 0, 50, 40), (29, 30)),  # more: rows first
    ((50, 40), (0, 0, 50, 40), (51, 42)),
    ((3000, 2), (0, 0, 3000, 2), (5, 7)),
    ((2, 3000), (0, 0, 2, 3000), (5, 7)),
    ((129, 65), (0, 0, 129, 65), (300, 400)),
  ],
  ids=str,
)
def test_crops_of_these_sizes_are_pillows(shape, box, size, interpolation):
  assert_pillows(noise(np.random.default_rng(0), *shape, 3), box, size, interpolation)


@pytest.mark.parametrize(
  "turn",
  [
    lambda x: x[::-1],
    lambda x: x[:, ::-2],
    lambda x: x.swapaxes(0, 1),
    lambda x: x[..., ::-1],
    lambda x: x[5:, 7:, 1:2],
    lambda x: np.moveaxis(x, 0, 2)[:, :, :3],
    lambda x: np.broadcast_to(x[:1, :, :1], x.shape),
  ],
)
def test_pixels_may_lie_in_any_order_and_be_read_only(turn):
  whole = noise(np.random.default_rng(0), 40, 50, 6)
  whole.flags.writeable = False
  pixels = turn(whole)
  height, width = pixels.shape[:2]
  want = resized_crop(pixels.copy(), (1, 0, height - 1, width), (9, 11), "bicubic")
  np.testing.assert_array_equal(resized_crop(pixels, (1, 0, height - 1, width), (9, 11), "bicubic"), want)


def test_the_pixels_are_left_as_they_were():
  pixels = noise(np.random.default_rng(0), 20, 30, 3)
  before = pixels.copy()
  crop = resized_crop(pixels, (0, 0, 20, 30), (20, 30), "bicubic")
  np.testing.assert_array_equal(crop, before)
  crop[:] = 0  # a copy
  pixels[0, 0] += 1  # still writeable
  np.testing.assert_array_equal(pixels[1:], before[1:])


def test_threads_crop_what_one_thread_crops():
  pixels = noise(np.random.default_rng(0), 200, 300, 3)
  work = [(pixels, (i, 2 * i, 150 - i, 200), (64 + i, 96), INTERPOLATIONS[i % 2]) for i in range(40)]
  serial = [resized_crop(*args) for args in work]
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for got, want in zip(pool.map(lambda args: resized_crop(*args), 5 * work), 5 * serial, strict=True):
      np.testing.assert_array_equal(got, want)


def test_one_kernel_is_compiled_for_all_kinds_of_input():
  for pixels in (np.zeros((9, 9, 1), np.uint8), np.zeros((9, 9, 3), np.uint8)[::-1], np.zeros((9, 9, 4), np.uint8)):
    for box in ((0, 0, 9, 9), tuple(np.int32([1, 1, 5, 5])), (0.5, 0.5, 2.5, 2.5)):
      resized_crop(pixels, box, (np.int64(4), 5), "bilinear")
  assert len(resize._resized.signatures) == 1


def test_the_kernel_is_compiled_where_it_cannot_be_kept(monkeypatch):
  njit = numba.njit

  def read_only(*, cache=False, **kwargs):
    if cache:
      raise RuntimeError("cannot cache function: no locator available")
    return njit(**kwargs)

  monkeypatch.setattr(numba, "njit", read_only)
  assert resize._kept(lambda x: x + 1)(1) == 2


def test_a_full_disk_is_no_matter(monkeypatch):
  kernel, failed = resize._resized, []

  def full(*args):
    if not failed:
      failed.append(OSError("No space left on device"))
      raise failed[0]
    return kernel(*args)

  monkeypatch.setattr(resize, "_resized", full)
  assert_pillows(PIXELS, (0, 0, 9, 9), (5, 5), "bilinear")
  assert failed


@pytest.mark.parametrize("ending, size", [("nbi", 0), ("nbi", 100), ("nbc", 0), ("nbc", 1000)])
def test_a_damaged_kept_kernel_is_compiled_again_and_kept(tmp_path, monkeypatch, ending, size):
  def black(pixels, c, top, left, bottom, right, height, width, cubic):
    return np.zeros((height, width * c), np.uint8)

  monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
  arguments = PIXELS, (0, 0, 9, 9), (5, 5), "bilinear"
  kernels = [resize._kept(black) for _ in range(3)]
  for kernel in kernels:
    monkeypatch.setattr(resize, "_resized", kernel)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
      assert all(x.shape == (5, 5, 3) for x in pool.map(lambda _: resized_crop(*arguments), range(8)))
    if kernel is kernels[0]:
      for path in tmp_path.rglob(f"*.{ending}"):
        path.write_bytes(path.read_bytes()[:size])
  assert [bool(kernel.stats.cache_hits) for kernel in kernels] == [False, False, True]


PIXELS = np.zeros((20, 30, 3), np.uint8)


@pytest.mark.parametrize("pixels", [PIXELS[0], PIXELS[None], PIXELS.astype(np.uint16), PIXELS / 255], ids=str)
def test_pixels_of_another_kind_are_refused(pixels):
  with pytest.raises(TypeError, match=rf"pixels must be uint8 \[H, W, C\], got {pixels.dtype} \[{pixels.shape[0]},"):
    resized_crop(pixels, (0, 0, 9, 9), (9, 9), "bilinear")


@pytest.mark.parametrize(
  "box",
  [(-1, 0, 9, 9), (0, -0.5, 9, 9), (12, 0, 9, 9), (0, 22, 9, 9), (0, 0, 0, 9), (0, 0, 9, -1), (0, 0, math.nan, 9)],
  ids=str,
)
def test_a_box_that_is_empty_or_beyond_the_image_is_refused(box):
  with pytest.raises(ValueError, match=r"box must be \(top, left, height, width\) within 20 x 30 pixels, got \("):
    resized_crop(PIXELS, box, (9, 9), "bilinear")


@pytest.mark.parametrize("size", [(0, 9), (9, -1)])
def test_a_size_that_is_not_positive_is_refused(size):
  with pytest.raises(ValueError, match=r"size must be positive, got \("):
    resized_crop(PIXELS, (0, 0, 9, 9), size, "bilinear")


def test_another_interpolation_is_refused():
  with pytest.raises(ValueError, match='interpolation must be "bilinear" or "bicubic", got \'lanczos\''):
    resized_crop(PIXELS, (0, 0, 9, 9), (9, 9), "lanczos")
