"""Weighted k-NN at the size of ImageNet: time and memory, with a bank of random features.

  PYTHONPATH=. python benchmarks/knn.py

The answer takes no more memory than the bank, its copy on the device and a block of similarities.
"""

import argparse
import resource
import time

import jax
import numpy as np

from ssl_jax import knn


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rows", type=int, default=1_281_167)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--queries", type=int, default=5_000)
  parser.add_argument("--all_queries", type=int, default=50_000, help="to say what these would take")
  parser.add_argument("--k", type=int, default=20)
  args = parser.parse_args()
  rng = np.random.default_rng(0)
  bank = rng.standard_normal((args.rows, args.width), dtype=np.float32)
  labels = rng.integers(0, 1000, args.rows)
  queries = rng.standard_normal((args.queries, args.width), dtype=np.float32)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  start = time.perf_counter()
  jax.block_until_ready(knn.knn_predict(bank, labels, queries, k=args.k, num_classes=1000))
  seconds = time.perf_counter() - start
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  whole = seconds * args.all_queries / args.queries / 60
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}: {args.rows:,} x {args.width}, k = {args.k}")
  print(f"{args.queries:,} queries: {seconds:.1f} s, so {whole:.1f} min for {args.all_queries:,}")
  print(f"peak memory {peak:.2f} GiB, {peak - before:.2f} GiB above the bank's own {before:.2f} GiB")


if __name__ == "__main__":
  main()
