"""How much of a batch is encoded at once: as much as the device's memory holds, by the compiled step's own estimate."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import psutil
from jax.sharding import Mesh

from ssl_jax.decide import Decision

SHARE = 0.85  # of the memory: evaluation and the batches that wait have to fit too


def memory_of(mesh: Mesh) -> int | None:
  """Bytes that a run may use on each device: the allocator's limit, or a CPU device's part of the host's; else None."""
  device = next(device for device in mesh.devices.flat if device.process_index == jax.process_index())
  if device.platform == "cpu":
    limits = [psutil.virtual_memory().total]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
      text = pathlib.Path(file).read_text().strip() if pathlib.Path(file).is_file() else ""
      limits += [int(text)] if text.isdecimal() else []
    return min(limits) // jax.local_device_count()
  return (device.memory_stats() or {}).get("bytes_limit")


def step_bytes(compiled: Any) -> int:
  """Bytes that a compiled step needs on each device: what goes in and comes out, and what it holds meanwhile."""
  sizes = compiled.memory_analysis()
  held = sizes.argument_size_in_bytes + sizes.output_size_in_bytes - sizes.alias_size_in_bytes
  return held + sizes.temp_size_in_bytes


def search(
  compile_with: Callable[[int | None], tuple[Any, Any]], batch_size: int, unit: int, memory: int | None
) -> tuple[Any, Decision]:
  """Halves the microbatch until the step fits.

  Args:
    compile_with: microbatch -> (anything, the compiled step).
    batch_size: global.
    unit: what a microbatch must be a multiple of: the images that batch norm normalises together, on all devices.
    memory: of each device; None: not known, and the whole batch is taken.

  Returns:
    (what `compile_with` returned for the microbatch, the decision).
  """
  tried = None
  while True:
    made = compile_with(tried)
    needed = step_bytes(made[1])
    half = (tried or batch_size) // 2
    fits = memory is None or needed <= SHARE * memory
    if fits or half % unit or batch_size % half or not half:
      break
    tried = half
  of = "a memory that is not known" if memory is None else f"the device's {_in_words(memory)}"
  taken = f"{_in_words(needed)} of {of}"
  if not fits:
    reason = f"no fewer than {tried or batch_size} images are possible and take {taken}: give smaller views"
  elif tried is None:
    reason = f"the whole batch at once takes {taken}"
  else:
    reason = f"{tried} images at once take {taken}, twice as many do not fit"
  return made, Decision("microbatch", tried, reason)


def _in_words(count):
  return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"
