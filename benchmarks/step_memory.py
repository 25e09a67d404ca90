"""The memory that a compiled step says it needs, beside what it takes: the rule by which a microbatch is found.

  PYTHONPATH=. taskset -c 0 python benchmarks/step_memory.py --json=step_memory.json

Three steps of `configs/own_images.py` from made-up images, with all that their state takes, in a process of its own for
each case. On a CPU the peak is what that process grows by at most; on other devices it is the allocator's.
"""

import common
import jax
import numpy as np

from ssl_jax import build, decide, parallel
from ssl_jax.data.look import DataFacts
from ssl_jax.microbatch import step_bytes


def program(version, batch, size, microbatch):
  """(compiled step, () -> state, images)."""
  config = common.load_recipe(f"own_images:{version}")
  config.batch_size = batch
  mesh = parallel.make_mesh()
  facts = DataFacts(10_000, ((size, size),), 3, 1, (0.5,) * 3, (0.25,) * 3)
  config, _ = decide.decide(facts, decide.DeviceFacts(mesh.devices.flat[0].platform, mesh.size), config)
  config.microbatch = microbatch
  made = build.program(config, mesh, 100, 10)
  images = {"image": np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), dtype=np.uint8)}
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), images)
  step = made.train_step.trace(made.state, parallel.abstract(shapes, parallel.split(mesh))).lower().compile()
  jax.block_until_ready(made.init())  # which compiles it
  return step, made.init, parallel.put_batch(mesh, images)


def make(*case):
  step, init, images = program(*case)

  def call():
    state = init()
    for _ in range(3):
      state, row = step(state, images)
    return float(row["loss"])

  return call


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--versions", default="simclr,byol,mae")
  parser.add_argument("--batch", type=int, default=256)
  parser.add_argument("--size", type=int, default=64)
  parser.add_argument("--microbatches", type=int, nargs="+", default=[64], help="beside the whole batch")
  args = parser.parse_args()
  common.introduce()
  rows = []
  for version in args.versions.split(","):
    for microbatch in (None, *args.microbatches):
      case = version, args.batch, args.size, microbatch
      estimate = step_bytes(program(*case)[0]) / common.MIB
      if jax.default_backend() == "cpu":
        _, peak = common.alone(make, (version, 8, 32, None), case)
      else:
        make(*case)()
        peak = jax.local_devices()[0].memory_stats()["peak_bytes_in_use"] / common.MIB
      rows.append(dict(version=version, microbatch=microbatch, estimate=estimate, peak=peak))
      text = f"{version:<9} batch {args.batch}, {microbatch or args.batch} at once, views of {args.size}"
      print(f"{text}: estimated {estimate:,.0f} MiB, peak {peak:,.0f} MiB", flush=True)
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
