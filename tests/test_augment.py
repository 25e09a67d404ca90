"""Augmentations against torchvision's and Pillow's own results, and what their randomness depends on."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from ssl_jax import augment
from ssl_jax.augment import EvaluationView, View, evaluation_view, example_keys, make_views

ORDERS = np.array(list(itertools.permutations(range(4))))
KEEP = dict(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.0)  # of a square image: the image itself
COLOUR = View(12, jitter=(0.4, 0.4, 0.2, 0.1), gray_p=0.2, blur_p=0.5, blur_kernel=5, solarize_p=0.2)


def planar(image):
  return np.moveaxis(np.asarray(image, np.float32), -1, 0)


def channels_last(image):
  return np.moveaxis(np.asarray(image), 0, -1)


@pytest.fixture(scope="module")
def g(golden):
  return dict(golden("augment"))


@pytest.fixture(scope="module")
def photo(g):
  """The golden photo, float [3, 56, 72] in [0, 1]."""
  return planar(g["image"]) / np.float32(255)


def draw_images(n, size=12, channels=3, seed=0):
  shape = (n, size, size, channels)
  return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@functools.partial(jax.jit, static_argnames=("views", "seed"))
def views_of(images, positions, step=0, *, views, seed=0):
  return make_views(example_keys(seed, step, positions), images, views)


def many(view, image, n, seed=0):
  """One view of each of n copies of a uint8 [H, W, C] image: [n, size, size, C]."""
  return np.asarray(views_of(np.broadcast_to(image, (n, *image.shape)), np.arange(n), views=(view,), seed=seed)[0][0])


# Single operations, against torchvision and Pillow.

color_jitter = jax.jit(augment.color_jitter)


def adjust_one(photo, g, name):
  """brightness, contrast or saturation alone: the other factors are 1 and the hue stays."""
  names = ("brightness", "contrast", "saturation")
  factors = [g[f"{name}_factor"] if name == other else np.float32(1) for other in names]
  return color_jitter(photo, factors, np.float32(0), np.arange(4))


PHOTOMETRIC = {
  "brightness": lambda photo, g: adjust_one(photo, g, "brightness"),
  "contrast": lambda photo, g: adjust_one(photo, g, "contrast"),
  "saturation": lambda photo, g: adjust_one(photo, g, "saturation"),
  "hue": lambda photo, g: jax.jit(augment.adjust_hue)(photo, g["hue_factor"]),
  "grayscale": lambda photo, g: jax.jit(augment.grayscale)(photo),
  "solarize": lambda photo, g: jax.jit(augment.solarize)(photo),
}


@pytest.mark.parametrize("name", PHOTOMETRIC)
def test_photometric_operations_are_torchvisions_on_floats(g, photo, name):
  got = channels_last(PHOTOMETRIC[name](photo, g))
  np.testing.assert_allclose(got, g[name], rtol=0, atol=1e-5)  # float32
  assert name == "solarize" or np.abs(got - g["image"] / 255).max() > 0.01


# Gray levels. Pillow works on uint8: it cuts what brightness, contrast and saturation leave after the point (1), having
# rounded the gray that they mix in (0.5 of it, of which saturation takes 0.43); rounds the gray itself (0.5, and 0.03
# for 0.2989 in place of 0.299); and keeps hue, saturation and value in 8 bits each.
@pytest.mark.parametrize(
  ("name", "bound"),
  [("brightness", 1), ("contrast", 1.3), ("saturation", 1.25), ("hue", 4.6), ("grayscale", 0.53), ("solarize", 1e-4)],
)
def test_photometric_operations_are_pillows_up_to_its_rounding(g, photo, name, bound):
  difference = np.abs(channels_last(PHOTOMETRIC[name](photo, g)) * 255 - g[f"{name}_pil"])
  assert difference.max() <= bound
  assert difference.mean() <= min(bound, 0.75)


@pytest.mark.parametrize("order", ["0123", "0321", "1230", "2103", "3012", "3210"])
def test_jitter_is_torchvisions_in_the_recorded_orders(g, photo, order):
  factors = [g[f"{name}_factor"] for name in ("brightness", "contrast", "saturation")]
  got = color_jitter(photo, factors, g["hue_factor"], np.array([int(digit) for digit in order]))
  np.testing.assert_allclose(channels_last(got), g[f"jitter_order_{order}"], rtol=0, atol=2e-5)  # four in a row


def turn_hue(image, shift):
  """[3, H, W] float64: to HSV and back by the textbook's six cases, pixel by pixel."""
  r, g, b = image
  high, low = image.max(axis=0), image.min(axis=0)
  span = np.where(high == low, 1, high - low)
  hue = np.where(high == r, (g - b) / span % 6, np.where(high == g, (b - r) / span + 2, (r - g) / span + 4))
  hue = np.where(high == low, 0, hue) + 6 * shift
  saturation = np.where(high == 0, 0, (high - low) / np.where(high == 0, 1, high))
  case, fraction = np.floor(hue).astype(int) % 6, hue % 1
  p, q, t = high * (1 - saturation), high * (1 - saturation * fraction), high * (1 - saturation * (1 - fraction))
  table = np.array([[high, t, p], [q, high, p], [p, high, t], [p, q, high], [t, p, high], [high, p, q]])
  return np.take_along_axis(table, case[None, None], axis=0)[0]


