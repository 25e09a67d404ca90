"""SimCLR's training step by microbatches: the memory of a large batch on a small device, and what it costs in time.

  PYTHONPATH=. taskset -c 0 python benchmarks/microbatch.py --json=microbatch.json

ResNet-18 on 32x32 images. Memory is XLA's own count of temporaries for the compiled step, which is not run; the time
ratio is that of a smaller step, the two forms taking turns. In theory encoding twice costs 4/3 of the operations.
"""

import common
import jax
import numpy as np
import optax

from ssl_jax import parallel, training
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
  init = jax.jit(training.make_init(method, optimizer, VIEWS, 3, 0), out_shardings=parallel.replicated(mesh))
  state = parallel.abstract(jax.eval_shape(init), parallel.replicated(mesh))
  images = jax.ShapeDtypeStruct((batch, 32, 32, 3), np.uint8, sharding=parallel.split(mesh))
  step = training.compile_step(training.make_step(method, optimizer, VIEWS, 0, microbatch), state, mesh)
  return step.lower(state, {"image": images}).compile(), init, mesh


def seconds_a_step(programs, batch, repeats):
  """Median CPU seconds of each program, the programs taking turns."""
  images = np.random.default_rng(0).integers(0, 256, (batch, 32, 32, 3), dtype=np.uint8)

  def runner(step, init, mesh):
    state, placed = init(), parallel.put_batch(mesh, {"image": images})

    def call():
      nonlocal state
      state, _ = jax.block_until_ready(step(state, placed))

    return call

  return common.take_turns({name: runner(*program) for name, program in programs.items()}, repeats)


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--large", type=int, nargs=2, default=[4096, 256], help="batch and microbatch to compile")
  parser.add_argument("--timed", type=int, nargs=2, default=[256, 32], help="batch and microbatch to run")
  parser.add_argument("--repeats", type=int, default=1)
  args = parser.parse_args()
  common.introduce()
  batch, microbatch = args.large
  memory = []
  for m in (None, microbatch):
    memory.append(compile_step(batch, m)[0].memory_analysis().temp_size_in_bytes / 2**30)
    print(f"batch {batch}, microbatch {m}: {memory[-1]:.2f} GiB of temporaries", flush=True)
  print(f"memory ratio {memory[1] / memory[0]:.3f}")
  rows = [dict(batch=batch, microbatch=m, temporaries_gib=x) for m, x in zip((None, microbatch), memory, strict=True)]
  batch, microbatch = args.timed
  times = seconds_a_step({m: compile_step(batch, m) for m in (None, microbatch)}, batch, args.repeats)
  ratio = times[microbatch] / times[None]
  print(f"batch {batch}: {times[None]:.2f} s a step; microbatch {microbatch}: {times[microbatch]:.2f} s, {ratio:.2f}x")
  common.write_json(args, rows + [dict(batch=batch, microbatch=m, seconds=x) for m, x in times.items()])


if __name__ == "__main__":
  main()
