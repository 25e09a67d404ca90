"""Decodes an image file of any of the kinds that users' folders hold, to a uint8 array."""

import io
import math
import os
import re
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

MAX_PIXELS = 178_956_970  # above it Pillow too reports a decompression bomb

_READERS = (
  (rb"\xff\xd8\xff", JpegImageFile),
  (rb"\x89PNG\r\n\x1a\n", PngImageFile),
  (rb"GIF8[79]a", GifImageFile),
  (rb"RIFF....WEBP", WebPImageFile),
  (rb"BM", BmpImageFile),
  (rb"II[*+]\0|MM\0[*+]", TiffImageFile),
)
_GREY = ("1", "L", "I;16", "I;16B", "I", "F")


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


def read_image(source: str | os.PathLike | bytes, channels: int = 3) -> np.ndarray:
  """Decodes a JPEG, PNG, GIF, WebP, BMP or TIFF, known by its first bytes and not by its name.

  - Grey, 1-bit, palette, CMYK, YCbCr and LAB become grey or RGB. CMYK in a JPEG is inverted exactly if an Adobe
    marker is there.
  - Transparency, of any kind and in any format, is composited on white.
  - 16 bits become 8 by v >> 8. Wider integers are clipped to [0, 65535] first.
  - Floats are scaled by 255 if none is above 1, and clipped to [0, 255]. NaN is an error.
  - The EXIF orientation is applied. EXIF data that cannot be read is ignored, and so are colour profiles.
  - Of an animation or of several pages, the first is used.
  - More than `MAX_PIXELS` pixels are an error, found in the header.

  Args:
    source: a path, or the bytes of a file.
    channels: 3 is RGB (grey repeated). 1 is grey (colours to ITU-R 601 luma, as Pillow's mode L). Any other number
      accepts only images of exactly that many channels, as they are: grey with alpha, RGBA, CMYK, or the pages of a
      TIFF, if all are grey and of one size and depth.

  Returns:
    uint8 [H, W, channels], possibly read-only.

  Raises:
    ImageError: for any problem with the file. It raises no other exception and no warning.
  """
  return read_reduced(source, channels, math.inf)[0]


def read_reduced(source: str | os.PathLike | bytes, channels: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
  """`read_image`, but a JPEG is decoded at the smallest of 1/8, 1/4, 1/2 and 1 that has at least `least` pixels.

  Returns:
    uint8 [h, w, channels], possibly read-only, and the height and width of the whole image. Sides are rounded up.

  Raises:
    ImageError: as `read_image`.
  """
  path = source if isinstance(source, bytes) else os.fspath(source)  # A wrong type is the caller's error: a TypeError.
  filters: Any = warnings.filters
  if filters[:1] != [_MUTE]:
    filters.insert(0, _MUTE)
  _muted.on = True
  try:
    with io.BytesIO(source) if isinstance(source, bytes) else open(path, "rb") as file:
      return _decode(file, channels, least)
  except ImageError:
    raise
  except PIL.Image.DecompressionBombError as error:  # WebP's and GIF's plugins check before they give the size.
    raise ImageError(f"too large: {error}") from error
  except Exception as error:  # Pillow can raise any exception on damaged bytes.
    if isinstance(error, OSError) and error.strerror:  # The operating system's: no such file, is a directory, ...
      raise ImageError(error.strerror.lower()) from error
    reason = (str(error) or type(error).__name__).splitlines()[0][:200]
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
    raise ValueError(f"images must be [n, H, W, C] or a list of [H, W, C], got one of {list(pixels.shape)}.")
  if pixels.shape[-1] != channels:
    raise ValueError(f"images must have the run's number of channels, {channels}, got {list(pixels.shape)}.")
  if pixels.dtype == np.uint8:
    return pixels
  if not (pixels.min() >= 0 and pixels.max() <= 1):  # NaN is neither
    raise ValueError(f"images of floats must be in [0, 1], got {pixels.min()} to {pixels.max()}: divide by 255?")
  return np.rint(pixels * 255).astype(np.uint8)


def _decode(file: BinaryIO, channels: int, least: float) -> tuple[np.ndarray, tuple[int, int]]:
  start = file.read(32)
  if not start:
    raise ImageError("empty file")
  reader: Any = next((reader for magic, reader in _READERS if re.match(magic, start, re.DOTALL)), None)
  if reader is None:
    raise ImageError("not an image: no JPEG, PNG, GIF, WebP, BMP or TIFF")
  file.seek(0)
  image = reader(file)  # PIL.Image.open would accept many more formats, and run Ghostscript for one of them.
  if image.width * image.height > MAX_PIXELS:
    raise ImageError(f"too large: {image.width}x{image.height} pixels, at most {MAX_PIXELS}")
  width, height = image.size
  if reader is JpegImageFile:  # With shorter sides the reduced size would not determine n.
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
    pages = [np.asarray(image)]
    kind = image.mode, image.size
    for i in range(1, 1 if channels == 3 else channels):
      image.seek(i)
      if (image.mode, image.size) != kind:
        raise ImageError(f"page {i + 1} is {image.mode} {image.size}, page 1 is {kind[0]} {kind[1]}")
      pages.append(np.asarray(image))
    values = np.stack(pages, axis=-1)
    pixels = _to_uint8(values)
    key = image.info.get("transparency")  # The grey level that a PNG or GIF marks as transparent.
    if key is not None:
      pixels = np.where(values == key, np.uint8(255), pixels)
    if channels == 3:
      pixels = np.repeat(pixels, 3, axis=-1)
  else:
    if image.mode == "CMYK" and reader is JpegImageFile and "adobe" not in image.info:
      image = PIL.ImageChops.invert(image)  # Pillow has inverted it, as if the marker were there.
    if channels in (1, 3):
      if image.has_transparency_data:
        white = PIL.Image.new("RGBA", image.size, "white")
        image = PIL.Image.alpha_composite(white, image.convert("RGBA"))
      if image.mode != "RGB":
        image = image.convert("RGB")
    pixels = np.asarray(image.convert("L"))[..., None] if channels == 1 else np.asarray(image)

  if turn in (5, 6, 7, 8):
    pixels, width, height = pixels.swapaxes(0, 1), height, width
  if turn in (2, 3, 6, 7):
    pixels = pixels[:, ::-1]
  if turn in (3, 4, 7, 8):
    pixels = pixels[::-1]
  if reader is not JpegImageFile:  # `load` rotates a TIFF.
    height, width = pixels.shape[:2]
  return np.ascontiguousarray(pixels), (height, width)


def _to_uint8(values):
  """Grey values of any type as uint8, by the rules of `read_image`."""
  if values.dtype == bool:
    return values * np.uint8(255)
  if values.dtype.kind == "f":
    if np.isnan(values).any():
      raise ImageError("NaN among its pixels")
    top = 1 if values.max() <= 1 else 255
    return np.rint(np.clip(values, 0, top) * (255 // top)).astype(np.uint8)
  if values.dtype != np.uint8:
    return (np.clip(values, 0, 65535) >> 8).astype(np.uint8)
  return values
