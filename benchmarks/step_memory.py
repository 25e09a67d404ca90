"""The memory that a compiled step says it needs, beside what it takes: the rule by which a microbatch is found.

  python benchmarks/step_memory.py [--batch=64] [--size=64] [--microbatch=16]

Trains own_images' default recipe on made-up images for three steps, one process for each case. On a CPU the peak is
the most that the process held while it trained, less what it held before the first step; on other devices it is the
allocator's.
"""

import argparse
import pathlib
import resource
import runpy
import subprocess
import sys

import numpy as np

ROOT = pathlib.Path(__file__).parents[1]


def measure(version, batch, size, microbatch):
  import jax

  from ssl_jax import build, decide, fit, parallel
  from ssl_jax.data.look import DataFacts

  config = runpy.run_path(str(ROOT / "configs" / "own_images.py"))["get_config"](version)
  config.batch_size = batch
  for view in config.views:
    view["size"] = size if view["scale"] == "auto" or view["scale"][1] == 1 else size // 2
  mesh = parallel.make_mesh()
  device = mesh.devices.flat[0]
  facts = DataFacts(10_000, ((size, size),), 3, 1, (0.5,) * 3, (0.25,) * 3)
  config, _ = decide.decide(facts, decide.DeviceFacts(device.platform, mesh.size), config)
  config.microbatch = microbatch
  made = build.program(config, mesh, 100, 10)
  images = {"image": np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), images)
  compiled = made.train_step.trace(made.state, parallel.abstract(shapes, parallel.split(mesh))).lower().compile()
  estimate = fit.step_bytes(compiled)
  state = made.init()
  jax.block_until_ready(state)
  held = _resident()
  state_bytes = parallel.bytes_a_device(made.state)
  for _ in range(3):
    state, row = compiled(state, parallel.put_batch(mesh, images))
    jax.block_until_ready(row)
  if device.platform == "cpu":
    # The state is there before the first step; the most that the process ever held is the peak of the steps.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held + state_bytes
  else:
    peak = device.memory_stats()["peak_bytes_in_use"]
  chunk = microbatch or batch
  text = f"{version:<9} batch {batch}, {chunk} at once, views of {size}"
  print(f"{text}: estimated {estimate / 2**20:,.0f} MiB, peak {peak / 2**20:,.0f} MiB, {estimate / peak:.2f} of it")


def _resident():
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  # Compiling may have taken more than the steps will: the high-water mark starts anew.
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return pages * resource.getpagesize()


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--batch", type=int, default=64)
  parser.add_argument("--size", type=int, default=64)
  parser.add_argument("--microbatch", type=int, default=16)
  parser.add_argument("--versions", default="simclr,byol,mae")
  parser.add_argument("--one", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.one:
    measure(args.one, args.batch, args.size, args.microbatch or None)
    return
  for version in args.versions.split(","):
    for microbatch in (0, args.microbatch):
      flags = [f"--batch={args.batch}", f"--size={args.size}", f"--microbatch={microbatch}", f"--one={version}"]
      subprocess.run([sys.executable, __file__, *flags], check=True)


if __name__ == "__main__":
  main()
