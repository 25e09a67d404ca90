"""What hangs on the device: block sizes, recomputation and training steps, on one GPU or TPU in eight minutes.

  PYTHONPATH=. python benchmarks/accelerator.py --json=accelerator.json
  PYTHONPATH=. python benchmarks/accelerator.py --sections steps --recipes dino_imagenet --batch-scale=2
  PYTHONPATH=. python benchmarks/accelerator.py --small  # tiny sizes, for a CPU: shows that the script works

knn        `knn_predict` by the rows of the bank that it compares at once
blocks     value and gradient of `nt_xent` and `info_nce` by the similarities that a block holds, up to no blocks
recompute  forward and backward pass of a ViT that computes layer norms and GELUs again, and of one that keeps them
steps      whole steps of the ImageNet recipes as train.py compiles them, on uint8 crops that are on the device already
peers      the steps of benchmarks/steps.py with ResNet-50 and ViT-S, ours against PyTorch's with torch.compile, both
           at 224 pixels, bfloat16, compiled; where PyTorch has CUDA and the rest of requirements-bench.txt is there

Steps and ViTs compute in bfloat16, on a CPU in float32. Times are the clock's: medians of 10 calls after 3, k-NN of 3
after 1. Temporaries are XLA's count for the compiled program. The peak is the process's, as its device tells, and left
out where an earlier case had a higher one; each case of `peers` has a process of its own. Once `--seconds` are over no
other case begins, and what was left out is told and written; so is what failed, which makes the exit status 1.
"""

import concurrent.futures
import functools
import math
import multiprocessing
import os
import statistics
import sys
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
from common import MIB

from ssl_jax import augment, build, flops, losses, parallel
from ssl_jax import config as configs
from ssl_jax.evaluation.knn import knn_predict
from ssl_jax.methods.base import AXIS
from ssl_jax.models import ENCODERS

# With batches that fit 80 GB, the least memory first.
RECIPES = {
  "dino_imagenet": 64,
  "mae_imagenet": 256,
  "moco_imagenet:v3_vit": 256,
  "byol_imagenet": 128,
  "simclr_imagenet": 256,
}
PEERS = dict(mae=256, dino=64, simclr=128, moco=128, byol=128)

# ---- what all sections share


def compiled(function, *args):
  """(compiled program, seconds that it took, traced program) of a jitted function."""
  start = time.perf_counter()
  traced = function.trace(*args)
  return traced.lower().compile(), time.perf_counter() - start, traced.jaxpr


def median_seconds(call, calls=10, warm=3):
  """By the clock, of a function that waits for its own result; `warm` calls do not count."""
  taken = []
  for _ in range(warm + calls):
    start = time.perf_counter()
    call()
    taken.append(time.perf_counter() - start)
  return statistics.median(taken[warm:])


def cost(function, *args, **calls):
  """Milliseconds and MiB of temporaries of a function."""
  program = compiled(jax.jit(function), *args)[0]
  seconds = median_seconds(lambda: jax.block_until_ready(program(*args)), **calls)
  return dict(ms=1e3 * seconds, temporary_mib=temporary(program))


def temporary(program):
  memory = program.memory_analysis()
  return memory and memory.temp_size_in_bytes / MIB


def peak():
  """The most MiB that this process has held on its device; None: the device does not tell."""
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0) / MIB or None


def compute_dtype():
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


# ---- the sections: each measures a case


def knn(chunk_size, rows, width, queries):
  labels = jax.random.randint(jax.random.key(2), (rows,), 0, 1000)
  predict = functools.partial(knn_predict, k=20, num_classes=1000, chunk_size=chunk_size)
  return cost(predict, normal(0, rows, width), labels, normal(1, queries, width), calls=3, warm=1)


def blocks(loss, n, block_size, similarities):
  del similarities  # of a block, for the table
  function = functools.partial(getattr(losses, loss), block_size=block_size)
  trained = (0, 1) if loss == "nt_xent" else 0  # InfoNCE's keys take no gradient
  return cost(jax.value_and_grad(function, trained), normal(0, n, 128), normal(1, n, 128))


