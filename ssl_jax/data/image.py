"""Decodes an image file of any of the kinds that users' folders hold, to a uint8 array."""

import contextlib
import io
import logging
import math
import os
import re
import struct
import threading
import warnings
from typing import Any, BinaryIO

import numpy as np
import PIL.ExifTags
import PIL.Image
import PIL.ImageChops
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from ssl_jax.data import turns

MAX_PIXELS = 120_000_000  # of one image; decoding it takes up to 7 bytes a pixel
Window = tuple[float, float]

_READERS = (
  (rb"\xff\xd8\xff", JpegImageFile),
  (rb"\x89PNG\r\n\x1a\n", PngImageFile),
  (rb"GIF8[79]a", GifImageFile),
  (rb"RIFF....WEBP", WebPImageFile),
  (rb"BM", BmpImageFile),
  (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
  (rb"\x93NUMPY", None),
)
_WIDE_GREY = ("I;16", "I;16B", "I", "F")
_GREY = ("1", "L", *_WIDE_GREY)
_STRIP = 1 << 22  # pixels that are converted at once: Pillow's copies of a whole image would be twice its size
_BYTES_A_PIXEL = 7  # 4 in Pillow, 3 in the array


class ImageError(ValueError):
  """An image that cannot be read; the text is the reason, in one line."""


class _Muted(threading.local):
  """A filter for `warnings` that ignores this thread's warnings while it is on.

  `warnings.catch_warnings` replaces the filters of all threads, and restores outdated ones if two threads overlap.
  """

  on = False

  def match(self, text):
    del text
    return self.on


_muted = _Muted()
_MUTE: Any = ("ignore", _muted, Warning, None, 0)  # `warnings` calls `match` on the text.


def read_image(source: str | os.PathLike | bytes, channels: int = 3, window: Window | None = None) -> np.ndarray:
  """Decodes a JPEG, PNG, GIF, WebP, BMP, TIFF or NPY, known by its first bytes and not by its name.

  - Grey, 1-bit, palette, CMYK, YCbCr and LAB become grey or RGB. CMYK in a JPEG is inverted exactly if an Adobe
    marker is there.
  - Transparency, of any kind and in any format, is composited on white.
  - Values of more than 8 bits become 8 by the window, which all images of a data set should share: its ends become 0
    and 255, and what is outside is clipped. Without one, 16 bits become 8 by v >> 8, wider integers are clipped to
    [0, 65535] first, and floats are scaled by 255 if none is above 1, and clipped to [0, 255]. NaN is an error.
    Of PNGs and TIFFs with 16-bit colours and alpha, and of PNGs with 16-bit colours, only the high byte is read.
  - The EXIF orientation is applied. EXIF data that cannot be read is ignored, and so are colour profiles and texts.
  - Of an animation or of several pages, the first is used.
  - More than `MAX_PIXELS` pixels are an error, found in the header.

  Args:
    source: a path, or the bytes of a file.
    channels: 3 is RGB (grey repeated). 1 is grey (colours to ITU-R 601 luma, as Pillow's mode L). Any other number
      accepts only images of exactly that many channels, as they are: grey with alpha, RGBA, CMYK, the bands of a TIFF
      in any layout, the pages of a TIFF, if all are grey and of one size and depth, or the last axis of an NPY array
      [H, W, C] of numbers.
    window: (low, high) with low < high.

  Returns:
    uint8 [H, W, channels], possibly read-only.

  Raises:
    ImageError: for any problem with the file. It raises no other exception and no warning.
  """
  return read_reduced(source, channels, math.inf, window)[0]


def read_reduced(
  source: str | os.PathLike | bytes, channels: int, least: float, window: Window | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
  """`read_image`, but a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1 that has at least `least` pixels.

  Returns:
    uint8 [h, w, channels], possibly read-only, and the height and width of the whole image. Sides are rounded up.

  Raises:
    ImageError: as `read_image`.
  """
  with _reading(source) as file:
    try:
      return _decode(file, channels, least, window)
    except Exception:
      shorter = _without_texts(file)  # Pillow refuses a picture for a text or profile of more than a MiB.
      if shorter is None:
        raise
    return _decode(shorter, channels, least, window)


def value_range(source: str | os.PathLike | bytes) -> Window | None:
  """The least and the largest finite value of an image whose values have more than 8 bits; None for any other image.

  Raises:
    ImageError: as `read_image`.
  """
  with _reading(source) as file:
    reader, _ = _kind(file)
    if reader is None:
      values = _npy(file)
      return None if values.dtype in (np.uint8, np.bool_) else _range([values])
    image, wide = _open(file, reader)
    if wide:
      values = _bands(file)
      return None if values.dtype in (np.uint8, np.bool_) else _range([values])
    if image.mode not in _WIDE_GREY:
      return None
    pages = range(image.n_frames if reader is TiffImageFile else 1)
    return _range(np.asarray(strip) for page in pages for _, strip in _strips(image, page))


def page_count(source: str | os.PathLike | bytes) -> int:
  """How many pages a TIFF has; 1 for any other image. Raises ImageError as `read_image`."""
  with _reading(source) as file:
    reader, _ = _kind(file)
    return reader(file).n_frames if reader is TiffImageFile else 1


def channel_count(source: str | os.PathLike | bytes) -> int:
  """How many channels an image is best read with: 1 for grey, 3 for colours, with alpha or without, else its bands.

  Raises:
    ImageError: as `read_image`.
  """
  with _reading(source) as file:
    reader, _ = _kind(file)
    if reader is None:
      return _npy(file).shape[2]
    image, wide = _open(file, reader)
    if wide:
      return _bands(file).shape[2]
    return 1 if image.mode in (*_GREY, "LA", "La") else 3


def _range(parts) -> Window | None:
  low, high = math.inf, -math.inf
  for part in parts:
    finite = part[np.isfinite(part)] if part.dtype.kind == "f" else part
    if finite.size:
      low, high = min(low, float(finite.min())), max(high, float(finite.max()))
  return (low, high) if low <= high else None


@contextlib.contextmanager
def _reading(source):
  """The file, opened; whatever goes wrong with it becomes an ImageError, and warnings are muted."""
  path = source if isinstance(source, bytes) else os.fspath(source)  # A wrong type is the caller's error: a TypeError.
  filters: Any = warnings.filters
  if filters[:1] != [_MUTE]:
    filters.insert(0, _MUTE)
  _muted.on = True
  try:
    if not isinstance(source, bytes) and os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
      raise ImageError("not a file")  # Opening a named pipe would block for ever.
    with io.BytesIO(source) if isinstance(source, bytes) else open(path, "rb") as file:
      yield file
  except ImageError:
    raise
  except PIL.Image.DecompressionBombError as error:  # WebP's and GIF's plugins check before they give the size.
    raise ImageError(f"too large: {error}; here at most {MAX_PIXELS} pixels") from error
  except Exception as error:  # Pillow can raise any exception on damaged bytes.
    if isinstance(error, OSError) and error.strerror:  # The operating system's: no such file, is a directory, ...
      raise ImageError(error.strerror.lower()) from error
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
    if "requires the 'imagecodecs' package" in reason:
      raise ImageError(f"its compression needs one more package: pip install imagecodecs ({reason})") from error
    raise ImageError(f"truncated, damaged or of an unknown kind ({reason})") from error
  finally:
    _muted.on = False


def as_pixels(image: Any, channels: int) -> np.ndarray:
  """An image that a caller holds, as a data set would have it: uint8 [H, W, channels].

  Args:
    image: uint8 [H, W, channels], or float in [0, 1], which is rounded to the 256 levels of an image file.
    channels: that it must have.

  Raises:
    TypeError: it is neither uint8 nor floating point.
    ValueError: its shape does not fit, or floats are not in [0, 1].
  """
  pixels = np.asarray(image)
  if pixels.dtype != np.uint8 and not np.issubdtype(pixels.dtype, np.floating):
    raise TypeError(f"images must be uint8, or floating point in [0, 1], got {pixels.dtype}.")
  if pixels.ndim != 3 or not pixels.size:
    raise ValueError(f"images must be [n, H, W, C] or a list of [H, W, C], got one image of {list(pixels.shape)}.")
  if pixels.shape[-1] != channels:
    raise ValueError(f"images must have the run's number of channels, {channels}, got {list(pixels.shape)}.")
  if pixels.dtype == np.uint8:
    return pixels
  if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
    scaled = ": divide by 255?" if 1 < pixels.max() <= 255 else "."
    raise ValueError(f"images of floats must be in [0, 1], got {pixels.min()} to {pixels.max()}{scaled}")
  return np.rint(pixels * 255).astype(np.uint8)


def _kind(file: BinaryIO) -> tuple[Any, bytes]:
  """Pillow's reader class, None for NPY, and the first bytes."""
  start = file.read(32)
  file.seek(0)
  if not start:
    raise ImageError("empty file")
  for magic, reader in _READERS:
    if re.match(magic, start, re.DOTALL):
      return reader, start
  raise ImageError("not an image: no JPEG, PNG, GIF, WebP, BMP, TIFF or NPY")


def _open(file, reader, channels=None):
  """(Pillow's image, not yet decoded; whether tifffile has to read it, since Pillow would lose bits or bands)."""
  try:
    image = reader(file)  # PIL.Image.open would accept many more formats, and run Ghostscript for one of them.
  except Exception:
    if reader is not TiffImageFile:
      raise
    return None, True
  _check_size(*image.size)
  if reader is not TiffImageFile:
    return image, False
  samples, bits = image.tag_v2.get(277, 1), image.tag_v2.get(258, (1,))
  wide = samples > 1 and max(bits) > 8 and (image.mode == "RGB" or channels not in (1, 3))
  return image, wide or samples > len(image.getbands())


def _check_size(width, height, bytes_a_pixel=4):
  if width * height * bytes_a_pixel > 4 * MAX_PIXELS:
    of = "" if bytes_a_pixel <= 4 else f" of {bytes_a_pixel} bytes each"
    raise ImageError(f"too large: {width}x{height} pixels{of}, at most {4 * MAX_PIXELS // max(4, bytes_a_pixel)}")
  turns.take(width * height * max(_BYTES_A_PIXEL, bytes_a_pixel + 3), _BYTES_A_PIXEL * MAX_PIXELS)


def _decode(file: BinaryIO, channels: int, least: float, window: Window | None) -> tuple[np.ndarray, tuple[int, int]]:
  file.seek(0)
  reader, start = _kind(file)
  if reader is None:
    return _as_pixels(_npy(file), channels, window)
  image, wide = _open(file, reader, channels)
  if wide:
    return _as_pixels(_bands(file), channels, window)
  width, height = image.size
  if reader is JpegImageFile:  # On smaller images two reductions could give the same size.
    fits = (n for n in (8, 4, 2) if -(-width // n) * -(-height // n) >= least and min(image.size) > n * n)
    if parts := next(fits, None):
      image.draft(None, (width // parts, height // parts))
  image.load()
  try:
    turn = image.getexif().get(PIL.ExifTags.Base.Orientation)  # None for a TIFF: `load` has applied it.
  except Exception:
    turn = None
  if reader is PngImageFile and image.mode in ("L", "RGB") and "transparency" in image.info:
    scale = {2: 85, 4: 17, 16: 1 / 256}.get(start[24], 1)  # Pillow scales the pixels, but not the transparent value.
    key = (np.asarray(image.info["transparency"]) * scale).astype(int).tolist()
    image.info["transparency"] = tuple(key) if image.mode == "RGB" else key
  if image.mode in ("La", "PA"):  # grey premultiplied by alpha; palette with alpha
    image = image.convert("LA" if image.mode == "La" else "RGBA")
  if channels not in (1, 3):
    paged = reader is TiffImageFile and image.mode in _GREY
    held = image.n_frames if paged else len(image.getbands())
    if held != channels:
      raise ImageError(f"{held} channels, not {channels}")

  if image.mode in _GREY:
    pixels = _grey(image, 1 if channels == 3 else channels, window)
    pixels = np.repeat(pixels, 3, axis=-1) if channels == 3 else pixels
  else:
    # Pillow inverts a CMYK JPEG even where it has no Adobe marker: that is undone.
    inverted = image.mode == "CMYK" and reader is JpegImageFile and "adobe" not in image.info
    pixels = np.empty((image.height, image.width, channels), np.uint8)
    for top, strip in _strips(image):
      pixels[top : top + strip.height] = _colours(strip, channels, inverted)
  del image
  return _turned(pixels, turn, (height, width) if reader is JpegImageFile else None)


def _strips(image, page=0):
  """Yields (top, image) for the strips of a page."""
  if page:
    image.seek(page)
  rows = max(1, _STRIP // image.width)
  if rows >= image.height:
    yield 0, image
    return
  for top in range(0, image.height, rows):
    yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _grey(image, pages, window):
  """The grey pages of an image as uint8 [H, W, pages]."""
  kind = image.mode, image.size
  top = 255.0
  if image.mode == "F" and window is None:
    highest = max(np.asarray(strip).max() for page in range(pages) for _, strip in _strips(image, page))
    top = 1.0 if highest <= 1 else 255.0
    if pages > 1:
      image.seek(0)
  pixels = np.empty((image.height, image.width, pages), np.uint8)
  key = image.info.get("transparency")  # The grey level that a PNG or GIF marks as transparent.
  for page in range(pages):
    if page:
      image.seek(page)
    if (image.mode, image.size) != kind:
      raise ImageError(f"page {page + 1} is {image.mode} {image.size}, page 1 is {kind[0]} {kind[1]}")
    for first, strip in _strips(image):
      values = np.asarray(strip)
      part = _to_uint8(values, window, top)
      pixels[first : first + strip.height, :, page] = part if key is None else np.where(values == key, 255, part)
  return pixels


def _colours(image, channels, inverted):
  """An image of several bands, or with a palette, as uint8 [H, W, channels]."""
  if inverted:
    image = PIL.ImageChops.invert(image)
  if channels in (1, 3):
    if image.has_transparency_data:
      white = PIL.Image.new("RGBA", image.size, "white")
      image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
    if image.mode != "RGB":
      image = image.convert("RGB")
  return np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)


def _turned(pixels, turn, size):
  """The pixels upright, and height and width of the upright image; `size` is before turning, None: the pixels'."""
  if turn in (5, 6, 7, 8):
    pixels, size = pixels.swapaxes(0, 1), size and size[::-1]
  if turn in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if turn in (3, 4, 7, 8):
    pixels = pixels[::-1]
  return np.ascontiguousarray(pixels), size or pixels.shape[:2]


def _npy(file):
  """The array of an NPY file as [H, W, C]."""
  version = np.lib.format.read_magic(file)
  header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
  shape, _, dtype = header(file)
  if len(shape) not in (2, 3) or dtype.kind not in "buif" or 0 in shape:
    raise ImageError(f"an array must be [height, width] or [height, width, channels] of numbers, got {dtype} {shape}")
  _check_size(shape[1], shape[0], math.prod(shape[2:]) * dtype.itemsize)
  file.seek(0)
  values = np.load(file, allow_pickle=False)
  return values if values.ndim == 3 else values[..., None]


def _bands(file):
  """The bands of a TIFF's first page, upright, [H, W, C] of its own type, whatever their layout."""
  import tifffile

  logging.getLogger("tifffile").disabled = True  # It logs what it then raises.
  file.seek(0)
  with tifffile.TiffFile(file) as tiff:
    page = tiff.pages.first
    if page.dtype is None or page.ndim not in (2, 3) or page.dtype.kind not in "buif":
      raise ImageError(f"{page.dtype} {page.shape} is no image")
    _check_size(page.imagewidth, page.imagelength, page.samplesperpixel * page.dtype.itemsize)
    values = page.asarray()
    turn = page.tags.valueof(274, 1)
    inverted = page.photometric == tifffile.PHOTOMETRIC.MINISWHITE
  if values.ndim == 2:
    values = values[..., None]
  elif page.axes.startswith("S"):
    values = np.moveaxis(values, 0, -1)
  if inverted and values.dtype.kind in "bu":
    values = np.iinfo(values.dtype).max - values
  return _turned(values, turn, None)[0]


def _as_pixels(values, channels, window):
  """Values [H, W, C] of any type as `read_reduced` gives them."""
  held = values.shape[2]
  if held != channels and (channels not in (1, 3) or held not in (1, 3)):
    raise ImageError(f"{held} channels, not {channels}")
  top = 1.0 if values.dtype.kind == "f" and values.max() <= 1 else 255.0
  pixels = np.empty(values.shape, np.uint8)
  rows = max(1, _STRIP // values[0].size)
  for first in range(0, len(values), rows):
    pixels[first : first + rows] = _to_uint8(values[first : first + rows], window, top)
  if held == 1 and channels == 3:
    pixels = np.repeat(pixels, 3, axis=-1)
  elif held == 3 and channels == 1:
    pixels = np.asarray(PIL.Image.fromarray(pixels).convert("L"))[..., None]
  return pixels, pixels.shape[:2]


def _to_uint8(values, window, top):
  """Values of any type as uint8, by the rules of `read_image`; without a window floats in [0, top] are scaled."""
  if values.dtype == bool:
    return values * np.uint8(255)
  if values.dtype == np.uint8:
    return values
  if values.dtype.kind == "f" and np.isnan(values).any():
    raise ImageError("NaN among its pixels")
  if window is not None:
    low, high = window
    return np.rint((np.clip(values, low, high).astype(np.float64) - low) * (255 / (high - low))).astype(np.uint8)
  if values.dtype.kind == "f":
    return np.rint(np.clip(values, 0, top) * (255 // top)).astype(np.uint8)
  return (np.clip(values, 0, 65535) >> 8).astype(np.uint8)


def _without_texts(file):
  """A PNG without its texts and colour profile; None where there are none, or it is no PNG."""
  file.seek(0)
  if file.read(8) != b"\x89PNG\r\n\x1a\n":
    return None
  kept, dropped = [b"\x89PNG\r\n\x1a\n"], False
  while len(head := file.read(8)) == 8:
    length, name = struct.unpack(">I4s", head)
    if name in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
      file.seek(length + 4, os.SEEK_CUR)
      dropped = True
    else:
      kept += [head, file.read(length + 4)]
  return io.BytesIO(b"".join(kept)) if dropped else None
