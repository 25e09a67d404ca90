"""Images of more than 8 bits, of many bands, with long texts, and of many pixels."""

import io
import json
import os
import pathlib
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib

import numpy as np
import PIL.Image
import pytest
import tifffile
from test_train import folder_config

from runs import ROOT
from ssl_jax import build, data
from ssl_jax.augment import EvaluationView, View
from ssl_jax.commands import check, duplicates, prepare
from ssl_jax.data import folder, image, look, stream, turns
from ssl_jax.data.image import ImageError, read_image, value_range
from ssl_jax.errors import UserError
from ssl_jax.run import messages
from ssl_jax.run import workdir as workdirs


def save(path, values, **options):
  """Saves an array by its type: PNG where one holds it, TIFF or NPY as the name says."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if path.suffix == ".npy":
    np.save(path, values)
  elif path.suffix == ".tif":
    tifffile.imwrite(path, values, **options)
  else:
    PIL.Image.fromarray(values).save(path)


def ramp(low, high, dtype, shape=(16, 24)):
  return np.linspace(low, high, np.prod(shape)).reshape(shape).astype(dtype)


@pytest.mark.parametrize(
  "name, low, high, dtype",
  [
    ("x.png", 0, 4095, np.uint16),  # 12 bits in 16: 16 grey levels by the high byte
    ("x.tif", -1024, 3071, np.int16),  # tomography: 12 levels of its high byte, all of them dark
    ("x.tif", 0.0, 1.2, np.float32),
    ("x.npy", -3.0, 5.0, np.float64),
    ("x.npy", 0, 70_000, np.int32),
  ],
)
def test_wide_values_are_read_through_one_window_of_the_data_set(tmp_path, name, low, high, dtype):
  middle = low + (high - low) / 2
  for split in ("train", "val"):
    for i in range(4):
      save(tmp_path / split / "a" / f"{i}{name}", ramp(low, high if i % 2 else middle, dtype))
  (tmp_path / "val" / "a" / f"1{name}").unlink()  # the test images end elsewhere, and get no window of their own
  (tmp_path / "val" / "a" / f"3{name}").unlink()
  config = folder_config(tmp_path, **{"data.channels": 1, "batch_size": 4, "data.test_split": "val"})
  run = build.run(config)
  np.testing.assert_allclose(run.train_set.window, (low, high), rtol=1e-6)
  assert run.test_set.window == run.train_set.window == tuple(run.resolved()["window"])
  whole, half = run.train_set.original(1), run.train_set.original(0)
  assert len(np.unique(whole)) == 256 and whole.min() == 0 and whole.max() == 255
  assert half.max() in (127, 128) and np.array_equal(half, run.test_set.original(0))
  assert any(f"values from {low:g} to {high:g} are read as 0 to 255 (measured on" in x for x in messages.describe(run))
  config.data.window = (low, middle)
  given = build.dataset(config, "train")
  assert given.original(0).max() == 255 == given.original(1).max() and len(np.unique(given.original(0))) == 256
  assert given.notes == (f"values from {low:g} to {middle:g} are read as 0 to 255",)


def test_the_window_is_kept_in_the_workdir(tmp_path):
  for i in range(8):
    save(tmp_path / "data" / "train" / "a" / f"{i}.png", ramp(0, 4095, np.uint16))
  config = folder_config(tmp_path / "data", **{"data.channels": 1, "batch_size": 8, "steps": 4})
  run = build.run(config)
  workdirs.write_start(run, tmp_path)
  assert json.loads((tmp_path / "resolved.json").read_text())["window"] == [0, 4095]
  (tmp_path / "checkpoints" / "1").mkdir(parents=True)
  workdirs.check_resumable(run, tmp_path)
  old = json.loads((tmp_path / "resolved.json").read_text())
  del old["window"]  # by a version that read the high byte
  (tmp_path / "resolved.json").write_text(json.dumps(old))
  with pytest.raises(UserError, match=r"window: None then, now \[0\.0, 4095\.0\]"):
    workdirs.check_resumable(run, tmp_path)


def test_eight_bits_need_no_window(tmp_path):
  for i, mode in enumerate(("L", "RGB", "RGBA", "P", "1", "LA")):
    PIL.Image.new(mode, (5, 5)).save(tmp_path / f"{i}.png")
  np.save(tmp_path / "6.npy", np.zeros((5, 5), np.uint8))
  assert data.load_folder(tmp_path, "train").window is None
  given = data.load_folder(tmp_path, "train", window=(10, 20))
  assert given.notes == ("data.window changes nothing: it is for values of more than 8 bits",)
  with pytest.raises(UserError, match=r"data\.window must be two numbers, low < high, or none, got \(5, 5\)"):
    build.run(folder_config(tmp_path, **{"data.window": (5, 5)}))


@pytest.mark.parametrize("layout", ["contig", "separate"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
@pytest.mark.parametrize("bands", [2, 4, 5, 13])
def test_bands_of_a_tiff_are_channels_in_any_layout(tmp_path, bands, dtype, layout):
  values = np.random.default_rng(0).integers(0, 256, (6, 7, bands)).astype(dtype)
  stored = values if layout == "contig" else np.moveaxis(values, -1, 0)
  options = dict(planarconfig=layout, photometric="minisblack", compression="zlib")
  save(tmp_path / "x.tif", stored, **options)
  np.testing.assert_array_equal(read_image(tmp_path / "x.tif", bands, (0, 255)), values)
  assert value_range(tmp_path / "x.tif") == (None if dtype == np.uint8 else (values.min(), values.max()))
  with pytest.raises(ImageError, match=f"^{bands} channels, not 3$"):
    read_image(tmp_path / "x.tif")


def test_16_bit_colours_of_a_tiff_keep_what_the_window_leaves(tmp_path):
  values = ramp(0, 4095, np.uint16, (16, 8, 3))
  save(tmp_path / "x.tif", values, photometric="rgb")
  np.testing.assert_array_equal(read_image(tmp_path / "x.tif", 3, (0, 4095)), np.rint(values / 4095 * 255))
  np.testing.assert_array_equal(read_image(tmp_path / "x.tif"), values >> 8)
  assert read_image(tmp_path / "x.tif", 1, (0, 4095)).shape == (16, 8, 1)


def test_a_compression_that_needs_another_package_is_told(tmp_path):
  save(tmp_path / "x.tif", np.zeros((4, 4, 5), np.uint8), photometric="minisblack", planarconfig="contig")
  content = (tmp_path / "x.tif").read_bytes()
  uncompressed, lzw = (struct.pack("<HHIH", 259, 3, 1, kind) for kind in (1, 5))
  assert content.count(uncompressed) == 1
  (tmp_path / "x.tif").write_bytes(content.replace(uncompressed, lzw))
  code = """
