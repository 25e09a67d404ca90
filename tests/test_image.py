"""One property a test, over every format that can have it. The files are made here, by Pillow or byte by byte."""

import concurrent.futures
import io
import os
import pathlib
import struct
import subprocess
import sys
import threading
import warnings
import zlib

import numpy as np
import PIL.Image
import PIL.ImageFile
import PIL.TiffImagePlugin
import pytest

from ssl_jax.data import image as image_module
from ssl_jax.data.image import MAX_PIXELS, ImageError, read_image, read_reduced

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF")
LOSSLESS = ("PNG", "WEBP", "BMP", "TIFF")


def encode(picture, form, **options):
  """A Pillow image or an array as the bytes of a file."""
  picture = picture if isinstance(picture, PIL.Image.Image) else PIL.Image.fromarray(picture)
  if form == "WEBP":
    options = {"lossless": True, "exact": True, **options}  # exact: keeps the colours under alpha 0
  if form == "BMP" and picture.mode == "RGBA":  # Pillow reads alpha where it is declared, but writes it without.
    header = struct.pack("<I2i2H10I", 108, *picture.size, 1, 32, 3, 0, 0, 0, 0, 0, 255 << 16, 255 << 8, 255, 255 << 24)
    pixels = np.asarray(picture)[::-1, :, [2, 1, 0, 3]].tobytes()
    return b"BM" + struct.pack("<3I", 14 + 108 + len(pixels), 0, 14 + 108) + header + bytes(52) + pixels
  if form == "JPEG":
    options = {"quality": 100, "subsampling": 0, **options}
  file = io.BytesIO()
  picture.save(file, form, **options)
  return file.getvalue()


def png(rows, width, depth, kind, *chunks):
  """A PNG that Pillow cannot write, from the bytes of its rows."""

  def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

  header = struct.pack(">2I5B", width, len(rows), depth, kind, 0, 0, 0)
  data = zlib.compress(b"".join(b"\0" + row for row in rows))
  middle = b"".join(chunk(*c) for c in chunks)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + middle + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def tiff_entry(data, tag):
  """Where in a little-endian TIFF the first directory's entry of a tag begins."""
  (directory,) = struct.unpack_from("<I", data, 4)
  (count,) = struct.unpack_from("<H", data, directory)
  return next(
    p for p in range(directory + 2, directory + 2 + 12 * count, 12) if data[p : p + 2] == struct.pack("<H", tag)
  )


def patch(data, at, new):
  return data[:at] + new + data[at + len(new) :]


