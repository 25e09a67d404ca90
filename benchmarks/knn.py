"""Weighted k-NN with a bank of random features: time and memory against the official DINO script and lightly.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/knn.py --json=knn.json
  PYTHONPATH=. python benchmarks/knn.py --rows=1281167 --queries=5000 --sides ours  # the size of ImageNet

"official" is what `knn_classifier` in eval_knn.py of facebookresearch/dino computes, written anew: similarities of a
hundredth of the queries to the whole bank, then the k largest. lightly's `knn_predict` gets batches of 256 queries, as
in its own benchmarks. Each side runs in fresh processes: CPU seconds, medians of rounds in which the sides take turns;
and what the process grows by at most beyond the features, which are arrays of the side's own library (NumPy's would be
copied to the device once more). Ours includes its compilation.
"""

import statistics

import common
import jax
import jax.numpy as jnp
import numpy as np
import torch
from lightly.utils.benchmarking import knn_predict as lightly_knn

from ssl_jax.evaluation import knn

TEMPERATURE, CLASSES = 0.07, 1000
SIDES = ("ours", "official", "lightly")


def features(rows, queries, width):
  """Unit rows, as both peers expect them: (bank, labels, queries)."""
  rng = np.random.default_rng(0)
  bank, asked = (rng.standard_normal((n, width), dtype=np.float32) for n in (rows, queries))
  for x in (bank, asked):
    x /= np.linalg.norm(x, axis=1, keepdims=True)
  return bank, rng.integers(0, CLASSES, rows), asked


def official(bank, labels, queries, k):
  """Classes in the order of their votes, [queries, CLASSES]."""
  ordered = []
  bank = bank.T
  for block in queries.chunk(max(1, len(queries) // 100)):  # a hundred queries a block where there are 10,000
    similarity, neighbours = torch.mm(block, bank).topk(k, largest=True, sorted=True)
    found = torch.gather(labels.view(1, -1).expand(len(block), -1), 1, neighbours)
    one_hot = torch.zeros(len(block) * k, CLASSES).scatter_(1, found.view(-1, 1), 1)
    votes = (similarity / TEMPERATURE).exp_().view(len(block), -1, 1)
    ordered.append(torch.sum(one_hot.view(len(block), -1, CLASSES) * votes, 1).sort(1, True)[1])
  return torch.cat(ordered).numpy()


def lightly(bank, labels, queries, k):
  return torch.cat([lightly_knn(q, bank.T, labels, CLASSES, k, TEMPERATURE) for q in queries.split(256)]).numpy()


def make(side, rows, queries, width, k):
  arrays = features(rows, queries, width)
  if side == "ours":
    arrays = jax.block_until_ready([jnp.array(x) for x in arrays])

    def call():
      scores = knn.knn_predict(*arrays, k=k, temperature=TEMPERATURE, num_classes=CLASSES)
      return np.asarray(jnp.argmax(scores, axis=1))

    return call
  tensors = [torch.from_numpy(x) for x in arrays]
  run = dict(official=official, lightly=lightly)[side]
  return lambda: run(*tensors, k)[:, 0]


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--sides", nargs="*", choices=SIDES, default=SIDES)
  parser.add_argument("--rows", type=int, default=200_000)
  parser.add_argument("--width", type=int, default=384)
  parser.add_argument("--queries", type=int, default=10_000)
  parser.add_argument("--k", type=int, default=20)
  parser.add_argument("--rounds", type=int, default=1)
  args = parser.parse_args()
  common.introduce()
  small = 2_000, 200, args.width, args.k
  answers = [make(side, *small)() for side in args.sides]
  assert all(np.mean(answer == answers[0]) > 0.99 for answer in answers), "the sides give different classes"
  runs: dict = {side: [] for side in args.sides}
  for _ in range(args.rounds):
    for side in args.sides:
      runs[side].append(common.alone(make, (side, *small), (side, args.rows, args.queries, args.width, args.k)))
  costs = {side: [statistics.median(x) for x in zip(*taken, strict=True)] for side, taken in runs.items()}
  print(f"{args.queries:,} queries, bank {args.rows:,} x {args.width}, k = {args.k}; ratios are the first side / it")
  print(f"{'':>9} {'CPU s':>7} {'ratio':>6} {'peak MiB':>9} {'ratio':>6}")
  first = costs[args.sides[0]]
  for side, (seconds, memory) in costs.items():
    print(f"{side:>9} {seconds:>7.1f} {first[0] / seconds:>6.2f} {memory:>9.0f} {first[1] / memory:>6.2f}")
  common.write_json(args, [dict(side=side, seconds=s, peak_mib=m) for side, (s, m) in costs.items()])


if __name__ == "__main__":
  main()