def recompute(encoder, recompute, depth, patch, size, batch):
  shape = dict(depth=depth, patch_size=patch, image_size=size)
  vit = ENCODERS[encoder](**shape, recompute=recompute, dtype=jnp.dtype(compute_dtype()))
  images = normal(0, batch, size, size, 3)
  variables = jax.jit(functools.partial(vit.init, train=True))(jax.random.key(0), images[:1])
  return cost(jax.value_and_grad(lambda v, x: jnp.mean(vit.apply(v, x, train=True) ** 2)), variables, images)


def steps(recipe, batch, small):
  config = common.load_recipe(recipe)
  config.batch_size, config.dtype = batch, compute_dtype()
  if small:
    shrink(config)
  mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
  made = build.program(config, mesh, *configs.schedule_length(config, common.IMAGENET))
  shapes = augment.crop_shapes(configs.views(config), batch, 3)
  crops = [np.random.default_rng(0).integers(0, 256, x.shape, np.uint8) for x in shapes]
  given = parallel.put_batch(mesh, {"image": tuple(crops)})
  before = peak()
  program, compile_seconds, jaxpr = compiled(made.train_step, made.state, given)
  state = made.init()

  def call():
    nonlocal state
    state, metrics = jax.block_until_ready(program(state, given))
    assert jnp.isfinite(metrics["loss"])

  taken, work, after = median_seconds(call), flops.count(jaxpr), peak()
  fastest = flops.peak(jax.devices()[0].device_kind, config.dtype)
  row = dict(compile_s=compile_seconds, ms=1e3 * taken, images_s=batch / taken, tflop=work / 1e12)
  row |= dict(mfu=fastest and work / taken / fastest, temporary_mib=temporary(program))
  return row | dict(peak_mib=after if after != before else None)


def shrink(config):
  config.views = tuple(dict(size=32 if view["size"] == 224 else 16) for view in config.views)
  resnet = config.encoder.name.startswith("resnet")
  vit = dict(name="vit", patch_size=8, dim=12, depth=1, heads=3)
  config.encoder = dict(name="resnet", stages=(1,), width=0.125, stem="patch") if resnet else vit
  narrow = dict(hidden=16, head=dict(hidden=16, bottleneck=8, prototypes=32), decoder=dict(dim=12, depth=1, heads=3))
  config.method.update({key: value for key, value in narrow.items() if key in config.method})


def peers(method, batch, small):
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs memory as well
  import steps as sides
  import torch

  patch = {True: 4, False: 16}[small] if method in ("mae", "dino") else None
  shape, nets = (method, 32 if small else 224, patch, batch), sides.SMALL if small else sides.LARGE
  call, parameters = sides.our_step(*shape, False, nets, jnp.bfloat16)
  ours, ours_peak = batch / median_seconds(call), peak()
  del call
  call, peer_parameters = sides.torch_step(*shape, patch is None, nets, "cuda")
  peer = batch / median_seconds(call)
  row = dict(images_s=ours, peer_images_s=peer, ratio=ours / peer, parameters=parameters)
  row |= dict(peer_parameters=peer_parameters, peak_mib=ours_peak)
  return row | dict(peer_peak_mib=torch.cuda.max_memory_allocated() / MIB)


# ---- the run

SECTIONS = dict(knn=knn, blocks=blocks, recompute=recompute, steps=steps, peers=peers)


