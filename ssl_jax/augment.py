"""Augmentations on the device: torchvision's operations on float images, as pure functions of (key, image, numbers).

Every operation takes one planar image, float [C, H, W] with values in [0, 1], and is vmapped over the batch by
`make_views`. Planes come first because colour operations mix whole planes: XLA's CPU code for them is several
times faster than with channels last. The public functions `make_views` and `evaluation_view` use [..., H, W, C].

A view is described by data, `View(...)`, so that a recipe's config reads like its paper's table; one function executes
it.
References: torchvision `transforms.v2.functional` (tensor path) and Pillow's `Resample.c`, `BoxBlur.c`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ssl_jax import random_streams
from ssl_jax.rand_augment import rand_augment

_HIGHEST = lax.Precision.HIGHEST  # Pixels exact to 1e-5: the default is bfloat16 on a TPU, TF32 on a GPU.
_TRIES = 10  # torchvision's, in RandomResizedCrop.get_params


class View(NamedTuple):
  """One augmented view: random-resized-crop, flip, RandAugment, colour jitter, grayscale, blur, solarize, normalise,
  erase, in this order.

  Attributes:
    size: side of the square output, in pixels.
    scale, ratio: ranges of the crop's share of the image's area and of its width / height.
    interpolation: "bilinear" or "bicubic", both antialiased as in Pillow.
    flip: probability of a horizontal flip.
    jitter: strengths of brightness, contrast, saturation and hue; applied with probability `jitter_p`, in random order,
      to images of 1 or 3 channels: for others contrast, saturation and hue are not defined.
    gray_p: probability of conversion to grayscale, for images of 3 channels.
    blur_p, blur_kind, blur_sigma, blur_kernel: probability; "gaussian" (torchvision's, with `blur_kernel` taps) or
      "pil" (Pillow's GaussianBlur, three box blurs); range of the standard deviation.
    solarize_p: probability of inverting every value >= `solarize_threshold`.
    mean, std: normalisation per channel; an empty tuple leaves [0, 1].
    rand_augment: mean strength of timm's RandAugment, in images of 1 or 3 channels (`rand_augment.py`); 0: none.
    erase_p: probability that a box is filled with normal noise, after normalisation (`erase`).
  """

  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  interpolation: str = "bilinear"
  flip: float = 0.5
  jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
  jitter_p: float = 0.8
  gray_p: float = 0.0
  blur_p: float = 0.0
  blur_kind: str = "gaussian"
  blur_sigma: tuple[float, float] = (0.1, 2.0)
  blur_kernel: int = 23
  solarize_p: float = 0.0
  solarize_threshold: float = 128 / 255
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()
  rand_augment: float = 0.0
  erase_p: float = 0.0


class EvaluationView(NamedTuple):
  """What the encoder sees in evaluation: short side to `resize`, centre crop of `size`, normalise.

  Data sets do the first two (`Dataset.in_order`), `evaluation_view` the last. Empty `mean` and `std` leave [0, 1].
  """

  resize: int
  size: int
  interpolation: str = "bicubic"
  mean: tuple[float, ...] = ()
  std: tuple[float, ...] = ()


def example_keys(seed: int, step: jax.Array, positions: jax.Array) -> jax.Array:
  """One random key per example, a function of only the seed, the step and the position in the global batch.

  Args:
    seed: the run's seed.
    step: int scalar.
    positions: int [b], the examples' indices in the global batch.

  Returns:
    Typed threefry keys [b], the same however many devices share the batch.
  """
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
  return jax.vmap(lambda position: jax.random.fold_in(key, position))(positions)


def batch_key(seed: int, step: jax.Array) -> jax.Array:
  """The key of what is drawn once for a whole batch, a function of only the seed and the step."""
  key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
  return jax.random.fold_in(key, random_streams.BATCH)


def make_views(
  keys: jax.Array, images: jax.Array | tuple[jax.Array, ...], views: Sequence[View]
) -> tuple[jax.Array, ...]:
  """Draws every view of every image.

  Args:
    keys: typed keys [b], one per example (`example_keys`).
    images: uint8 [b, H, W, C]; or, where the crops are cut already (`data.Dataset.batches`), a tuple of uint8
      [b, v, size, size, C], one per resolution in order of first appearance.
    views: descriptions. View i of an example depends on its key and i only.

  Returns:
    A tuple with one float32 [v, b, size, size, C] array per resolution, in order of first appearance.
  """
  by_size = by_resolution(views)
  is_cut = isinstance(images, tuple)
  planar = jax.tree.map(lambda x: jnp.moveaxis(x, -1, -3).astype(jnp.float32) / 255, images)
  drawn: dict[int, jax.Array] = {}
  for view in dict.fromkeys(views):  # Views of equal description are vmapped over (view, example).
    indices = [i for i, other in enumerate(views) if other == view]
    own = planar
    if is_cut:
      crops = planar[list(by_size).index(view.size)]  # [b, v, C, size, size]
      own = jnp.stack([crops[:, by_size[view.size].index(i)] for i in indices])

    def one(key, image, i, view=view):
      return apply_view(jax.random.fold_in(key, i), image, view, is_cut=is_cut)

    batch = jax.vmap(jax.vmap(one, in_axes=(0, 0, None)), in_axes=(None, 0 if is_cut else None, 0))
    drawn.update(zip(indices, jnp.moveaxis(batch(keys, own, jnp.array(indices)), 2, -1), strict=True))
  return tuple(jnp.stack([drawn[i] for i in indices]) for indices in by_size.values())


def by_resolution(views: Sequence[View]) -> dict[int, list[int]]:
  """The indices of the views of each size, in order of first appearance."""
  sizes: dict[int, list[int]] = {}
  for i, view in enumerate(views):
    sizes.setdefault(view.size, []).append(i)
  return sizes


def crop_shapes(views: Sequence[View], batch_size: int, channels: int) -> tuple[jax.ShapeDtypeStruct, ...]:
  """The shapes of a batch whose crops are cut already: uint8 [b, v, size, size, C], one per resolution."""
  counts = {size: len(indices) for size, indices in by_resolution(views).items()}
  return tuple(jax.ShapeDtypeStruct((batch_size, v, s, s, channels), np.uint8) for s, v in counts.items())


def apply_view(key: jax.Array, image: jax.Array, view: View, *, is_cut: bool = False) -> jax.Array:
  """One view of one planar image: float [C, H, W] in [0, 1] -> [C, size, size]; `is_cut`: it is cropped already."""
  # One draw of uniforms for all decisions: each threefry call takes longer to compile than all that depends on it.
  u = jax.random.uniform(key, (2 * _TRIES + 16,))
  box_draws, flip_draw, jitter_draws, gray_draw, sigma_draw, blur_draw, solarize_draw = (
    u[:22],
    u[22],
    u[23:32],
    u[32],
    u[33],
    u[34],
    u[35],
  )

  flip = flip_draw < view.flip
  if is_cut:
    image = jnp.where(flip, image[:, :, ::-1], image)
  else:
    _, height, width = image.shape
    box = crop_box(box_draws, (height, width), view.scale, view.ratio)
    image = resized_crop(image, box, view.size, view.interpolation, flip=flip)
    image = jnp.clip(image, 0, 1)  # Bicubic weights overshoot; Pillow's uint8 clips.
  if view.rand_augment and image.shape[0] in (1, 3):
    fill = jnp.round(255 * jnp.array(view.mean)) if view.mean else jnp.full(image.shape[0], 128.0)
    image = rand_augment(jax.random.fold_in(key, random_streams.RAND_AUGMENT), image, view.rand_augment, fill)
  if any(view.jitter) and image.shape[0] in (1, 3):
    strengths = view.jitter[:3]
    factors = [_between(d, max(0.0, 1 - s), 1 + s) for d, s in zip(jitter_draws[:3], strengths, strict=True)]
    hue_shift = _between(jitter_draws[3], -view.jitter[3], view.jitter[3])
    order = jnp.argsort(jitter_draws[4:8])  # all 24 orders are equally likely
    image = jnp.where(jitter_draws[8] < view.jitter_p, color_jitter(image, factors, hue_shift, order), image)
  if view.gray_p and image.shape[0] == 3:
    image = jnp.where(gray_draw < view.gray_p, grayscale(image), image)
  if view.blur_p:
    sigma = _between(sigma_draw, *view.blur_sigma)
    if view.blur_kind == "pil":
      blurred = pil_blur(image, sigma, max_sigma=view.blur_sigma[1])
    else:
      blurred = gaussian_blur(image, sigma, view.blur_kernel)
    image = jnp.where(blur_draw < view.blur_p, blurred, image)
  if view.solarize_p:
    image = jnp.where(solarize_draw < view.solarize_p, solarize(image, view.solarize_threshold), image)
  image = normalize(image, view.mean, view.std)
  if view.erase_p:
    image = erase(jax.random.fold_in(key, random_streams.ERASE), image, view.erase_p)
  return image


def erase(key: jax.Array, image: jax.Array, probability: float) -> jax.Array:
  """Random erasing (Zhong et al., 2017, arXiv:1708.04896) of float [C, H, W] with normal noise.

  With `probability`, one box is filled, each value with noise of its own. The box has 2 to 33 % of the area and a
  height / width of 0.3 to 3.3: the first of ten tries that is smaller than the image; if none is, nothing is erased
  (`RandomErasing` of timm, mode "pixel").
  """
  _, height, width = image.shape
  box_key, noise_key = jax.random.split(key)
  u = jax.random.uniform(box_key, (2 * _TRIES + 3,))
  area = height * width * _between(u[:_TRIES], 0.02, 1 / 3)
  ratio = jnp.exp(_between(u[_TRIES : 2 * _TRIES], float(np.log(0.3)), -float(np.log(0.3))))
  h, w = (jnp.round(jnp.sqrt(x)).astype(jnp.int32) for x in (area * ratio, area / ratio))
  fits = (h < height) & (w < width)
  first = jnp.argmax(fits)
  erased = fits[first] & (u[-1] < probability)
  inside = []
  for draw, side, n in ((u[-3], h[first], height), (u[-2], w[first], width)):
    start = jnp.minimum((draw * (n - side + 1)).astype(jnp.int32), n - side)  # 0 to n - side inclusive
    at = jnp.arange(n)
    inside.append((at >= start) & (at < start + side))
  noise = jax.random.normal(noise_key, image.shape, image.dtype)
  return jnp.where(erased & inside[0][:, None] & inside[1][None, :], noise, image)


def evaluation_view(images: jax.Array, view: EvaluationView) -> jax.Array:
  """The encoder's input from resized and cropped images: uint8 [b, h, w, C] -> float32 [b, h, w, C].

  The data set resizes and crops them on the host (`data.crop.centre_crop`).
  """
  planar = jnp.moveaxis(images.astype(jnp.float32) / 255, -1, 0)[:, None]
  return jnp.moveaxis(normalize(planar, view.mean, view.std)[:, 0], 0, -1)


def crop_box(uniforms: jax.Array, image_size: tuple[int, int], scale, ratio) -> jax.Array:
  """The box of torchvision's RandomResizedCrop: the first of ten tries that fits, else the largest centred one.

  Args:
    uniforms: float [22] in [0, 1): ten areas, ten ratios, top and left.
    image_size: (height, width).
    scale: range of the area as a share of the image's.
    ratio: range of width / height, drawn log-uniformly.

  Returns:
    int32 [4]: top, left, height, width.
  """
  height, width = image_size
  area = height * width * _between(uniforms[:_TRIES], *scale)
  log_ratio = _between(uniforms[_TRIES : 2 * _TRIES], float(np.log(ratio[0])), float(np.log(ratio[1])))
  w = jnp.round(jnp.sqrt(area * jnp.exp(log_ratio))).astype(jnp.int32)
  h = jnp.round(jnp.sqrt(area * jnp.exp(-log_ratio))).astype(jnp.int32)
  fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
  first = jnp.argmax(fits)
  drawn_h, drawn_w = h[first], w[first]
  top, left = (
    jnp.minimum((u * (n + 1)).astype(jnp.int32), n)  # 0 to n inclusive
    for u, n in zip(uniforms[2 * _TRIES :], (height - drawn_h, width - drawn_w), strict=True)
  )
  fallback_h = min(height, round(width / ratio[0]))
  fallback_w = min(width, round(height * ratio[1]))
  fallback = [(height - fallback_h) // 2, (width - fallback_w) // 2, fallback_h, fallback_w]
  return jnp.where(fits[first], jnp.stack([top, left, drawn_h, drawn_w]), jnp.array(fallback))


def resized_crop(image: jax.Array, box: jax.Array, size: int, interpolation: str, flip=False) -> jax.Array:
  """Cuts `box` (top, left, height, width) out of [C, H, W] and resizes it to [C, size, size], antialiased.

  Two small matrix products whose weights stop at the box's edge, as crop-then-resize does. `flip` mirrors the result
  by reversing the columns' weights. Bicubic weights overshoot [0, 1], as torchvision's on tensors do.
  """
  top, left, height, width = box
  rows = _resize_weights(top, height, image.shape[1], size, interpolation)
  columns = _resize_weights(left, width, image.shape[2], size, interpolation)
  columns = jnp.where(flip, columns[::-1], columns)
  out = jnp.einsum("chw,xw->chx", image, columns, precision=_HIGHEST)
  return jnp.einsum("yh,chx->cyx", rows, out, precision=_HIGHEST)


def _resize_weights(start, length, n, size, interpolation):
  """Weights [size, n] of the antialiased resize of pixels start..start+length to `size` (Pillow, Resample.c)."""
  if interpolation not in ("bilinear", "bicubic"):
    raise ValueError(f'interpolation must be "bilinear" or "bicubic", got {interpolation!r}.')
  scale = length / size
  # The filter is widened by the scale when shrinking (antialiasing), and not when enlarging.
  stretch = jnp.maximum(scale, 1.0)
  centre = start + (jnp.arange(size)[:, None] + 0.5) * scale
  pixel = jnp.arange(n)[None, :]
  x = jnp.abs(pixel + 0.5 - centre) / stretch
  if interpolation == "bilinear":
    w = jnp.maximum(0.0, 1.0 - x)
  else:  # Keys' cubic with a = -0.5
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    w = jnp.where(x < 1, near, jnp.where(x < 2, far, 0.0))
  w = jnp.where((pixel >= start) & (pixel < start + length), w, 0.0)
  return w / jnp.sum(w, axis=1, keepdims=True)


def color_jitter(image: jax.Array, factors: Sequence, hue_shift: jax.Array, order: jax.Array) -> jax.Array:
  """Brightness, contrast, saturation and hue in the given order, each clipped to [0, 1].

  Args:
    image: float [C, H, W]; with one channel saturation and hue have nothing to act on.
    factors: brightness, contrast and saturation factors, scalars >= 0.
    hue_shift: in turns of the colour circle, [-0.5, 0.5].
    order: int [4], a permutation of 0 (brightness), 1 (contrast), 2 (saturation), 3 (hue).

  Under `vmap` a `lax.switch` would run all four branches at all four positions. The first three are one formula,
  clip(A x + P gray(x) + Q mean(gray(x))), of which only the coefficients vary; hue is computed once, between them.
  """
  multipliers = jnp.stack([*factors, 1.0])  # hue has none
  hue_place = jnp.argmax(order == 3)

  def adjust(active):
    def at(place, x):
      kind = order[place]
      a = jnp.where(active(place), multipliers[kind], 1.0)
      gray = luma(x)
      mix = jnp.where(kind == 1, jnp.mean(gray), jnp.where(kind == 2, gray, 0.0))
      return jnp.where(a == 1, x, jnp.clip(a * x + (1 - a) * mix, 0, 1))

    return at

  # Loops, since XLA would otherwise fuse the steps and recompute each one's gray image for every plane of the next.
  image = lax.fori_loop(0, 3, adjust(lambda place: place < hue_place), image)
  image = adjust_hue(image, hue_shift)
  return lax.fori_loop(1, 4, adjust(lambda place: place > hue_place), image)


def luma(image: jax.Array) -> jax.Array:
  """The gray value, float [1, H, W], by torchvision's weights; a one-channel image as it is."""
  if image.shape[0] == 1:
    return image
  return (0.2989 * image[0] + 0.587 * image[1] + 0.114 * image[2])[None]


def grayscale(image: jax.Array) -> jax.Array:
  """Converts to grayscale, with the same number of channels."""
  return jnp.broadcast_to(luma(image), image.shape)


def adjust_hue(image: jax.Array, shift: jax.Array) -> jax.Array:
  """Turns the hue of a [3, H, W] image by `shift` turns in HSV; a one-channel image has none."""
  if image.shape[0] == 1:
    return image
  r, g, b = image
  value = jnp.maximum(jnp.maximum(r, g), b)
  chroma = value - jnp.minimum(jnp.minimum(r, g), b)
  d = jnp.where(chroma == 0, 1.0, chroma)
  sextant = jnp.where(
    value == r, (g - b) / d, jnp.where(value == g, 2.0 + (b - r) / d, 4.0 + (r - g) / d)
  )  # hue in sixths of a turn; red wins ties, as in torchvision
  sextant = sextant + 6.0 * shift
  # value - chroma * how far the hue is from this channel's colour: HSV back to RGB without branches.
  planes = [value - chroma * _trapezoid(sextant + n) for n in (5.0, 3.0, 1.0)]
  return jnp.clip(jnp.stack(planes), 0, 1)


def _trapezoid(k):
  k = k - 6.0 * jnp.floor(k / 6.0)  # jnp.mod is a call to fmod for each pixel on CPUs
  return jnp.clip(jnp.minimum(k, 4.0 - k), 0, 1)


def solarize(image: jax.Array, threshold: float = 128 / 255) -> jax.Array:
  """Inverts every value at or above the threshold."""
  return jnp.where(image >= threshold, 1 - image, image)


def gaussian_blur(image: jax.Array, sigma: jax.Array, kernel_size: int) -> jax.Array:
  """torchvision's blur: a sampled Gaussian on `kernel_size` (odd) taps, normalised, reflecting edges."""
  reach = kernel_size // 2
  taps = jnp.exp(-0.5 * jnp.square(jnp.arange(-reach, reach + 1) / sigma))
  taps = taps / jnp.sum(taps)
  # The matrix includes the edge handling: [y, h] is the weight of input row h in output row y.
  rows, columns = (
    jnp.einsum("t,tyh->yh", taps, _shifts(n, reach, "reflect"), precision=_HIGHEST) for n in image.shape[1:]
  )
  out = jnp.einsum("yh,chw->cyw", rows, image, precision=_HIGHEST)
  return jnp.einsum("xw,cyw->cyx", columns, out, precision=_HIGHEST)


def pil_blur(image: jax.Array, sigma: jax.Array, max_sigma: float = 2.0) -> jax.Array:
  """Pillow's GaussianBlur(radius=sigma): three passes of an "extended box" along each axis, edges repeated.

  The box has l whole taps on each side and two fractional ones, so that the variance after three passes is sigma^2
  (Gwosdek et al., 2011; BoxBlur.c). Pillow rounds to uint8 after each pass; here nothing is rounded.

  Args:
    image: float [C, H, W].
    sigma: standard deviation, scalar in (0, max_sigma].
    max_sigma: Python float that bounds the number of taps.
  """
  variance = jnp.square(sigma) / 3
  whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
  width = 2 * whole + 1
  part = width * (whole * (whole + 1) - 3 * variance) / (6 * (variance - jnp.square(whole + 1)))
  reach = int((np.sqrt(4 * max_sigma**2 + 1) - 1) / 2) + 1
  distance = jnp.abs(jnp.arange(-reach, reach + 1))
  taps = jnp.where(distance <= whole, 1.0, jnp.where(distance == whole + 1, part, 0.0)) / (width + 2 * part)
  for axis in (2, 2, 2, 1, 1, 1):
    pad = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
    padded = jnp.pad(image, pad, mode="edge")
    n = image.shape[axis]
    image = sum(t * lax.slice_in_dim(padded, i, i + n, axis=axis) for i, t in enumerate(taps))
  return image


def normalize(image: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
  """(x - mean) / std by channel of [C, ...]; empty statistics change nothing."""
  if not mean:
    return image
  shape = (-1,) + (1,) * (image.ndim - 1)
  return (image - jnp.array(mean).reshape(shape)) / jnp.array(std).reshape(shape)


def _shifts(n, reach, mode):
  """[2 reach + 1, n, n]: which pixel each tap of each output reads, edges included."""
  padded = np.pad(np.arange(n, dtype=np.int32), reach, mode=mode)
  source = np.stack([padded[i : i + n] for i in range(2 * reach + 1)])
  # Compared in the program, which would otherwise carry a constant of 4.6 MB for 23 taps at 224 pixels.
  return (jnp.asarray(source)[..., None] == jnp.arange(n)[None, None]).astype(jnp.float32)


def _between(uniform, low, high):
  return low + (high - low) * uniform
