"""What XLA's compilers for TPUs and GPUs make of the ImageNet recipes' steps on many chips: compiled here, run nowhere.

  python -m venv tpu && tpu/bin/pip install -r requirements-tpu.txt
  PYTHONPATH=. tpu/bin/python benchmarks/pods.py --recipes mae_imagenet:base --topologies v5e:4x4 v6e:8x8
  python -m venv gpu && gpu/bin/pip install -r requirements.txt "jax[cuda12]"
  PYTHONPATH=. gpu/bin/python benchmarks/pods.py --recipes mae_imagenet:base --topologies h100:8

No TPU and no GPU is needed: the compilers are packages, and the devices are described to them: a slice of TPUs, or one
host with n H100s. One row is a recipe on such a slice: what the step holds, computes and sends a chip, where the cycles
go that the compiler for TPUs expects it to take, how many kernels of which kind the compiler for GPUs makes of it, and
the least time that it can take by the chip's data sheet,

    max(model's FLOPs / peak, bytes / bandwidth of the memory) + bytes sent / bandwidth of all links,

where the bytes are each argument and result once, and each temporary once in and once out. What asynchronous
collectives send counts inside of the max. The MFU at best is the first term by all. A step that the compiler refuses
because it does not fit has the bytes that it asked for. Compile one at a time: libtpu locks out other processes.
Without a card the compiler for GPUs cannot try which kernel is the fastest, so that the ones of a real run differ.
"""

import argparse
import json
import os
import pathlib
import re
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # else libtpu waits for the metadata server of Google's machines

import common
import jax
from compiled import collectives, expected_cycles, kernels, trace_step
from jax.experimental import topologies

from ssl_jax import flops, parallel

RECIPES = [
  "simclr_imagenet",
  "moco_imagenet:v2",
  "moco_imagenet:v3_vit",
  "byol_imagenet",
  "mae_imagenet:base",
  "mae_imagenet:large",
  "dino_imagenet:vanilla",
]
TOPOLOGIES = ["v5e:2x2", "v5e:4x4", "v5e:8x8", "v6e:8x8"]
# Bytes of memory, bytes/s of it, and bytes/s that a chip sends over its four links together (1,600 and 3,584 Gbit/s):
# cloud.google.com/tpu/docs/v6e, where v5e stands beside it. H100 SXM by its data sheet: NVLink within a host.
CHIPS = {"v5e": (16e9, 819e9, 200e9), "v6e": (32e9, 1640e9, 448e9), "h100": (80e9, 3350e9, 450e9)}
H100 = """
  gpu_device_info {
    cuda_compute_capability { major: 9 } core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
    threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
    block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
    registers_per_block_limit: 65536 registers_per_core_limit: 65536
    shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 shared_memory_per_core: 233472
    l2_cache_size: 52428800 device_memory_size: 84978434048 memory_bandwidth: 3352320000000
  }
  platform_name: "CUDA" dnn_version_info { major: 9 } device_description_str: "NVIDIA H100 80GB HBM3"
"""
# What the compiler would try out on a card, it leaves at a choice that works without.
UNTUNED = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
OUT_OF_MEMORY = re.compile(r"([\d.]+)([KMGT])\)? (?:of [\d.]+[KMGT] hbm|exceeds available HBM)")


def compile_row(config, topology):
  """The row of a recipe on a slice."""
  described, platform, options = dict(platform="tpu", topology_name=topology), "tpu", None
  if topology.startswith("h100:"):
    shape = f"1x1x{topology.removeprefix('h100:')}"  # parts of a cluster, hosts, cards of each
    described = dict(platform="cuda", topology_name="", topology=shape, target_config=H100)
    platform, options = "cuda", UNTUNED
  mesh = parallel.make_mesh(topologies.get_topology_desc(**described).devices)
  traced, start = trace_step(config, mesh), time.perf_counter()
  model = flops.count(traced.jaxpr) / mesh.size
  row = dict(chips=mesh.size, model_flops=model, memory=CHIPS[topology.split(":")[0]][0])
  try:
    program = traced.lower(lowering_platforms=(platform,)).compile(options)
  except jax.errors.JaxRuntimeError as error:
    if not (match := OUT_OF_MEMORY.search(str(error))):
      raise
    asked = float(match[1]) * 2 ** {"K": 10, "M": 20, "G": 30, "T": 40}[match[2]]
    return row | dict(compile_seconds=time.perf_counter() - start, fits=False, held=asked)
  row |= dict(compile_seconds=time.perf_counter() - start, fits=True)
  return row | figures(program, row, mesh, config.dtype, topology)