import sys
sys.modules["imagecodecs"] = None  # as where it is not installed
sys.path.insert(0, sys.argv[1])
from ssl_jax.data import image
try:
  image.read_image(sys.argv[2], 5)
except image.ImageError as error:
  print(error)
"""
  command = [sys.executable, "-c", code, pathlib.Path(image.__file__).parents[2], tmp_path / "x.tif"]
  told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
  assert told.startswith("its compression needs one more package: pip install imagecodecs")


@pytest.mark.parametrize("dtype, window", [(np.uint8, None), (np.uint16, (0, 65535)), (np.float32, None)])
@pytest.mark.parametrize("shape", [(5, 6), (5, 6, 1), (5, 6, 3), (5, 6, 7)])
def test_arrays_are_images(tmp_path, shape, dtype, window):
  values = np.random.default_rng(0).integers(0, 256, shape)
  full = {np.uint8: values, np.uint16: values * 257, np.float32: values / 255}[dtype].astype(dtype)
  np.save(tmp_path / "x.npy", full)
  channels = shape[2] if len(shape) == 3 else 1
  got = read_image(tmp_path / "x.npy", channels, window)
  np.testing.assert_array_equal(got, values.reshape(5, 6, channels))
  if channels == 1:
    np.testing.assert_array_equal(read_image(tmp_path / "x.npy", 3, window), got.repeat(3, -1))
  assert len(data.load_folder(tmp_path, "train", channels=channels, window=window)) == 1


@pytest.mark.parametrize(
  "values, told",
  [
    (
      np.zeros((2, 3, 4, 5)),
      r"must be \[height, width\] or \[height, width, channels\] of numbers, got float64 \(2, 3",
    ),
    (np.zeros(3), "of numbers"),
    (np.zeros((2, 0)), "of numbers"),
    (np.array([["a", "b"]]), "of numbers"),
    (np.array([[{}, {}]]), "of numbers"),
    (np.full((2, 2), np.nan), "NaN"),
    (np.zeros((2, 2, 4)), "4 channels, not 3"),
  ],
)
def test_arrays_that_are_no_images_say_so(values, told):
  file = io.BytesIO()
  np.save(file, values)
  with pytest.raises(ImageError, match=told):
    read_image(file.getvalue())
  with pytest.raises(ImageError):
    read_image(file.getvalue()[:-1])


def test_an_array_whose_header_names_a_huge_size_is_refused():
  file = io.BytesIO()
  np.lib.format.write_array_header_1_0(file, dict(descr="<f8", fortran_order=False, shape=(30000, 9000)))
  with pytest.raises(ImageError, match="too large: 9000x30000 pixels of 8 bytes each, at most 60000000"):
    read_image(file.getvalue())


def chunk(name, content):
  return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


@pytest.mark.parametrize(
  "long",
  [
    chunk(b"tEXt", b"Comment\0" + bytes(2 << 20)),
    chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80 << 20))),
    chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(2 << 20))),
    chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3 << 20))),
    100 * chunk(b"tEXt", b"Comment\0" + 700_000 * b"x"),
  ],
)
def test_a_png_is_read_whatever_texts_and_profiles_it_carries(long):
  file, pixels = io.BytesIO(), np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
  PIL.Image.fromarray(pixels).save(file, "PNG")
  content = file.getvalue()
  with_it = content[:33] + long + content[33:]  # behind the header
  np.testing.assert_array_equal(read_image(with_it), pixels)
  at = content.index(b"IEND") - 4
  np.testing.assert_array_equal(read_image(content[:at] + long + content[at:]), pixels)
  with pytest.raises(ImageError, match="truncated, damaged"):
    read_image(with_it[: len(with_it) - 60])


def test_check_tells_the_window_and_images_of_few_levels(tmp_path, capsys):
  save(tmp_path / "a.png", ramp(0, 4095, np.uint16))
  save(tmp_path / "b.png", ramp(0, 300, np.uint16))
  assert check.main([str(tmp_path), "--channels=1"]) == 0
  out = capsys.readouterr().out
  assert "values from 0 to 4095 are read as 0 to 255" in out
  assert "1 with fewer than 32 levels, such as b.png; a narrower data.window" in out
  assert "mean (0.2" in out


def test_a_prepared_set_keeps_what_it_can_and_names_what_it_cannot(tmp_path, capsys):
  root = tmp_path / "root" / "a"
  save(root / "0.png", ramp(0, 4095, np.uint16))
  save(root / "1.tif", np.zeros((5, 8, 8), np.uint8), photometric="minisblack")  # five pages
  save(root / "2.tif", np.zeros((8, 8, 5), np.uint8), photometric="minisblack", planarconfig="contig")
  save(root / "3.tif", ramp(0, 4095, np.uint16))
  save(root / "4.npy", np.zeros((8, 8), np.uint8))
  assert prepare.main(["folder", str(root.parent), f"--data_dir={tmp_path}", "--name=mine"]) == 0
  assert "2 images" in capsys.readouterr().out
  assert (tmp_path / "mine" / "1.0.0" / "skipped.txt").read_text() == (
    "a/1.tif\t5 pages, of which one would be kept: train on the folder itself\n"
    "a/2.tif\t5 channels, not 3: train on the folder itself, with --config.data.channels\n"
    "a/3.tif\tmore than 8 bits, which would be lost: save it as a 16-bit PNG, or train on the folder itself\n"
  )
  images = data.load("mine", "train", data_dir=tmp_path, channels=1)
  assert images.window == (0, 4095) and len(np.unique(images.original(0))) == 256


# Memory.


def test_images_in_flight_take_turns_whatever_the_threads(monkeypatch):
  monkeypatch.setattr(image, "MAX_PIXELS", 2 * 30)  # two of them
  file = io.BytesIO()
  PIL.Image.new("L", (5, 6)).save(file, "PNG")
  inside, most, lock = [0], [0], threading.Lock()

  def work():
    for _ in range(10):
      with turns.taking_turns():
        read_image(file.getvalue())
        read_image(file.getvalue())  # in place of the first
        with lock:
          inside[0] += 1
          most[0] = max(most[0], inside[0])
        time.sleep(0.001)
        with lock:
          inside[0] -= 1

  threads = [threading.Thread(target=work, daemon=True) for _ in range(6)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(timeout=60)
  assert most[0] == 2 and turns._in_flight == [0]
  with turns.taking_turns():
    turns.take(3, 2)  # alone, one that is larger than all the room there is still passes
  read_image(file.getvalue())  # outside nobody waits
  assert turns._in_flight == [0]


def test_what_is_read_one_by_one_takes_turns_until_it_is_cropped(tmp_path, monkeypatch):
  for i in range(2):
    PIL.Image.new("RGB", (20, 16 + i)).save(tmp_path / f"{i}.png")
  seen, cut, crop = [], stream.cut_views, stream.centre_crop
  monkeypatch.setattr(stream, "cut_views", lambda *given: seen.append(turns._in_flight[0]) or cut(*given))
  monkeypatch.setattr(stream, "centre_crop", lambda *given: seen.append(turns._in_flight[0]) or crop(*given))
  images = data.load_folder(tmp_path, "train", reading=data.Reading(threads=0))
  images.example(0, (View(size=8),), (0, 0, 0))
  next(iter(images.in_order(EvaluationView(resize=8, size=8), 2)))
  assert seen == [7 * 20 * 16, 7 * 20 * 16, 7 * 20 * 17] and turns._in_flight == [0]


def test_only_small_images_are_held_in_memory(tmp_path):
  for i in range(2):
    PIL.Image.new("RGB", (256, 256), (i, 0, 0)).save(tmp_path / f"{i}.png")
  assert "streamed" not in data.load_folder(tmp_path, "train").kind
  for i in range(2):
    PIL.Image.new("RGB", (257, 256), (i, 0, 0)).save(tmp_path / f"{i}.png")
  assert "streamed" in data.load_folder(tmp_path, "train").kind
  assert "streamed" not in data.load_folder(tmp_path, "train", channels=1).kind


@pytest.mark.parametrize("what", ["look", "check", "altered"])
def test_no_copies_of_a_large_image_are_made(tmp_path, what):
  rng = np.random.default_rng(0)
  small = PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8))
  small.resize((3000, 2000)).save(tmp_path / "0.jpg", quality=30)
  files = folder.files_of(tmp_path, "train")
  pixels = files.read(0)
  act = {
    "look": lambda: look.look_at_files(files),
    "check": lambda: check.examine(files, 0),
    "altered": lambda: duplicates.altered(pixels, np.random.default_rng(1)),
  }[what]
  tracemalloc.start()
  found = act()
  peak = tracemalloc.get_traced_memory()[1]
  tracemalloc.stop()
  assert peak < 6 * pixels.nbytes  # what decoding needs
  if what == "look":
    np.testing.assert_allclose(found.mean, pixels.mean(axis=(0, 1)) / 255, atol=1e-4)
    np.testing.assert_allclose(found.std, pixels.std(axis=(0, 1)) / 255, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 700_000, 2), (1000, 1100, 1)])
def test_levels_are_counted_over_all_rows(shape):
  pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  want = [np.count_nonzero(pixels == level, axis=(0, 1)) for level in (0, 7, 255)]
  np.testing.assert_array_equal(look.levels(pixels)[:, [0, 7, 255]].T, want)
  assert look.levels(pixels).sum() == pixels.size


READING = """
from ssl_jax import data
from ssl_jax.augment import View
images = data.load_folder(folder, "train", reading=data.Reading(threads=4)).tried()
for _ in images.batches(2 * (View(size=28),), batch_size=copies, seed=0, start=0, stop=1):
  pass