def jitter_one_after_the_other(image, factors, hue, order):
  """torchvision's ColorJitter, float64 NumPy, four separate operations."""
  image = np.float64(image)
  for kind in order:
    gray = 0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2]
    if kind == 3:
      image = turn_hue(image, hue)
      continue
    other = {0: 0.0, 1: gray.mean(), 2: gray}[kind]
    image = np.clip(factors[kind] * image + (1 - factors[kind]) * other, 0, 1)
  return image


@pytest.mark.parametrize(
  ("factors", "hue"),
  [((1.4, 0.7, 1.9), -0.31), ((0.5, 1.8, 0.0), 0.5), ((1.0, 1.0, 1.3), 0.02), ((0.0, 2.0, 2.0), 0.1)],
)
def test_jitter_is_the_four_operations_one_after_the_other_in_all_24_orders(photo, factors, hue):
  image = photo[:, ::3, ::3]
  jitter = jax.jit(jax.vmap(augment.color_jitter, in_axes=(None, None, None, 0)))
  got = jitter(image, [np.float32(f) for f in factors], np.float32(hue), ORDERS)
  want = [jitter_one_after_the_other(image, factors, hue, order) for order in ORDERS]
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)  # float32, four in a row


def test_a_turn_of_the_hue_by_whole_turns_or_of_grey_changes_nothing(photo):
  turn = jax.jit(augment.adjust_hue)
  for shift in (0.0, 1.0, -1.0):
    np.testing.assert_allclose(turn(photo, np.float32(shift)), photo, rtol=0, atol=1e-6)  # float32
  grey = np.repeat(photo[:1], 3, axis=0)
  np.testing.assert_array_equal(turn(grey, np.float32(0.3)), grey)
  primaries = np.eye(3, dtype=np.float32)[:, :, None]  # red, green, blue along a column
  np.testing.assert_allclose(turn(primaries, np.float32(1 / 3)), np.roll(primaries, 1, axis=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("threshold", [0.5, 128 / 255, 0.0, 1.0])
def test_solarize_inverts_from_the_threshold_on(photo, threshold):
  threshold = np.float32(threshold)
  want = np.where(photo >= threshold, 1 - photo, photo)
  np.testing.assert_array_equal(jax.jit(augment.solarize)(photo, threshold), want)


gaussian_blur = jax.jit(augment.gaussian_blur, static_argnums=2)
pil_blur = jax.jit(augment.pil_blur, static_argnums=2)


@pytest.mark.parametrize(("kernel", "sigma"), [(9, 1.3), (23, 0.5), (23, 2.0)])
def test_gaussian_blur_is_torchvisions(g, photo, kernel, sigma):
  got = channels_last(gaussian_blur(photo, np.float32(sigma), kernel))
  np.testing.assert_allclose(got, g[f"blur_k{kernel}_s{sigma}"], rtol=0, atol=1e-5)  # float32


@pytest.mark.parametrize("radius", [0.5, 1.3, 2.0])
def test_pil_blur_is_pillows_up_to_its_rounding(g, photo, radius):
  difference = np.abs(channels_last(pil_blur(photo, np.float32(radius), 2.0)) * 255 - g[f"blur_pil_r{radius}"])
  # Gray levels: Pillow rounds after each of six passes, half a level each, of which the next passes average most away.
  assert difference.max() < 2.5
  assert difference.mean() < 0.7


def box_passes(image, radius, *, rounded):
  """BoxBlur.c in NumPy, [H, W, C] in gray levels: three extended boxes along each axis, in Pillow's integers or not."""
  variance = radius**2 / 3
  whole = int((np.sqrt(12 * variance + 1) - 1) // 2)
  part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
  inner = 1 / (2 * (whole + part) + 1)
  outer = (1 - (2 * whole + 1) * inner) / 2
  if rounded:  # weights of 24 bits, each pass rounded to uint8
    inner = int(2**24 * inner)
    outer = (2**24 - (2 * whole + 1) * inner) // 2
  image = image.astype(int if rounded else float)
  for axis in (1, 1, 1, 0, 0, 0):
    n = image.shape[axis]
    image = sum(
      (outer if abs(offset) == whole + 1 else inner) * np.take(image, np.clip(np.arange(n) + offset, 0, n - 1), axis)
      for offset in range(-whole - 1, whole + 2)
    )
    image = (image + 2**23) >> 24 if rounded else image
  return image


@pytest.mark.parametrize("radius", [0.5, 1.3, 2.0])
def test_pil_blur_is_pillows_algorithm_without_its_rounding(g, photo, radius):
  np.testing.assert_array_equal(box_passes(g["image"], radius, rounded=True), g[f"blur_pil_r{radius}"])
  got = channels_last(pil_blur(photo, np.float32(radius), 2.0)) * 255
  np.testing.assert_allclose(got, box_passes(g["image"], radius, rounded=False), rtol=0, atol=1e-3)  # float32


@pytest.mark.parametrize("sigma", [0.1, 0.7, 1.9])
def test_pil_blur_has_the_variance_it_is_asked_for_and_keeps_the_mean(sigma):
  impulse = np.zeros((1, 41, 41), np.float32)
  impulse[0, 20, 20] = 1
  got = np.float64(pil_blur(impulse, np.float32(sigma), 2.0))[0]
  distance = np.arange(41) - 20
  np.testing.assert_allclose(got.sum(), 1, rtol=1e-5)
  np.testing.assert_allclose([(got.sum(axis) * distance**2).sum() for axis in (0, 1)], sigma**2, rtol=1e-4)  # float32


# Crops and flips.

resized_crop = jax.jit(augment.resized_crop, static_argnums=(2, 3))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("i", range(4))
def test_resized_crops_are_torchvisions_and_pillows(g, photo, i, interpolation):
  box = g["boxes_top_left_height_width"][i].astype(np.int32)
  got = channels_last(resized_crop(photo, box, 32, interpolation))
  np.testing.assert_allclose(got, g[f"crop{i}_{interpolation}_32"], rtol=0, atol=1e-5)  # float32
  levels = np.abs(np.clip(got, 0, 1) * 255 - g[f"crop{i}_{interpolation}_32_pil"])
  # Pillow rounds each of its two passes to half a level; bicubic weights enlarge the first one's.
  assert levels.max() <= (1.0 if interpolation == "bilinear" else 1.5)


def test_a_crop_reads_nothing_outside_its_box(photo):
  box = np.array([16, 28, 28, 14], np.int32)
  outside = np.ones(photo.shape[1:], bool)
  outside[16:44, 28:42] = False
  spoiled = np.where(outside, np.float32(1e6), photo)
  for interpolation in ("bilinear", "bicubic"):
    got = resized_crop(spoiled, box, 32, interpolation)
    np.testing.assert_array_equal(got, resized_crop(photo, box, 32, interpolation))


def test_a_flip_is_exactly_the_mirrored_crop(photo):
  box = np.array([5, 11, 39, 42], np.int32)
  for interpolation in ("bilinear", "bicubic"):
    flipped = resized_crop(photo, box, 32, interpolation, flip=True)
    np.testing.assert_array_equal(flipped, resized_crop(photo, box, 32, interpolation)[:, :, ::-1])


def test_an_unknown_interpolation_is_named(photo):
  with pytest.raises(ValueError, match=r"interpolation .*'nearest'"):
    augment.resized_crop(photo, jnp.array([0, 0, 8, 8]), 8, "nearest")


@functools.cache
def drawn_boxes(image_size, scale):
  uniforms = np.random.default_rng(0).uniform(size=(20_000, 22)).astype(np.float32)
  boxes = jax.jit(jax.vmap(lambda u: augment.crop_box(u, image_size, scale, (3 / 4, 4 / 3))))(uniforms)
  return np.asarray(boxes, np.float64)


def kolmogorov_smirnov(a, b):
  """The largest difference of two empirical distribution functions."""
  everywhere = np.concatenate([a, b])
  shares = [np.searchsorted(np.sort(x), everywhere, side="right") / len(x) for x in (a, b)]
  return np.abs(shares[0] - shares[1]).max()


@pytest.mark.parametrize(
  ("image_size", "scale", "key"),
  [((375, 500), 0.08, "375x500_scale0.08"), ((28, 28), 0.2, "28x28_scale0.2"), ((90, 400), 0.4, "90x400_scale0.4")],
)
def test_boxes_are_distributed_as_torchvisions(g, image_size, scale, key):
  got, want = drawn_boxes(image_size, (scale, 1.0)), np.float64(g[f"random_resized_crop_{key}"])
  for name, statistic in {
    "area": lambda b: b[:, 2] * b[:, 3],
    "log ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
    "top": lambda b: b[:, 0],
    "left": lambda b: b[:, 1],
  }.items():
    # The critical value at the level 1e-3 of two samples of 20,000: 1.95 sqrt(2 / 20000).
    assert kolmogorov_smirnov(statistic(got), statistic(want)) < 0.0195, name


@pytest.mark.parametrize("image_size", [(375, 500), (28, 28), (5, 3), (1, 1)])
def test_boxes_lie_inside_the_image_and_reach_its_edges(image_size):
  top, left, height, width = drawn_boxes(image_size, (0.2, 1.0)).T
  assert min(top.min(), left.min()) >= 0
  assert min(height.min(), width.min()) >= 1
  assert (top + height).max() == image_size[0]
  assert (left + width).max() == image_size[1]


@pytest.mark.parametrize(
  ("image_size", "want"),
  [((90, 400), (0, 140, 90, 120)), ((400, 90), (140, 0, 120, 90))],  # the first is the one box that torchvision drew
)
def test_images_that_no_try_fits_get_the_largest_centred_box(g, image_size, want):
  assert {tuple(box) for box in g["random_resized_crop_90x400_scale0.4"].tolist()} == {(0, 140, 90, 120)}
  assert {tuple(box) for box in drawn_boxes(image_size, (0.4, 1.0)).astype(int).tolist()} == {want}


# Whole views: what is applied, how often, and what their randomness depends on.


def test_a_flip_comes_as_often_as_asked_and_is_the_mirror_image():
  image = draw_images(1, 8)[0]
  plain = many(View(8, **KEEP), image, 1)[0]
  np.testing.assert_allclose(plain, image / 255, rtol=0, atol=1e-7)  # float32
  for p, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.5, 0.45, 0.55)):  # 0.05 is 4.5 standard deviations of 2000
    got = many(View(8, **{**KEEP, "flip": p}), image, 2000)
    mirrored = [np.array_equal(x, plain[:, ::-1]) for x in got]
    assert all(m or np.array_equal(x, plain) for m, x in zip(mirrored, got, strict=True))
    assert low <= np.mean(mirrored) <= high


@pytest.mark.parametrize(
  ("settings", "probability"),
  [
    (dict(jitter=(0.8, 0.8, 0.8, 0.2)), "jitter_p"),
    (dict(), "gray_p"),
    (dict(blur_kernel=3, blur_sigma=(0.5, 2.0)), "blur_p"),
    (dict(blur_kind="pil", blur_sigma=(0.5, 2.0)), "blur_p"),
    (dict(), "solarize_p"),
  ],
  ids=["jitter", "gray", "gaussian blur", "pil blur", "solarize"],
)
def test_an_operation_is_applied_as_often_as_asked(settings, probability):
  image = draw_images(1, 4)[0]
  for p, low, high in ((0.0, 0, 0), (1.0, 1, 1), (0.5, 0.45, 0.55)):  # 0.05 is 4.5 standard deviations of 2000
    got = many(View(4, **KEEP, **settings, **{probability: p}), image, 2000)
    assert low <= np.mean(np.any(np.abs(got - image / 255) > 1e-4, axis=(1, 2, 3))) <= high


def test_decisions_are_independent_of_each_other(monkeypatch):
  def crop(image, box, size, interpolation, flip):
    del box, interpolation
    return jnp.full((3, size, size), jnp.where(flip, 0.5, 0.0))

  monkeypatch.setattr(augment, "resized_crop", crop)
  for bit, name in enumerate(("color_jitter", "grayscale", "gaussian_blur", "solarize")):
    monkeypatch.setattr(augment, name, lambda image, *_, bit=bit: image + 2.0**bit)
  chances = dict(flip=0.5, jitter=(0, 0, 0, 0.1), jitter_p=0.5, gray_p=0.5, blur_p=0.5, solarize_p=0.5)
  got = many(View(3, **chances), np.zeros((4, 4, 3), np.uint8), 2000)[:, 0, 0, 0]
  decisions = (2 * got).astype(int)[:, None] >> np.arange(5) & 1  # flip, jitter, gray, blur, solarize
  assert np.abs(decisions.mean(axis=0) - 0.5).max() < 0.05  # 4.5 standard deviations of 2000
  assert np.abs(np.corrcoef(decisions.T) - np.eye(5)).max() < 0.1  # also 4.5


@pytest.mark.parametrize(("strength", "low"), [(0.5, 0.5), (1.5, 0.0)])
def test_brightness_factors_are_even_between_one_less_and_one_more_than_the_strength(strength, low):
  image = np.full((4, 4, 1), 51, np.uint8)  # 0.2: the largest factor does not clip
  factors = many(View(4, **KEEP, jitter=(strength, 0, 0, 0), jitter_p=1.0), image, 2000)[:, 0, 0, 0] / 0.2
  want = low + (1 + strength - low) * (np.arange(2000) + 0.5) / 2000
  # The Kolmogorov-Smirnov distance to the even distribution, critical value at the level 1e-3: 1.95 / sqrt(2000).
  assert kolmogorov_smirnov(factors, want) < 0.0436
  assert low <= factors.min() < factors.max() <= 1 + strength + 1e-5


def test_jitter_draws_even_factors_and_hues_and_equally_likely_orders_apart_from_each_other(monkeypatch):
  def show(image, factors, hue_shift, order):
    numbers = jnp.concatenate([jnp.stack([*factors, hue_shift]), order])
    return jnp.broadcast_to(jnp.pad(numbers, (0, 8)).reshape(4, 4), image.shape)

  monkeypatch.setattr(augment, "color_jitter", show)
  view = View(4, **KEEP, jitter=(0.3, 0.5, 0.7, 0.37), jitter_p=1.0)
  got = many(view, np.zeros((4, 4, 3), np.uint8), 2400)[..., 0].reshape(2400, 16)[:, :8]
  even = np.linspace(-1, 1, 2400)
  for numbers, want in zip(got.T, (1 + 0.3 * even, 1 + 0.5 * even, 1 + 0.7 * even, 0.37 * even), strict=False):
    assert kolmogorov_smirnov(numbers, want) < 1.95 / 2400**0.5  # the critical value at the level 1e-3
  orders, counts = np.unique(got[:, 4:], axis=0, return_counts=True)
  np.testing.assert_array_equal(orders, ORDERS)
  assert np.sum((counts - 100) ** 2) / 100 < 49.7  # chi-squared with 23 degrees of freedom at the level 1e-3
  assert np.abs(np.corrcoef(got.T)[:4] - np.eye(4, 8)).max() < 0.1  # 4.9 standard deviations of 2400


def test_blur_widths_are_even_between_their_bounds_whatever_decides_that_there_is_a_blur(monkeypatch):
  monkeypatch.setattr(augment, "gaussian_blur", lambda image, sigma, kernel: jnp.full_like(image, sigma))
  got = many(View(4, **KEEP, blur_p=0.5, blur_sigma=(0.3, 1.1)), np.zeros((4, 4, 3), np.uint8), 4000)[:, 0, 0, 0]
  widths = got[got > 0]
  assert kolmogorov_smirnov(widths, np.linspace(0.3, 1.1, 2000)) < 1.95 / len(widths) ** 0.5  # the level 1e-3


def test_the_order_of_operations_is_the_documented_one(monkeypatch):
  called = []
  for name in ("resized_crop", "color_jitter", "grayscale", "gaussian_blur", "solarize", "normalize"):
    original = getattr(augment, name)
    monkeypatch.setattr(augment, name, lambda *a, f=original, name=name, **k: called.append(name) or f(*a, **k))
  many(COLOUR._replace(size=11), draw_images(1)[0], 2)
  assert called == ["resized_crop", "color_jitter", "grayscale", "gaussian_blur", "solarize", "normalize"]


def test_views_of_one_image_all_differ_between_steps_seeds_positions_and_views():
  image = draw_images(1)[0]
  images, positions = np.broadcast_to(image, (4, *image.shape)), np.arange(4)
  drawn = []
  for seed, step in ((0, 0), (0, 1), (1, 0), (1, 1)):
    drawn.append(views_of(images, positions, step, views=(COLOUR, COLOUR), seed=seed)[0])
  drawn = np.reshape(drawn, (4 * 2 * 4, -1))
  assert len(np.unique(drawn, axis=0)) == len(drawn)


# The random numbers are equal bit for bit. A matrix product of another batch size may sum in another order, which is
# worth 8e-7 of a pixel, as measured; any other draw would be worth 1e-2 and more.
PIXEL = 2e-6
MIXED = (COLOUR, COLOUR._replace(size=8, blur_kind="pil", interpolation="bicubic"), COLOUR)


def test_views_are_equal_for_equal_seed_step_position_and_view_whatever_else_is_in_the_batch():
  images, positions = draw_images(8), np.arange(8)
  whole = views_of(images, positions, 3, views=MIXED)
  for rows in ([5], [7, 0, 3, 1], [1, 7, 6, 3]):
    part = views_of(images[rows], positions[rows], 3, views=MIXED)
    for a, b in zip(part, whole, strict=True):
      np.testing.assert_allclose(a, b[:, np.array(rows)], rtol=0, atol=PIXEL)


@pytest.mark.parametrize("devices", [pytest.param(2, marks=pytest.mark.slow), 4])
def test_views_are_equal_however_the_batch_is_split_over_devices(mesh, devices, optimised):
  images = draw_images(8)

  def one_device(images, step):
    positions = lax.axis_index("batch") * len(images) + jnp.arange(len(images))
    keys = example_keys(0, step, positions)
    return jax.random.key_data(keys), make_views(keys, images, MIXED)

  def draw(devices):
    specs = dict(mesh=mesh(devices), in_specs=(P("batch"), P()), out_specs=(P("batch"), P(None, "batch")))
    return jax.jit(jax.shard_map(one_device, check_vma=False, **specs))(images, 5)

  (keys, split), (_, whole) = draw(devices), draw(1)
  np.testing.assert_array_equal(keys, jax.random.key_data(example_keys(0, 5, np.arange(8))))
  for a, b in zip(split, whole, strict=True):
    np.testing.assert_array_equal(a, b)  # as the loop runs it, with XLA's optimisations: bit for bit


def test_resolutions_are_grouped_in_order_and_a_view_keeps_its_index():
  images = draw_images(3)
  large, small = View(12, solarize_p=1.0), View(8)
  views = (large, small, View(12), large, View(8, gray_p=1.0))
  large, little = views_of(images, np.arange(3), views=views)
  assert large.shape == (3, 3, 12, 12, 3)
  assert little.shape == (2, 3, 8, 8, 3)
  assert large.dtype == little.dtype == jnp.float32
  keys = example_keys(0, 0, jnp.arange(3))
  alone = jax.jit(augment.apply_view, static_argnames="view")
  for group, indices in ((large, (0, 2, 3)), (little, (1, 4))):
    for drawn, i in zip(group, indices, strict=True):
      want = alone(jax.random.fold_in(keys[1], i), planar(images[1]) / np.float32(255), view=views[i])
      np.testing.assert_allclose(drawn[1], channels_last(want), rtol=0, atol=PIXEL)


def test_grey_images_stay_one_channel_and_take_the_jitter_of_grey():
  image = draw_images(1, channels=1)[0]
  view = View(16, **KEEP, jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=1.0, gray_p=1.0)
  got = many(view, image, 8)
  assert got.shape == (8, 16, 16, 1)
  factors, hue = [np.float32(f) for f in (1.3, 0.6, 0.2)], np.float32(0.3)
  jittered = color_jitter(planar(image) / 255, factors, hue, np.arange(4))
  bright = np.clip(1.3 * planar(image) / 255, 0, 1)
  want = np.clip(0.6 * bright + 0.4 * bright.mean(), 0, 1)  # saturation and hue have nothing to act on
  np.testing.assert_allclose(jittered, want, rtol=0, atol=1e-6)  # float32


@pytest.mark.parametrize("channels", [1, 3])
def test_normalisation_is_by_channel_and_last(channels):
  mean, std = (0.5, 0.4, 0.3)[:channels], (0.2, 0.25, 0.3)[:channels]
  images = draw_images(4, channels=channels)
  plain, normal = (
    np.asarray(views_of(images, np.arange(4), views=(view,))[0])
    for view in (COLOUR, COLOUR._replace(mean=mean, std=std))
  )
  assert 0 <= plain.min() < plain.max() <= 1
  np.testing.assert_allclose(normal, (plain - np.array(mean)) / np.array(std), rtol=0, atol=1e-5)  # float32


def test_bicubic_views_stay_in_the_range_of_pixels():
  checks = np.kron(np.indices((8, 8)).sum(axis=0) % 2, np.ones((2, 2)))[..., None] * np.full(3, 255)
  got = many(View(24, interpolation="bicubic"), checks.astype(np.uint8), 16)
  assert got.min() == 0
  assert got.max() == 1


@pytest.mark.parametrize("shape", [(1, 1), (3, 2), (2, 40)])
def test_tiny_images_are_enlarged_without_nan(shape):
  images = np.random.default_rng(0).integers(0, 256, (4, *shape, 3), dtype=np.uint8)
  blur = dict(blur_p=1.0, blur_kernel=5)
  got = views_of(images, np.arange(4), views=(View(16, **blur), View(16, interpolation="bicubic", **blur)))[0]
  assert got.shape == (2, 4, 16, 16, 3)
  assert np.isfinite(got).all()


# The evaluation view.


def test_evaluation_without_mean_and_deviation_is_the_image():
  images = draw_images(2)
  got = jax.jit(evaluation_view, static_argnums=1)(images, EvaluationView(resize=28, size=28))
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, images / 255, rtol=0, atol=1e-7)  # float32


def test_evaluation_normalises_by_channel(g):
  images = g["image"][None]
  view = EvaluationView(resize=28, size=28, mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))
  want = (images / 255 - np.array((0.5, 0.4, 0.3))) / np.array((0.2, 0.25, 0.3))
  np.testing.assert_allclose(evaluation_view(jnp.asarray(images), view), want, rtol=0, atol=1e-5)  # float32
