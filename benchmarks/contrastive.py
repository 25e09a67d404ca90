"""NT-Xent and InfoNCE, value and gradient: temporary memory and time, against the textbook form that keeps the matrix.

  PYTHONPATH=. python benchmarks/contrastive.py

Memory is XLA's own count for the compiled program. Times are medians; the ratio in a line comes from one process, the
two forms taking turns.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp

from ssl_jax import info_nce, nt_xent

MIB = 2**20


def textbook_nt_xent(z1, z2, temperature=0.1):
  z = jnp.concatenate([z1, z2])
  z /= jnp.linalg.norm(z, axis=1, keepdims=True)
  similarity = jnp.where(jnp.eye(len(z), dtype=bool), -jnp.inf, z @ z.T / temperature)
  positive = jnp.sum(z * jnp.roll(z, len(z1), axis=0), axis=1) / temperature
  return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - positive)


def textbook_info_nce(query, key, temperature=0.1):
  query, key = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
  similarity = query @ jax.lax.stop_gradient(key).T / temperature
  return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def compile_gradient(loss, n, d):
  z = jax.ShapeDtypeStruct((n, d), jnp.float32)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(z, z).compile()


def take_turns(programs, arguments, repeats):
  """Median seconds of each program."""
  times = [[] for _ in programs]
  for i in range(repeats + 1):
    for program, taken in zip(programs, times, strict=True):
      start = time.perf_counter()
      jax.block_until_ready(program(*arguments))
      if i:  # the first call warms up
        taken.append(time.perf_counter() - start)
  return [statistics.median(taken) for taken in times]


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--run", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096], help="batches that are timed")
  parser.add_argument("--compile", type=int, nargs="*", default=[16384, 32768, 65536], help="batches for memory alone")
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, d = {args.width}, float32")
  for name, ours, textbook in (("nt_xent", nt_xent, textbook_nt_xent), ("info_nce", info_nce, textbook_info_nce)):
    print(f"{name:>9} {'N':>7} {'ours MiB':>9} {'textbook':>9} {'ours ms':>9} {'textbook':>9} {'ratio':>6}")
    for n in (*args.run, *args.compile):
      programs = [compile_gradient(loss, n, args.width) for loss in (ours, textbook)]
      memory = [program.memory_analysis().temp_size_in_bytes / MIB for program in programs]
      line = f"{'':>9} {n:>7} {memory[0]:>9.1f} {memory[1]:>9.1f}"
      if n in args.run:
        z = jax.random.normal(jax.random.key(0), (2, n, args.width))
        seconds = take_turns(programs, z, args.repeats)
        line += f" {1e3 * seconds[0]:>9.1f} {1e3 * seconds[1]:>9.1f} {seconds[0] / seconds[1]:>6.2f}"
      print(line, flush=True)


if __name__ == "__main__":
  main()
