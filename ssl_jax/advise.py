"""What a recipe should be told about the images and the device that it was given, each with the key to change."""

from typing import Any

from ssl_jax.data.look import DataFacts
from ssl_jax.decide import DeviceFacts

CORE_RATE = 10e9  # FLOP/s of a core of a CPU, as measured of training steps; of an accelerator a third of its peak
SLOW = 60  # seconds a step
LONG = 2.5  # how many times as long as high images are, for squares to be told


def on_data(config: Any, data: DataFacts) -> list[str]:
  """Lines on how a recipe suits a folder of images."""
  lines, looked = [], len(data.sizes)
  size, channels = max(view["size"] for view in config.views), config.data.channels
  lines += [f"{line}; --config.data.channels=3 keeps them" for line in on_colours(channels, data.coloured, looked)]
  if sum(min(shape) < size for shape in data.sizes) > looked / 2:
    sizes = f"the shorter side of most images is {data.short}"
    lines.append(f"views[0].size={size}: {sizes}, so that views are enlarged; smaller ones cost less")
  if data.channels == 1:
    if channels == 3:
      lines.append("data.channels=3: all images looked at are grey; --config.data.channels=1 costs less")
    ineffective = [
      f"views[{i}].{key}"
      for i, view in enumerate(config.views)
      for key in ("gray_p", "jitter")
      if (view.get("gray_p") if key == "gray_p" else any(view.get("jitter", ())[2:]))
    ]
    if ineffective:
      what = "grey conversion, saturation and hue change nothing"
      lines.append(f"{', '.join(ineffective)}: {what} of grey images; brightness and contrast do")
  return lines


def on_colours(channels: int, coloured: int, looked: int) -> list[str]:
  """A line where images lose their colours: `coloured` of the `looked` that were looked at."""
  if channels != 1 or not coloured:
    return []
  return [f"data.channels=1: {coloured:,} of {looked:,} images looked at have colours, which become grey"]


def on_images(config: Any, data: DataFacts) -> list[str]:
  """Lines on what the images themselves are like, for any recipe."""
  lines = []
  if data.channels == 1 and any(view.get("flip", 0.5) for view in config.views):
    lines.append("views[0].flip: grey images are often text, digits or scans: 0 where a mirror image means another")
  aspect = data.aspect if data.aspect >= 1 else 1 / data.aspect
  if aspect > LONG:
    shape = "wide as high" if data.aspect > 1 else "high as wide"
    lines.append(f"views are square, and most images are {aspect:.1f} times as {shape}: cut them into squares before")
  return lines


def on_recipe(config: Any) -> list[str]:
  """A line where a folder is given to a recipe for the built-in images, unless weights are adapted to the folder."""
  if (
    config.data.get("folder")
    and not config.init_from
    and config.data.name.startswith("fashion_mnist")
    and config.data.channels == 1
  ):
    return ["this recipe is for the built-in Fashion-MNIST; for a folder: --config=configs/own_images.py"]
  return []


def on_device(config: Any, flops: int, device: DeviceFacts, cores: int, peak: float | None) -> list[str]:
  """A line where a step will take minutes.

  Args:
    config: the recipe.
    flops: of a step, on all devices.
    device: what computes.
    cores: of a CPU, that this process may use.
    peak: FLOP/s of all devices, where it is known.
  """
  if device.kind == "cpu":
    rate, of = cores * CORE_RATE, f"{cores} core{'s' if cores > 1 else ''} at {CORE_RATE / 1e9:g} GFLOP/s each"
  elif peak:
    rate, of = peak / 3, "a third of the devices' peak"
  else:
    return []
  seconds = flops / rate
  if seconds < SLOW:
    return []
  batch = f"batch_size={config.batch_size}"
  much = f"a step is {flops / 1e12:.3g} TFLOP, about {seconds / 60:.1f} minutes on {of}"
  return [f"{batch}: {much}; --config.batch_size, smaller views or --config=configs/own_images.py make it shorter"]