def figures(program, row, mesh, dtype, topology):
  """What a compiled program holds, sends and needs, a chip."""
  memory = program.memory_analysis()
  inputs, outputs, temporary = (getattr(memory, f"{x}_size_in_bytes") for x in ("argument", "output", "temp"))
  text = program.as_text()
  found = collectives(text, mesh.size)
  sent = {late: sum(sent for kind, (_, sent) in found.items() if ("-start" in kind) == late) for late in (False, True)}
  _, bandwidth, links = CHIPS[topology.split(":")[0]]
  compute = row["model_flops"] / flops.peak(mesh.devices.flat[0].device_kind, dtype)
  moving, waiting = (inputs + outputs + 2 * temporary) / bandwidth, sent[False] / links
  least = max(compute, moving, sent[True] / links) + waiting
  # What is donated is held once: the new state takes the old one's place. The program itself lies in the same memory.
  held = inputs + outputs - memory.alias_size_in_bytes + temporary + memory.generated_code_size_in_bytes
  own = program.cost_analysis()  # the compiler for GPUs has none
  counted = dict(held=held, temporary=temporary, collectives=found, cycles=expected_cycles(text), kernels=kernels(text))
  return counted | dict(
    flops=own and own["flops"],
    compute_seconds=compute,
    memory_seconds=moving,
    waiting_seconds=waiting,
    least_seconds=least,
    mfu=compute / least,
  )


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--recipes", nargs="+", default=RECIPES)
  parser.add_argument("--topologies", nargs="+", default=TOPOLOGIES, help="such as v5e:4x4, v6e:8x8, h100:8")
  parser.add_argument("--batch", type=int, help="global; by default the recipe's")
  parser.add_argument("--microbatch", type=int)
  parser.add_argument("--shard_state", action="store_true")
  parser.add_argument("--json", help="a file for the figures")
  args = parser.parse_args()
  print(f"jax {jax.__version__}: compiled, not run. Memory, FLOPs and bytes are a chip's.")
  rows = []
  for name in args.recipes:
    for topology in args.topologies:
      config = common.load_recipe(name)
      config.batch_size = args.batch or config.batch_size
      config.microbatch, config.parallel.shard_state = args.microbatch, args.shard_state
      row = dict(recipe=name, topology=topology, batch=config.batch_size, microbatch=args.microbatch)
      rows.append(row | dict(shard_state=args.shard_state) | compile_row(config, topology))
      print(in_words(rows[-1]), flush=True)
      if args.json:
        pathlib.Path(args.json).write_text(json.dumps(rows, indent=1))


def in_words(row):
  line = f"{row['recipe']:<22}{row['topology']:<9}batch {row['batch']:,}"
  line += f", in microbatches of {row['microbatch']:,}" if row["microbatch"] else ""
  line += ", state split" if row["shard_state"] else ""
  line += f": compiled in {row['compile_seconds']:.0f} s; {row['held'] / 1e9:.1f} of {row['memory'] / 1e9:.0f} GB, "
  if not row["fits"]:
    return line + "does not fit"
  line += f"of which {row['temporary'] / 1e9:.1f} temporary; {row['model_flops'] / 1e12:.2f} TFLOP"
  line += f" (the program's own: {row['flops'] / 1e12:.2f})" if row["flops"] else ""
  line += "; sent: "
  line += ", ".join(f"{count} {kind} of {sent / 1e6:,.0f} MB" for kind, (count, sent) in row["collectives"].items())
  parts = (f"{1e3 * row[f'{part}_seconds']:.1f} ms {part}" for part in ("compute", "memory", "waiting"))
  line += f"; {', '.join(parts)}, so at least {1e3 * row['least_seconds']:.1f} ms: MFU at most {row['mfu']:.0%}"
  if row["kernels"]:
    line += "; " + ", ".join(f"{count} {kind}" for kind, count in row["kernels"].items())
  if not (cycles := sum(row["cycles"].values())):
    return line
  shares = sorted(row["cycles"].items(), key=lambda item: -item[1])
  line += f"; the compiler expects {cycles / 1e6:.1f} million cycles: "
  return line + ", ".join(f"{part} {share / cycles:.0%}" for part, share in shares)


if __name__ == "__main__":
  main()
