"""What the benchmarks share: who is measured on what, sides that take turns, memory in a process of their own."""

import argparse
import concurrent.futures
import ctypes
import gc
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import runpy
import statistics
import sys
import time

PACKAGES = ("jax", "jaxlib", "optax", "torch", "torchvision", "lightly", "timm", "numpy", "pillow", "grain")
MIB = 2**20


IMAGENET = 1_281_167  # training images, for the recipes' schedules


def load_recipe(name: str):
  """The config of a recipe: "dino_imagenet", or "mae_imagenet:large" for a version of it."""
  file, _, version = name.partition(":")
  path = pathlib.Path(__file__).parents[1] / "configs" / f"{file}.py"
  return runpy.run_path(str(path))["get_config"](*([version] if version else []))


def arguments(doc: str) -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--json", help="file for the numbers")
  return parser


def cores() -> int:
  """How many this process may use; `taskset -c 0 python ...` leaves one."""
  return len(os.sched_getaffinity(0))


def machine() -> str:
  cpuinfo = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
  names = [line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name")]
  flags = next((line.split() for line in cpuinfo if line.startswith("flags")), [])
  vectors = next((name for name, flag in (("AVX-512", "avx512f"), ("AVX2", "avx2")) if flag in flags), "no AVX2")
  return f"{names[0] if names else platform.machine()} ({vectors}), {cores()} of {os.cpu_count()} cores"


def versions() -> dict[str, str]:
  """Of what is imported by now, and Python's."""
  imported = [name for name in PACKAGES if {"pillow": "PIL"}.get(name, name) in sys.modules]
  return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in imported}


def introduce() -> None:
  """Prints the machine and the versions. PyTorch gets as many threads as XLA: the cores of this process."""
  if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(cores())
  print(machine())
  print(", ".join(f"{name} {version}" for name, version in versions().items()), flush=True)


def write_json(args: argparse.Namespace, rows: list[dict]) -> None:
  if args.json:
    report = dict(machine=machine(), versions=versions(), arguments=vars(args), rows=rows)
    pathlib.Path(args.json).write_text(json.dumps(report, indent=2) + "\n")


def take_turns(sides: dict, repeats: int, warm: int = 1) -> dict[str, float]:
  """Median CPU seconds of each function, which does all of its work before it returns; `warm` calls do not count.

  CPU time, not the clock's: it is nearly that of a quiet machine where other work takes its turns.
  """
  taken: dict[str, list[float]] = {name: [] for name in sides}
  for i in range(warm + repeats):
    for name, call in sides.items():
      start = time.process_time()
      call()
      if i >= warm:
        taken[name].append(time.process_time() - start)
  return {name: statistics.median(seconds) for name, seconds in taken.items()}


def alone(make, warm: tuple, real: tuple) -> tuple[float, float]:
  """(CPU seconds, MiB by which memory grows at most) of `make(*real)()` in a fresh process.

  `make` builds inputs and may compile, which does not count; `make(*warm)()` runs first, a small problem that loads
  libraries.
  """
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(_alone_here, make, warm, real).result()


def _alone_here(make, warm, real):
  if "torch" in sys.modules:
    sys.modules["torch"].set_num_threads(cores())
  make(*warm)()
  call = make(*real)
  gc.collect()
  ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory of the compiler would be used again, unseen
  pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
  before, start = _status("VmRSS"), time.process_time()
  result = call()
  seconds, peak = time.process_time() - start, _status("VmHWM")
  del result
  return seconds, (peak - before) / 1024


def _status(name):
  lines = pathlib.Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith(name))
