"""Crops and resizes with exactly Pillow's results, in a third of Pillow's time."""

import math
import threading

import numba
import numpy as np

_BITS = 22  # fractional bits of a weight: of 32, eight are for the pixel and two for signs and overshoots
_ROWS = 64  # rows that are transposed at a time, few enough to stay in the cache
_mending = threading.Lock()


def _kept(function):
  """Compiles `function`, and caches it on disk between processes where a cache folder can be written."""
  try:
    return numba.njit(nogil=True, cache=True)(function)
  except RuntimeError:  # neither this file's folder nor the user's cache is writable
    return numba.njit(nogil=True)(function)


def resized_crop(
  pixels: np.ndarray, box: tuple[float, float, float, float], size: tuple[int, int], interpolation: str
) -> np.ndarray:
  r"""Cuts `box` out and resizes it, antialiased: bit for bit Pillow's `crop`, then `resize`.

  The height is resized first where it loses more than twice as many pixels as the width (Pillow 13), else the width.
  Each pass makes :math:`n` pixels of the :math:`l` pixels from :math:`a` on, rounded to uint8:

  .. math:: y_i = \lfloor \tfrac12 + \sum_j w_{ij} x_j \rfloor \text{ in } [0, 255], \quad
    w_{ij} \propto f \left( \frac{j + 1/2 - a - (i + 1/2) \, l / n}{\max(1, l / n)} \right), \quad \sum_j w_{ij} = 1

  with the weights rounded to 22 bits. f is the triangle :math:`1 - |t|`, or Keys' cubic with a = -1/2. No pixel outside
  of the box is used; a box that ends within a pixel gives `resize(box=)` of the smallest crop that contains it.

  Args:
    pixels: uint8 [H, W, C].
    box: top, left, height and width, within the image.
    size: height and width of the result.
    interpolation: "bilinear" or "bicubic".

  Returns:
    uint8 [*size, C].

  Raises:
    TypeError: the pixels are not uint8 [H, W, C].
    ValueError: the box is empty or not within the image, a size is not positive, or there is no such interpolation.
  """
  if pixels.dtype != np.uint8 or pixels.ndim != 3:
    raise TypeError(f"pixels must be uint8 [H, W, C], got {pixels.dtype} {list(pixels.shape)}.")
  h, w, c = pixels.shape
  top, left, height, width = map(float, box)
  bottom, right = top + height, left + width
  if not (0 <= top < bottom <= h and 0 <= left < right <= w):
    raise ValueError(f"box must be (top, left, height, width) within {h} x {w} pixels, got {box}.")
  if min(size) < 1:
    raise ValueError(f"size must be positive, got {size}.")
  if interpolation not in ("bilinear", "bicubic"):
    raise ValueError(f'interpolation must be "bilinear" or "bicubic", got {interpolation!r}.')
  lines = np.ascontiguousarray(pixels).reshape(h, w * c)
  lines.flags.writeable = False  # Numba would compile the kernel again for writeable arrays.
  size = int(size[0]), int(size[1])
  arguments = lines, c, top, left, bottom, right, *size, interpolation == "bicubic"
  try:
    resized = _resized(*arguments)
  except OSError:  # A full disk: it is compiled, but could not be cached.
    resized = _resized(*arguments)
  except Exception:  # The cached code is damaged, as by a power failure.
    with _mending:
      if not _resized.overloads:  # Else another thread has recompiled it, and may be running it.
        _resized.recompile()  # discards the cached code
      resized = _resized(*arguments)
  return resized.reshape(*size, c)