def blocks(height=6, width=8):
  """uint8 [h, w, 3] of a few flat colours, so that GIF's palette holds them all."""
  colours = np.random.default_rng(0).integers(0, 256, (-(-height // 2), -(-width // 2), 3), np.uint8)
  return colours.repeat(2, 0).repeat(2, 1)[:height, :width]


def luma(rgb):
  return np.asarray(rgb, np.float64) @ [0.299, 0.587, 0.114]


# Kinds of pixels.


@pytest.mark.parametrize("form", [*LOSSLESS, "GIF"])
def test_colours_come_back_and_one_channel_is_their_luma(form):
  data = encode(blocks(), form)
  np.testing.assert_array_equal(read_image(data), blocks())
  assert read_image(data).dtype == np.uint8
  grey = read_image(data, 1)
  assert grey.shape == (6, 8, 1)
  np.testing.assert_allclose(grey[..., 0], luma(blocks()), atol=1)  # rounding


def test_a_jpeg_comes_back_nearly():
  smooth = np.add.outer(np.arange(24), np.arange(32))[..., None] * np.uint8([4, 2, 1])
  np.testing.assert_allclose(read_image(encode(smooth.astype(np.uint8), "JPEG")), smooth, atol=4)  # the codec's loss


@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP", "BMP", "TIFF", "JPEG"])
def test_grey_is_three_equal_channels_or_one(form):
  grey = np.linspace(0, 255, 48).astype(np.uint8).reshape(6, 8)
  data = encode(grey, form)
  atol = 2 if form == "JPEG" else 0
  np.testing.assert_allclose(read_image(data, 1)[..., 0], grey, atol=atol)
  np.testing.assert_array_equal(read_image(data, 3), read_image(data, 1).repeat(3, -1))


@pytest.mark.parametrize("form", ["PNG", "GIF", "BMP", "TIFF"])
def test_one_bit_is_black_and_white(form):
  bits = np.random.default_rng(0).integers(0, 2, (5, 11)).astype(bool)
  np.testing.assert_array_equal(read_image(encode(bits, form), 1)[..., 0], bits * 255)


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_palettes_are_looked_up(form):
  picture = PIL.Image.fromarray(np.uint8([[0, 1], [2, 1]])).convert("L")
  picture = PIL.Image.frombytes("P", (2, 2), picture.tobytes())
  picture.putpalette([10, 20, 30, 200, 100, 50, 7, 8, 9])
  expected = [[[10, 20, 30], [200, 100, 50]], [[7, 8, 9], [200, 100, 50]]]
  np.testing.assert_array_equal(read_image(encode(picture, form)), expected)


# Transparency.

ALPHA = np.uint8([[0, 0, 255, 255]] * 2)
HALF = np.uint8([[0, 128, 128, 255]] * 2)


def on_white(colours, alpha):
  alpha = alpha[..., None] / 255
  return colours * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("alpha", [ALPHA, HALF], ids=["hard", "soft"])
def test_colours_with_alpha_are_on_white(form, alpha):
  colours = np.full((2, 4, 3), (200, 30, 90), np.uint8)
  data = encode(np.dstack([colours, alpha]), form)
  with PIL.Image.open(io.BytesIO(data)) as stored:  # The hidden colour is there to be found.
    assert stored.mode == "RGBA" and stored.getpixel((0, 0)) == (200, 30, 90, 0)
  expected = on_white(colours, alpha)
  np.testing.assert_allclose(read_image(data), expected, atol=1)  # rounding
  np.testing.assert_allclose(read_image(data, 1)[..., 0], luma(expected), atol=1.5)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_grey_with_alpha_is_on_white(form):
  data = encode(np.dstack([np.full((2, 4), 100, np.uint8), HALF]), form)
  expected = on_white(np.full((2, 4, 1), 100), HALF)
  np.testing.assert_allclose(read_image(data, 1), expected, atol=1)
  np.testing.assert_allclose(read_image(data, 3), expected.repeat(3, -1), atol=1)


def test_premultiplied_grey_is_on_white():
  grey = np.full((2, 4), 100) * (HALF / 255)
  data = encode(np.dstack([np.uint8(np.rint(grey)), HALF]), "TIFF")
  data = patch(data, tiff_entry(data, 338) + 8, b"\1")  # ExtraSamples: associated
  np.testing.assert_allclose(read_image(data, 1), on_white(np.full((2, 4, 1), 100), HALF), atol=2)  # divided back


def test_16_bit_grey_with_alpha_is_on_white():
  rows = [np.array([[51400, 0], [51400, 65535]], ">u2").tobytes()]
  np.testing.assert_array_equal(read_image(png(rows, 2, 16, 4), 1)[0, :, 0], [255, 200])


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_a_transparent_palette_entry_is_white(form):
  picture = PIL.Image.frombytes("P", (2, 1), b"\0\1")
  picture.putpalette([200, 0, 0, 0, 0, 200])
  data = encode(picture, form, transparency=0)
  np.testing.assert_array_equal(read_image(data), [[[255, 255, 255], [0, 0, 200]]])
  np.testing.assert_allclose(read_image(data, 1)[0, :, 0], [255, luma([0, 0, 200])], atol=1)


def test_a_palette_with_alphas_is_on_white():
  picture = PIL.Image.frombytes("P", (3, 1), b"\0\1\2")
  picture.putpalette([200, 0, 0, 0, 200, 0, 0, 0, 200])
  data = encode(picture, "PNG", transparency=b"\0\x80\xff")
  np.testing.assert_allclose(read_image(data), [[[255, 255, 255], [127, 227, 127], [0, 0, 200]]], atol=1)


def test_a_palette_beside_alpha_is_on_white():
  picture = PIL.Image.frombytes("PA", (2, 1), b"\1\0\1\xff")
  picture.putpalette([0, 0, 0, 200, 100, 50])
  data = encode(picture, "TIFF")
  np.testing.assert_array_equal(read_image(data), [[[255, 255, 255], [200, 100, 50]]])
  np.testing.assert_array_equal(read_image(data, 4), [[[200, 100, 50, 0], [200, 100, 50, 255]]])


@pytest.mark.parametrize(
  ("row", "width", "depth", "kind", "key", "expected"),
  [
    (b"\x40", 2, 1, 0, [0], [255, 255]),
    (b"\x40", 2, 1, 0, [1], [0, 255]),
    (b"\x1b", 4, 2, 0, [1], [0, 255, 170, 255]),
    (b"\x37", 2, 4, 0, [3], [255, 119]),
    (b"\x37\x38", 2, 8, 0, [0x37], [255, 0x38]),
    (struct.pack(">2H", 51400, 51401), 2, 16, 0, [51400], [255, 200]),
    (bytes([9, 9, 9, 8, 8, 8]), 2, 8, 2, [9, 9, 9], [255, 8]),
    (struct.pack(">6H", *[51401] * 3, *[2570] * 3), 2, 16, 2, [51401] * 3, [255, 10]),
  ],
  ids=["1 bit, 0", "1 bit, 1", "2 bits", "4 bits", "8 bits", "16 bits", "RGB", "16-bit RGB"],
)
def test_the_transparent_colour_of_a_png_is_white_at_any_depth(row, width, depth, kind, key, expected):
  data = png([row], width, depth, kind, (b"tRNS", struct.pack(f">{len(key)}H", *key)))
  np.testing.assert_array_equal(read_image(data)[0], np.repeat(np.array(expected)[:, None], 3, 1))
  np.testing.assert_array_equal(read_image(data, 1)[0, :, 0], expected)


# More than 8 bits.

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257


@pytest.mark.parametrize(
  "data",
  [
    encode(RAMP, "PNG"),
    encode(RAMP, "TIFF"),
    encode(PIL.Image.frombytes("I;16B", (16, 16), RAMP.astype(">u2").tobytes()), "TIFF"),
    encode(RAMP, "TIFF", compression="tiff_lzw"),
    encode(RAMP.astype(np.int32), "TIFF"),
  ],
  ids=["PNG", "TIFF", "big-endian", "LZW", "32 bits"],
)
def test_16_bit_grey_keeps_its_256_levels(data):
  grey = read_image(data, 1)
  np.testing.assert_array_equal(grey.ravel(), np.arange(256))
  assert grey.mean() == 127.5
  np.testing.assert_array_equal(read_image(data), grey.repeat(3, -1))


def test_wider_integers_are_clipped():
  data = encode(np.int32([[-5, 70000, 256]]), "TIFF")
  np.testing.assert_array_equal(read_image(data, 1)[0, :, 0], [0, 255, 1])


@pytest.mark.parametrize("samples", [3, 4])
def test_16_bit_colours_keep_their_high_byte(samples):
  values = np.random.default_rng(0).integers(0, 65536, (4, 5, samples)).astype(">u2")
  values[..., 3:] = 65535
  data = png([row.tobytes() for row in values], 5, 16, {3: 2, 4: 6}[samples])
  np.testing.assert_array_equal(read_image(data), values[..., :3] >> 8)


@pytest.mark.parametrize(
  ("values", "expected"),
  [
    ([0, 0.5, 1, -1], [0, 128, 255, 0]),
    ([0, 0, 0.1], [0, 0, 26]),
    ([0, 1.5, 200.4, 300], [0, 2, 200, 255]),
    ([-np.inf, 0, np.inf], [0, 0, 255]),
    ([-3e38, 1, 0.2], [0, 255, 51]),
  ],
)
def test_floats_are_unit_or_byte_range(values, expected):
  data = encode(np.float32([values]), "TIFF")
  np.testing.assert_array_equal(read_image(data, 1)[0, :, 0], expected)


def test_nan_is_an_error():
  with pytest.raises(ImageError, match="NaN"):
    read_image(encode(np.float32([[0.5, np.nan]]), "TIFF"))


# Other colour spaces.


def adobe(data, new):
  """A JPEG with another Adobe marker (16 bytes: marker, length, "Adobe", version, flags, transform), or none."""
  at = data.index(b"\xff\xee\x00\x0eAdobe")
  return data[:at] + new(data[at : at + 16]) + data[at + 16 :]


def cmyk_jpeg(values, new=bytes):
  return adobe(encode(PIL.Image.new("CMYK", (16, 16), values), "JPEG"), new)


@pytest.mark.parametrize(
  "data",
  [
    cmyk_jpeg((0, 255, 255, 0)),
    cmyk_jpeg((255, 0, 0, 255), lambda marker: b""),  # Pillow writes the complement: red, plainly
    # The file's Y, Cb, Cr, K are (179, 171, 1, 255): the complement of red's CMYK, as Adobe writes it.
    cmyk_jpeg((76, 84, 254, 0), lambda marker: marker[:-1] + b"\2"),
    encode(PIL.Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "TIFF"),
  ],
  ids=["Adobe", "no marker", "YCCK", "TIFF"],
)
def test_red_in_cmyk_is_red(data):
  np.testing.assert_allclose(read_image(data), np.full((16, 16, 3), (255, 0, 0)), atol=3)  # the codec's loss
  np.testing.assert_allclose(read_image(data, 1), np.full((16, 16, 1), 76), atol=3)


@pytest.mark.parametrize("mode", ["LAB", "YCbCr"])
def test_other_colour_spaces_become_rgb_or_luma(mode):
  data = encode(PIL.Image.new("RGB", (4, 4), (200, 30, 60)).convert(mode), "TIFF")
  with PIL.Image.open(io.BytesIO(data)) as stored:
    assert stored.mode == mode
  np.testing.assert_allclose(read_image(data), np.full((4, 4, 3), (200, 30, 60)), atol=2)  # there and back
  np.testing.assert_allclose(read_image(data, 1)[..., 0], luma((200, 30, 60)), atol=2)


# Orientation.

# What the EXIF standard says: which side of the scene the file's first row is, and which its first column.
SIDES = {
  1: ("top", "left"),
  2: ("top", "right"),
  3: ("bottom", "right"),
  4: ("bottom", "left"),
  5: ("left", "top"),
  6: ("right", "top"),
  7: ("right", "bottom"),
  8: ("left", "bottom"),
}


def scene(stored, orientation):
  """The stored pixels, each put where the standard says."""
  rows, columns = SIDES[orientation]
  upright = rows in ("top", "bottom")
  height, width = stored.shape[:2] if upright else stored.shape[1::-1]
  shown = np.zeros((height, width, *stored.shape[2:]), stored.dtype)
  for r in range(stored.shape[0]):
    for c in range(stored.shape[1]):
      place = {rows: r, columns: c}
      y = place["top"] if "top" in place else height - 1 - place["bottom"]
      x = place["left"] if "left" in place else width - 1 - place["right"]
      shown[y, x] = stored[r, c]
  return shown


def turned(picture, form, orientation):
  exif = PIL.Image.Exif()
  exif[274] = orientation
  return encode(picture, form, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_the_orientation_is_applied(form, orientation):
  stored = blocks(16, 24).repeat(4, 0).repeat(4, 1)  # 8x8 blocks: JPEG keeps them
  for channels in (3, 1):
    got = read_image(turned(stored, form, orientation), channels)
    expected = read_image(encode(scene(stored, orientation), "PNG"), channels)
    np.testing.assert_allclose(got, expected, atol=4)  # JPEG's loss
    assert got.flags.c_contiguous


def test_the_left_half_turned_right_is_on_top():
  picture = np.zeros((20, 40, 3), np.uint8)
  picture[:, :20, 0] = 255
  got = read_image(turned(picture, "JPEG", 6))
  assert got.shape == (40, 20, 3)
  np.testing.assert_allclose(got[0], np.full((20, 3), (255, 0, 0)), atol=3)


@pytest.mark.parametrize("grey", [np.uint8, np.uint16])
def test_grey_is_turned_too(grey):
  stored = np.arange(6, dtype=grey).reshape(2, 3)
  if grey == np.uint16:
    stored <<= 8
  np.testing.assert_array_equal(read_image(turned(stored, "PNG", 8), 1)[..., 0], [[2, 5], [1, 4], [0, 3]])


@pytest.mark.parametrize("orientation", [0, 9, 60000])
def test_an_orientation_that_is_none_is_ignored(orientation):
  np.testing.assert_array_equal(read_image(turned(blocks(), "PNG", orientation)), blocks())


@pytest.mark.parametrize(
  "junk", [b"Exif\0\0", b"Exif\0\0garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f", b"Exif\0\0MM\0*\0\0"]
)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_that_cannot_be_read_is_ignored(form, junk):
  np.testing.assert_array_equal(read_image(encode(blocks(), form, exif=junk)), read_image(encode(blocks(), form)))


# Reduced decoding.


def smooth(height, width):
  y, x = np.mgrid[:height, :width]
  return np.stack([y * 250 / height, x * 250 / width, 128 + 100 * np.sin(x / 20)], axis=-1).astype(np.uint8)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("channels", [1, 3])
def test_a_reduced_jpeg_is_the_whole_averaged_and_tells_its_real_size(orientation, channels):
  data = turned(smooth(160, 240), "JPEG", orientation)
  whole = read_image(data, channels)
  for n in (1, 2, 4, 8):
    pixels, size = read_reduced(data, channels, 160 * 240 / n**2)
    assert size == whole.shape[:2] and pixels.shape == (size[0] // n, size[1] // n, channels)
    averaged = whole.reshape(size[0] // n, n, size[1] // n, n, channels).mean((1, 3))
    np.testing.assert_allclose(pixels, averaged, atol=3)  # gray levels: each of three channels rounds


@pytest.mark.parametrize(
  "size, least, reduced",
  [
    ((160, 240), 160 * 240 / 4 + 1, (160, 240)),
    ((161, 239), 81 * 120, (81, 120)),
    ((160, 240), np.inf, (160, 240)),
    ((64, 2400), 1, (16, 600)),  # the short side is kept above n * n before it is reduced
    ((4, 2400), 1, (4, 2400)),
  ],
)
def test_a_jpeg_is_reduced_as_far_as_enough_pixels_are_left(size, least, reduced):
  pixels, real = read_reduced(encode(smooth(*size), "JPEG"), 3, least)
  assert real == size and pixels.shape == (*reduced, 3)


@pytest.mark.parametrize("form", [form for form in FORMATS if form != "JPEG"])
def test_other_formats_are_never_reduced(form):
  data = turned(smooth(80, 120), form, 6) if form in ("PNG", "TIFF") else encode(smooth(80, 120), form)
  pixels, size = read_reduced(data, 3, 1)
  np.testing.assert_array_equal(pixels, read_image(data))
  assert size == pixels.shape[:2]


# Several frames.


@pytest.mark.parametrize("form", ["GIF", "PNG", "WEBP", "TIFF"])
def test_the_first_frame_counts(form):
  red, green = (PIL.Image.new("RGB", (9, 7), colour) for colour in ("red", "lime"))
  data = encode(red, form, save_all=True, append_images=[green])
  with PIL.Image.open(io.BytesIO(data)) as stored:
    assert stored.n_frames == 2
  np.testing.assert_array_equal(read_image(data), np.full((7, 9, 3), (255, 0, 0)))


# Sizes.


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
@pytest.mark.parametrize("channels", [1, 3])
def test_tiny_images_are_read(form, shape, channels):
  value = np.full((*shape, 3), 70, np.uint8)
  np.testing.assert_allclose(read_image(encode(value, form), channels), np.full((*shape, channels), 70), atol=1)


def grown(form, width, height):
  """A small file whose header names another size."""
  if form == "PNG":
    header = b"IHDR" + struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0)
    return patch(encode(np.zeros((2, 2), np.uint8), "PNG"), 12, header + struct.pack(">I", zlib.crc32(header)))
  data = encode(blocks(), form.split()[0])
  if form == "JPEG":
    return patch(data, data.index(b"\xff\xc0") + 5, struct.pack(">2H", height, width))
  if form == "GIF":
    return patch(data, 6, struct.pack("<2H", width, height))
  if form == "GIF frame":
    return patch(data, data.index(b",\0\0\0\0") + 5, struct.pack("<2H", width, height))
  if form == "WEBP":
    (bits,) = struct.unpack_from("<I", data, 21)
    return patch(data, 21, struct.pack("<I", bits >> 28 << 28 | height - 1 << 14 | width - 1))
  if form == "BMP":
    return patch(data, 18, struct.pack("<2i", width, height))
  for tag, size in ((256, width), (257, height)):
    data = patch(data, tiff_entry(data, tag), struct.pack("<2H2I", tag, 4, 1, size))
  return data


@pytest.mark.parametrize("size", [(20000, 9500), (60000, 60000)], ids=str)
@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "BMP", "TIFF"])
def test_huge_images_are_refused_by_their_header(form, size):
  with pytest.raises(ImageError, match=rf"^too large: {size[0]}x{size[1]} pixels, at most {MAX_PIXELS}$"):
    read_image(grown(form, *size))


@pytest.mark.parametrize(("form", "size"), [("WEBP", (16000, 15000)), ("GIF frame", (20000, 9500))])
def test_huge_images_that_pillow_refuses_are_refused_with_the_number_of_pixels(form, size):
  with pytest.raises(ImageError, match=rf"^too large: .*{size[0] * size[1]} pixels.* {MAX_PIXELS} "):
    read_image(grown(form, *size))


@pytest.mark.slow
@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_bounded_at_and_above_the_limit_of_pixels(tmp_path):
  for name, size in (("above", (20000, 9500)), ("at", (17895, 10000))):
    PIL.Image.new("L", size, 7).save(tmp_path / name, "PNG", compress_level=1)
  code = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])  # the module alone: JAX would be most of the memory
from image import ImageError, read_image
for name in sys.argv[2:]:
  try:
    print(read_image(name).shape)
  except ImageError as error:
    print(error)
  print(pathlib.Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
"""
  folder = pathlib.Path(image_module.__file__).parent
  command = [sys.executable, "-c", code, folder, tmp_path / "above", tmp_path / "at"]
  above, low, at, high = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
  assert above.startswith("too large") and at == "(10000, 17895, 3)"
  assert int(low) < 200 * 2**10 and int(high) < 2 * 2**20  # KiB


def test_the_limit_itself_is_allowed(monkeypatch):
  data = encode(blocks(6, 8), "PNG")
  monkeypatch.setattr(image_module, "MAX_PIXELS", 48)
  assert read_image(data).shape == (6, 8, 3)
  monkeypatch.setattr(image_module, "MAX_PIXELS", 47)
  with pytest.raises(ImageError, match="too large: 8x6 pixels, at most 47"):
    read_image(data)


# What is wrong with files.


@pytest.mark.parametrize("part", [0.5, 0.9])
@pytest.mark.parametrize("form", FORMATS)
def test_truncated_files_are_named_so(form, part):
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  data = encode(noise, form)
  assert read_image(data).shape == (64, 64, 3)
  with pytest.raises(ImageError, match=r"^truncated"):
    read_image(data[: int(len(data) * part)])


@pytest.mark.parametrize(
  ("data", "reason"),
  [
    (b"", "empty file"),
    (np.random.default_rng(0).bytes(5000), "not an image"),
    (b"A text, named x.jpg.\n" * 50, "not an image"),
    (b"PK\x03\x04" + bytes(100), "not an image"),
    (b"<!DOCTYPE html><html><body>404</body></html>", "not an image"),
    (b"RIFF\x24\0\0\0WAVEfmt " + bytes(30), "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image"),  # Pillow would call Ghostscript.
    (b"BMW is a maker of cars.", "truncated, damaged or of an unknown kind"),
    (b"\xff\xd8\xff" + bytes(100), "truncated, damaged or of an unknown kind"),
  ],
  ids=["empty", "random", "text", "zip", "html", "wave", "eps", "like a BMP", "like a JPEG"],
)
def test_what_is_no_image_says_so(data, reason, tmp_path):
  path = tmp_path / "x.jpg"
  path.write_bytes(data)
  for source in (data, path):
    with pytest.raises(ImageError, match=rf"^{reason}"):
      read_image(source)


def test_files_out_of_reach_are_named(tmp_path, monkeypatch):
  with pytest.raises(ImageError, match=r"^no such file or directory$"):
    read_image(tmp_path / "missing.png")
  with pytest.raises(ImageError, match=r"^is a directory$"):
    read_image(tmp_path)

  def forbidden(path, mode):
    raise PermissionError(13, "Permission denied", path)

  monkeypatch.setattr(image_module, "open", forbidden, raising=False)  # root may read all real files
  with pytest.raises(ImageError, match=r"^permission denied$"):
    read_image(tmp_path / "secret.png")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no named pipes")
def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "x.png")
  with pytest.raises(ImageError, match=r"^not a file$"):
    read_image(tmp_path / "x.png")


def test_what_is_neither_path_nor_bytes_is_a_type_error():
  with pytest.raises(TypeError):
    read_image(None)


def test_a_path_and_its_bytes_read_the_same(tmp_path):
  path = tmp_path / "no ending é #"
  path.write_bytes(encode(blocks(), "TIFF", compression="tiff_lzw"))
  for source in (path, str(path), path.read_bytes()):
    np.testing.assert_array_equal(read_image(source), blocks())


SAMPLES = {
  **{form: encode(blocks(16, 24), form) for form in FORMATS},
  "turned": turned(blocks(16, 24), "JPEG", 6),
  "palette": encode(PIL.Image.fromarray(blocks(16, 24)).quantize(16), "PNG", transparency=b"\0\x80"),
  "animation": encode(blocks(16, 24), "PNG", save_all=True, append_images=[PIL.Image.fromarray(blocks(16, 24)[::-1])]),
  "pages": encode(blocks(16, 24)[..., 0], "TIFF", save_all=True, append_images=[PIL.Image.new("L", (24, 16), 7)]),
  "float": encode(blocks(16, 24)[..., 0].astype(np.float32), "TIFF", compression="tiff_lzw"),
  "CMYK": cmyk_jpeg((10, 20, 30, 40)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_damaged_bytes_give_an_image_or_an_image_error(name):
  rng = np.random.default_rng(0)
  failed = 0
  for trial in range(60):
    data = bytearray(SAMPLES[name])
    for _ in range(rng.integers(1, 6)):
      data[rng.integers((60, 200, len(data))[trial % 3] % (len(data) + 1))] = rng.integers(256)
    channels = (3, 1, 2)[trial % 3]
    try:
      got = read_image(bytes(data[: rng.integers(len(data))] if trial % 5 == 0 else data), channels)
      assert got.dtype == np.uint8 and got.shape[2:] == (channels,)
    except ImageError as error:
      failed += 1
      assert str(error).strip() and len(str(error).splitlines()) == 1
  assert failed


# Numbers of channels.


def pages(*pages, **options):
  first, *rest = (PIL.Image.fromarray(page) for page in pages)
  return encode(first, "TIFF", save_all=True, append_images=rest, **options)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
@pytest.mark.parametrize("n", [2, 4, 5])
def test_the_pages_of_a_grey_tiff_are_channels(n, dtype):
  values = np.random.default_rng(0).integers(0, 256, (n, 3, 4))
  values[0, 0, 0] = 255
  data = pages(*(values * 257 if dtype == np.uint16 else values).astype(dtype))
  np.testing.assert_array_equal(read_image(data, n), values.transpose(1, 2, 0))
  np.testing.assert_array_equal(read_image(data, 1)[..., 0], read_image(pages(values[0].astype(np.uint8)), 1)[..., 0])


@pytest.mark.parametrize("orientation", [3, 6])
def test_pages_are_turned(orientation):
  values = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
  data = pages(*values, tiffinfo={274: orientation})
  expected = scene(values.transpose(1, 2, 0), orientation)
  np.testing.assert_array_equal(read_image(data, 2), expected)


@pytest.mark.parametrize(
  ("mode", "form"),
  [("LA", "PNG"), ("LA", "TIFF"), ("RGBA", "PNG"), ("RGBA", "WEBP"), ("RGBA", "TIFF"), ("CMYK", "TIFF")],
)
def test_channels_beyond_colour_are_taken_as_they_are(mode, form):
  n = len(mode)
  values = np.random.default_rng(0).integers(0, 256, (3, 4, n), np.uint8)
  data = encode(PIL.Image.frombytes(mode, (4, 3), values.tobytes()), form)
  np.testing.assert_array_equal(read_image(data, n), values)


@pytest.mark.parametrize(
  ("data", "held", "asked"),
  [
    (encode(blocks(4, 4), "PNG"), 3, 4),
    (encode(blocks(4, 4), "JPEG"), 3, 2),
    (encode(np.zeros((4, 4, 4), np.uint8), "PNG"), 4, 5),
    (encode(np.zeros((4, 4), np.uint8), "PNG"), 1, 2),
    (encode(PIL.Image.new("P", (4, 4)), "PNG"), 1, 4),
    (encode(np.zeros((4, 4), np.uint8), "PNG", save_all=True, append_images=[PIL.Image.new("L", (4, 4), 9)]), 1, 2),
    (pages(*np.zeros((3, 4, 4), np.uint8)), 3, 2),
    (pages(*np.zeros((2, 4, 4), np.uint8)), 2, 0),
  ],
)
def test_another_number_of_channels_is_an_error_that_names_both(data, held, asked):
  with pytest.raises(ImageError, match=rf"^{held} channels, not {asked}$"):
    read_image(data, asked)


@pytest.mark.parametrize(
  "second", [np.zeros((4, 5), np.uint8), np.zeros((4, 4), np.uint16), np.zeros((4, 4, 3), np.uint8)]
)
def test_pages_that_differ_are_no_channels(second):
  with pytest.raises(ImageError, match=r"^page 2 is"):
    read_image(pages(np.zeros((4, 4), np.uint8), second), 2)


# No warnings, no shared state.


def exif_with_a_bad_entry():
  """An orientation, and a text of 100 bytes that lie nowhere."""
  entries = struct.pack("<2H2I", 274, 3, 1, 6) + struct.pack("<2H2I", 271, 2, 100, 5000)
  return b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)


def bad_tiff():
  data = encode(blocks(), "TIFF", tiffinfo={305: "a name of a program"})
  return patch(data, tiff_entry(data, 305) + 4, struct.pack("<I", 2**30))


def bad_animation():
  rows = [row.tobytes() for row in blocks()]
  return png(rows, 8, 8, 2, (b"acTL", struct.pack(">2I", 0, 0)))


WARNED = {
  "EXIF": encode(scene(blocks(), 8), "PNG", exif=exif_with_a_bad_entry()),
  "JPEG": encode(np.full((6, 8), 200, np.uint8), "JPEG", exif=exif_with_a_bad_entry()),
  "TIFF": bad_tiff(),
  "APNG": bad_animation(),
}


@pytest.mark.parametrize("action", ["error", "always"])
@pytest.mark.parametrize("name", WARNED)
def test_what_pillow_warns_of_is_read_without_a_warning(name, action):
  data = WARNED[name]
  with pytest.warns(UserWarning), PIL.Image.open(io.BytesIO(data)) as stored:
    stored.getexif()
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter(action)
    got = read_image(data)
  assert not caught
  expected = np.full((8, 6, 3), 200) if name == "JPEG" else blocks()
  np.testing.assert_array_equal(got, expected)  # the orientation of the EXIF data is still found


def test_only_the_reading_thread_is_muted():
  done = threading.Event()

  def read():
    while not done.is_set():
      read_image(WARNED["TIFF"])

  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    readers = [pool.submit(read) for _ in range(2)]
    try:
      for _ in range(200):
        with pytest.raises(UserWarning, match="mine"):
          warnings.warn("mine", stacklevel=1)
    finally:
      done.set()
    for reader in readers:
      reader.result()
  read_image(WARNED["TIFF"])
  with pytest.raises(UserWarning, match="mine"):
    warnings.warn("mine", stacklevel=1)


def outcome(source):
  try:
    return read_image(source).tobytes()
  except ImageError as error:
    return str(error)


def test_threads_read_what_one_thread_reads():
  sources = [*SAMPLES.values(), *WARNED.values(), b"", b"text", grown("GIF", 20000, 9500), grown("PNG", 60000, 60000)]
  sources += [data[: len(data) // 2] for data in SAMPLES.values()] + [pathlib.Path("/missing")]
  serial = [outcome(source) for source in sources]
  assert {type(o) for o in serial} == {bytes, str}
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(outcome, 10 * sources)) == 10 * serial


def test_pillow_is_left_as_it_was(monkeypatch):
  monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 123_456_789)
  monkeypatch.setattr(PIL.ImageFile, "LOAD_TRUNCATED_IMAGES", False)

  def state():
    return (
      PIL.Image.MAX_IMAGE_PIXELS,
      PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
      PIL.TiffImagePlugin.READ_LIBTIFF,
      PIL.Image.ID.copy(),
      PIL.Image.OPEN.copy(),
    )

  before = state()
  for source in [*SAMPLES.values(), *WARNED.values(), grown("GIF", 20000, 9500), SAMPLES["JPEG"][:300]]:
    outcome(source)
  assert state() == before