def cases_of(section, args):
  """The arguments of each case, the cheapest first."""
  small = args.small
  if section == "knn":
    shape = dict(rows=2_000, width=32, queries=100) if small else dict(rows=200_000, width=384, queries=10_000)
    return [dict(chunk_size=size, **shape) for size in ((512, 1024) if small else (1024, 4096, 16384, 65536))]
  if section == "blocks":
    cases = []
    for n in (64,) if small else (1024, 4096, 16384):
      for loss, rows in (("nt_xent", 2 * n), ("info_nce", n)):
        sizes = [2**i // rows for i in ((10,) if small else range(18, 28, 2))]
        sizes = [size for size in sizes if size < rows] + [rows] * (rows**2 <= 2**30)  # the last: no blocks
        cases += [dict(loss=loss, n=n, block_size=size, similarities=size * rows) for size in sizes]
    return cases
  if section == "recompute":
    shape = dict(depth=1, patch=8, size=32, batch=4) if small else dict(depth=12, patch=16, size=224, batch=128)
    names = ("vit_tiny",) if small else ("vit_small", "vit_base")
    return [dict(encoder=name, recompute=again, **shape) for name in names for again in (True, False)]
  key, batches = ("recipe", {name: RECIPES[name] for name in args.recipes}) if section == "steps" else ("method", PEERS)
  batches = {name: 4 if small else max(2, round(batch * args.batch_scale)) for name, batch in batches.items()}
  return [{key: name, "batch": batch, "small": small} for name, batch in batches.items()]


def no_peers():
  """Why PyTorch cannot be measured; None: it can."""
  try:
    import steps as sides
  except Exception as error:  # a package that is missing, or does not load beside this PyTorch
    return f"{type(error).__name__}: {error}"
  return None if sides.torch.cuda.is_available() else "PyTorch has no CUDA here"


def measure(section, case):
  """One row, in a process that may hold the device: {"error": ...} where the case fails."""
  try:
    return SECTIONS[section](**case) | dict(device=jax.devices()[0].device_kind)
  except Exception as error:  # too little memory, a kernel that is not there: the other cases go on
    return dict(error=f"{type(error).__name__}: {error}"[:500])
  finally:
    jax.clear_caches()


def worker():
  return concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def shown(value):
  if isinstance(value, float):
    return f"{value:,.1f}" if value >= 100 else f"{value:.3g}"
  return "-" if value is None else f"{value:,}" if type(value) is int else str(value)


def fastest(rows):
  """Prints, of each loss and N, the block size that took the least time."""
  for group in dict.fromkeys((row["loss"], row["n"]) for row in rows):
    best = min((row for row in rows if (row["loss"], row["n"]) == group), key=lambda row: row["ms"])
    size = f"{best['similarities']:,} similarities (2^{math.log2(best['similarities']):.0f})"
    print(f"fastest for {group[0]}, N = {group[1]:,}: {size} a block, {best['block_size']:,} rows, {best['ms']:.2f} ms")


def run(section, args, end, pool, rows):
  """Measures a section's cases until the clock says `end`; appends to `rows`. Returns the pool for the next section."""
  measured, cases = [], cases_of(section, args)
  reason = no_peers() if section == "peers" else None
  for i, case in enumerate(cases):
    if reason or time.monotonic() >= end:
      left = [" ".join(f"{key}={value}" for key, value in case.items()) for case in cases[i:]]
      reason = reason or f"{args.seconds:g} seconds are over"
      print(f"\n{section}: {reason}; not measured: {', '.join(left)}", flush=True)
      rows.append(dict(section=section, left_out=left, reason=reason))
      break
    if section == "peers":
      pool.shutdown()  # it holds memory of the device
      pool = worker()
    start = time.monotonic()
    try:
      row = pool.submit(measure, section, case).result()
    except concurrent.futures.BrokenExecutor as error:
      row, pool = dict(error=f"the process died: {error}"), worker()
    rows.append(dict(section=section) | case | row | dict(case_seconds=time.monotonic() - start))
    if "error" in row:
      print(f"{section}, {case}: {row['error']}", flush=True)
    else:
      line = case | {key: value for key, value in row.items() if key != "device"}
      if not measured:
        print(f"\n{section}, {row['device']}\n" + " ".join(f"{key:>{max(13, len(key))}}" for key in line))
      print(" ".join(f"{shown(value):>{max(13, len(key))}}" for key, value in line.items()), flush=True)
      measured.append(case | row)
    common.write_json(args, rows)
  if section == "blocks":
    fastest(measured)
  return pool


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--sections", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
  parser.add_argument("--recipes", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="of steps")
  parser.add_argument("--batch-scale", type=float, default=1, help="times the batches of steps and peers")
  parser.add_argument("--seconds", type=float, default=450, help="after which no case begins")
  parser.add_argument("--small", action="store_true", help="tiny sizes")
  args = parser.parse_args()
  if args.small:
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # for the processes that measure: most is compiling
  common.introduce()
  rows, pool, end = [], worker(), time.monotonic() + args.seconds
  for section in args.sections:
    pool = run(section, args, end, pool, rows)
  pool.shutdown()
  common.write_json(args, rows)
  sys.exit(any("error" in row for row in rows))


if __name__ == "__main__":
  main()