@numba.njit(nogil=True)
def _taps(start, stop, size, cubic):
  """For each of `size` output pixels: its first input pixel, their number, and their weights, int32 [size, most]."""
  edge = math.floor(start)
  length = math.ceil(stop) - edge
  begin, end = np.float32(start - edge), np.float32(stop - edge)  # Pillow's box is float32
  scale = float(end - begin) / size
  stretch = max(scale, 1.0)
  reach = (2.0 if cubic else 1.0) * stretch
  firsts, counts = np.empty(size, np.int64), np.empty(size, np.int64)
  weights = np.empty((size, 2 * math.ceil(reach) + 1), np.int32)
  exact = np.empty(weights.shape[1])
  for i in range(size):
    centre = begin + (i + 0.5) * scale
    first = max(int(centre - reach + 0.5), 0)
    count = min(int(centre + reach + 0.5), length) - first
    total = 0.0
    for t in range(count):
      x = abs((t + first - centre + 0.5) * (1.0 / stretch))
      if not cubic:
        exact[t] = max(1.0 - x, 0.0)
      elif x < 1:
        exact[t] = (1.5 * x - 2.5) * x * x + 1.0
      else:
        exact[t] = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
      total += exact[t]
    for t in range(count):
      weight = exact[t] / total * (1 << _BITS)
      weights[i, t] = int(weight + (0.5 if weight >= 0 else -0.5))
    firsts[i], counts[i] = edge + first, count
  return firsts, counts, weights


@numba.njit(nogil=True)
def _sum(lines, first, skip, weights, sums, out):
  """Writes to out [n] the weighted sum of the lines from `first` on, n values of each from `skip` on."""
  n = len(out)
  sums[:n] = 1 << (_BITS - 1)  # a half
  for t in range(len(weights)):
    weight, line = weights[t], lines[first + t, skip : skip + n]
    for j in range(n):  # vectorised
      sums[j] += weight * np.int32(line[j])
  for j in range(n):
    out[j] = min(max(sums[j] >> _BITS, 0), 255)


@numba.njit(nogil=True)
def _resize_rows(pixels, skip, firsts, counts, weights, out):
  """Resizes the height to out [h, n], with n values of each row from `skip` on."""
  sums = np.empty(out.shape[1], np.int32)
  for i in range(len(out)):
    _sum(pixels, firsts[i], skip, weights[i, : counts[i]], sums, out[i])


@numba.njit(nogil=True)
def _resize_columns(pixels, skip, c, firsts, counts, weights, out):
  """Resizes the width to out [h, w * c], of h rows from `skip` on; transposed, so that it sums whole lines here too."""
  x0, x1 = firsts[0], firsts[-1] + counts[-1]
  lines = np.empty((x1 - x0, _ROWS * c), np.uint8)
  sums, line = np.empty(_ROWS * c, np.int32), np.empty(_ROWS * c, np.uint8)
  for y in range(0, len(out), _ROWS):
    rows = min(_ROWS, len(out) - y)
    for r in range(rows):
      source = pixels[skip + y + r, x0 * c : x1 * c]
      for k in range(c):
        for x in range(x1 - x0):
          lines[x, r * c + k] = source[x * c + k]
    for i in range(len(firsts)):
      _sum(lines, firsts[i] - x0, 0, weights[i, : counts[i]], sums, line[: rows * c])
      for k in range(c):
        for r in range(rows):
          out[y + r, i * c + k] = line[r * c + k]


@_kept
def _resized(pixels, c, top, left, bottom, right, height, width, cubic):
  """Crops and resizes pixels [H, W * c] to [height, width * c]."""
  ys, ny, wy = _taps(top, bottom, height, cubic)
  xs, nx, wx = _taps(left, right, width, cubic)
  y0, y1, x0, x1 = ys[0], ys[-1] + ny[-1], xs[0], xs[-1] + nx[-1]  # the input range
  out = np.empty((height, width * c), np.uint8)
  lost_rows, lost_columns = math.ceil(bottom) - math.floor(top) - height, math.ceil(right) - math.floor(left) - width
  if lost_rows > max(0, 2 * lost_columns):
    between = np.empty((height, (x1 - x0) * c), np.uint8)
    _resize_rows(pixels, x0 * c, ys, ny, wy, between)
    _resize_columns(between, 0, c, xs - x0, nx, wx, out)
  else:
    between = np.empty((y1 - y0, width * c), np.uint8)
    _resize_columns(pixels, y0, c, xs, nx, wx, between)
    _resize_rows(between, 0, ys - y0, ny, wy, out)
  return out
