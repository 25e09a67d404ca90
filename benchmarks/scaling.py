"""What a training step sends and holds, a device, on 1 to 512 devices: counted in the compiled program, nothing is run.

  PYTHONPATH=. python benchmarks/scaling.py
  PYTHONPATH=. python benchmarks/scaling.py --recipes mae_imagenet:large --devices 4 8 --batch 64 --shard_state

Each recipe at its paper's global batch, its step compiled ahead of time for virtual CPU devices. The time model is in
docs/pods.md. CPU programs compute bfloat16 in float32 in places, so their temporaries are an upper bound.
"""

import argparse
import json
import math
import os
import pathlib
import time

os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=512"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import jax
from compiled import collectives, trace_step

from ssl_jax import parallel

RECIPES = ["simclr_imagenet", "moco_imagenet:v3_vit", "byol_imagenet", "mae_imagenet:large", "dino_imagenet:boost"]
# Peak dense bfloat16 FLOP/s and bytes/s that a device sends to its neighbours, from the vendors' data sheets, and the
# seconds until a message has gone round, an assumption. TPU v5e: a torus with four links of 50 GB/s each way, of which
# a ring uses two, 1 us a hop along both of its sides. H100: NVLink in a host of eight, 400 Gbit/s beyond, 5 us a level
# of a tree, up and down.
CHIPS = {
  "TPU v5e": (197e12, lambda n: 100e9, lambda n: 2e-6 * (n**0.5 - 1)),
  "H100": (989e12, lambda n: 450e9 if n <= 8 else 50e9, lambda n: 1e-5 * math.log2(n)),
}
UTILISATION = 0.4  # of the peak while computing: an assumption


def efficiency(flops, sent, count, devices, chip):
  """Share of the time that is spent on computing where nothing overlaps."""
  peak, link, latency = CHIPS[chip]
  computing = flops / (UTILISATION * peak)
  return computing / (computing + sent / link(devices) + count * latency(devices))


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--recipes", nargs="+", default=RECIPES)
  parser.add_argument("--devices", type=int, nargs="+", default=[1, 8, 64, 512])
  parser.add_argument("--batch", type=int, help="global; by default the recipe's")
  parser.add_argument("--encoder", help="in place of the recipe's, such as vit_large")
  parser.add_argument("--shard_state", action="store_true")
  parser.add_argument("--json", help="a file for the figures")
  args = parser.parse_args()
  print(f"jax {jax.__version__}, MiB a device; efficiency without overlap at {UTILISATION:.0%} of the peak")
  print(f"{'recipe':<22}{'devices':>8}{'batch':>7}{'state':>9}{'temporary':>11}{'sent':>8}{'collectives':>13}", end="")
  print(f"{'GFLOP':>9}" + "".join(f"{chip:>9}" for chip in CHIPS) + "  kinds")
  rows = []
  for name in args.recipes:
    for devices in args.devices:
      config = common.load_recipe(name)
      config.batch_size = args.batch or config.batch_size
      config.encoder.name = args.encoder or config.encoder.name
      config.parallel.shard_state = args.shard_state
      start = time.perf_counter()
      program = trace_step(config, parallel.make_mesh(jax.devices()[:devices])).lower().compile()
      found, memory = collectives(program.as_text(), devices), program.memory_analysis()
      sent, count = sum(b for _, b in found.values()), sum(n for n, _ in found.values())
      row = dict(
        recipe=name,
        encoder=config.encoder.name,
        devices=devices,
        batch=config.batch_size,
        shard_state=args.shard_state,
        sent=sent,
      )
      row |= dict(state=memory.argument_size_in_bytes, temporary=memory.temp_size_in_bytes, collectives=found)
      row |= dict(flops=program.cost_analysis()["flops"], compile_seconds=time.perf_counter() - start)
      row |= dict(efficiency={chip: efficiency(row["flops"], sent, count, devices, chip) for chip in CHIPS})
      rows.append(row)
      line = (
        f"{name:<22}{devices:>8}{config.batch_size:>7}{row['state'] / 2**20:>9,.0f}{row['temporary'] / 2**20:>11,.0f}"
      )
      line += f"{sent / 2**20:>8,.0f}{count:>13}{row['flops'] / 1e9:>9,.0f}"
      line += "".join(f"{share:>9.1%}" for share in row["efficiency"].values())
      print(line + "  " + ", ".join(f"{kind} {n}x {b / 2**20:.1f}" for kind, (n, b) in found.items()), flush=True)
      if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
  main()