"""
TRAINING = """
import pathlib
import train
sys.path[:0] = ["tests", "tests/golden"]
from test_train import folder_config
settings = {"report": True, "data.threads": 4, "data.test_split": "", "lr.warmup_epochs": 0.0}
config = folder_config(folder, batch_size=copies, steps=2, **settings)
assert train.main(config, pathlib.Path(folder) / "run") == 0
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize(
  "code, copies, beside, most",
  [
    pytest.param(READING, 3, False, 1.4e9, marks=pytest.mark.slow),
    pytest.param(TRAINING, 4, False, 1.7e9, marks=pytest.mark.slow),
    pytest.param(TRAINING, 128, False, 1.7e9, marks=pytest.mark.slow),
    pytest.param(TRAINING, 6, True, 1.7e9, marks=pytest.mark.slow),
  ],
  ids=["reading", "training", "training on the quickstart's batch", "training on one beside small ones"],
)
def test_photographs_of_120_megapixels_need_bounded_memory(tmp_path, cache, code, copies, beside, most):
  small = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (100, 120, 3), np.uint8))
  small.resize((12_000, 10_000)).save(tmp_path / "0.jpg", quality=30)
  for i in range(1, copies):
    if beside:
      small.save(tmp_path / f"{i}.png")
    else:
      os.link(tmp_path / "0.jpg", tmp_path / f"{i}.jpg")
  peak = 'print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])'
  code = f"import sys\nfolder, copies = sys.argv[1], int(sys.argv[2])\n{code}\n{peak}"
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(cache), "XLA_FLAGS": ""}
  command = [sys.executable, "-c", code, tmp_path, str(copies)]
  done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
  assert done.returncode == 0, done.stderr
  assert int(done.stdout.split()[-1]) * 1024 < most
