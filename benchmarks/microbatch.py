"""SimCLR's training step by microbatches: the memory of a large batch on a small device, and what it costs in time.

  PYTHONPATH=. python benchmarks/microbatch.py

ResNet-18 on 32x32 images. Memory is XLA's own count of temporaries for the compiled step, which is not run; the time
ratio is that of a smaller step, the two forms taking turns. In theory encoding twice costs 4/3 of the operations.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import optax

import train
from ssl_jax import parallel
from ssl_jax.augment import View
from ssl_jax.methods.base import AXIS
from ssl_jax.methods.simclr import simclr
from ssl_jax.models.heads import SimCLRProjector
from ssl_jax.models.resnet import resnet18

VIEWS = 2 * (View(32, jitter=(0.4, 0.4, 0.4, 0.1), gray_p=0.2),)


def compile_step(batch, microbatch):
  """(compiled step, shapes of its state)."""
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
  encoder = resnet18(stem="small", axis_name=AXIS)
  method = simclr(encoder, SimCLRProjector(axis_name=AXIS), axis_name=AXIS, microbatch=microbatch)
  optimizer = optax.sgd(0.1)
  init = jax.jit(train.make_init(method, optimizer, VIEWS, (32, 32, 3), 0), out_shardings=parallel.replicated(mesh))
  state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
  images = jax.ShapeDtypeStruct((batch, 32, 32, 3), np.uint8, sharding=parallel.split(mesh))
  step = parallel.compile_step(train.make_step(method, optimizer, VIEWS, 0, microbatch), mesh)
  return step.lower(state, {"image": images}).compile(), init, mesh


def seconds_a_step(programs, batch, repeats):
  images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)
  running = [(step, init(), parallel.put_batch(mesh, {"image": images}), []) for step, init, mesh in programs]
  for i in range(repeats + 1):
    for j, (step, state, placed, times) in enumerate(running):
      start = time.perf_counter()
      state, _ = jax.block_until_ready(step(state, placed))
      if i:  # the first call warms up
        times.append(time.perf_counter() - start)
      running[j] = step, state, placed, times
  return [statistics.median(times) for *_, times in running]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--large", type=int, nargs=2, default=[4096, 256], help="batch and microbatch to compile")
  parser.add_argument("--timed", type=int, nargs=2, default=[256, 32], help="batch and microbatch to run")
  parser.add_argument("--repeats", type=int, default=1)
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, float32")
  batch, microbatch = args.large
  memory = []
  for m in (None, microbatch):
    memory.append(compile_step(batch, m)[0].memory_analysis().temp_size_in_bytes / 2**30)
    print(f"batch {batch}, microbatch {m}: {memory[-1]:.2f} GiB of temporaries", flush=True)
  print(f"memory ratio {memory[1] / memory[0]:.3f}")
  batch, microbatch = args.timed
  times = seconds_a_step([compile_step(batch, m) for m in (None, microbatch)], batch, args.repeats)
  print(
    f"batch {batch}: {times[0]:.2f} s a step; microbatch {microbatch}: {times[1]:.2f} s, {times[1] / times[0]:.2f}x"
  )


if __name__ == "__main__":
  main()
