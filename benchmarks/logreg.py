"""Logistic regression with an L2 penalty, for a sweep of penalties: time and memory against scikit-learn.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/logreg.py --json=logreg.json
  PYTHONPATH=. python benchmarks/logreg.py --rows=50000 --width=384

Features of ten classes that overlap, made up, whose standard deviations fall as 1 / sqrt(i). scikit-learn solves one
penalty after the other by L-BFGS, also in float64, with DINOv2's limit of 1,000 steps; --tolerance is its own, of the
mean loss's gradient, by default DINOv2's. Each side runs in a fresh process: CPU seconds, and what the process grows by
at most beyond the float32 features. Ours includes its compilation. The last columns are how far the objectives are
above the lower one of both sides, as a share of it: only where both are small do the sides solve the same problem.
"""

import pathlib
import tempfile
import warnings

import common
import numpy as np

from ssl_jax import logistic_regression

CLASSES = 10
SIDES = ("ours", "scikit-learn")


def draw(rows, width):
  rng = np.random.default_rng(0)
  labels = rng.integers(0, CLASSES, rows)
  x = rng.standard_normal((rows, width), dtype=np.float32)
  x += rng.standard_normal((CLASSES, width), dtype=np.float32)[labels] * 0.2
  return x / np.sqrt(np.arange(1, width + 1, dtype=np.float32)), labels


def objective(x, labels, coef, intercept, c):
  logits = x @ coef.T + intercept
  logits -= logits.max(axis=1, keepdims=True)
  losses = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(x)), labels]
  return losses.sum() + (coef**2).sum() / (2 * c)


def make(side, rows, width, penalties, tolerance, file):
  x, labels = draw(rows, width)
  if side == "scikit-learn":
    from sklearn.linear_model import LogisticRegression

    def solve(wide, c):
      model = LogisticRegression(C=c, tol=tolerance, max_iter=1000).fit(wide, labels)
      return objective(wide, labels, model.coef_, model.intercept_, c)

    def sweep():
      wide = x.astype(np.float64)
      return [solve(wide, c) for c in penalties]

  else:

    def sweep():
      return logistic_regression(x, labels, C=penalties).objective

  def call():
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")  # of steps that did not suffice: the objectives are told
      np.save(file, sweep())

  return call


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--rows", type=int, default=12_000)
  parser.add_argument("--width", type=int, default=3_136)
  parser.add_argument("--penalties", type=int, default=12, help="how many, from 1e-6 to 1e5")
  parser.add_argument("--tolerance", type=float, default=1e-12)
  args = parser.parse_args()
  common.introduce()
  penalties = np.logspace(-6, 5, args.penalties)
  costs, objectives = {}, {}
  with tempfile.TemporaryDirectory() as folder:
    file = pathlib.Path(folder) / "objectives.npy"
    for side in SIDES:
      small, real = ((side, *shape, penalties, args.tolerance, file) for shape in ((64, 8), (args.rows, args.width)))
      costs[side] = common.alone(make, small, real)
      objectives[side] = np.load(file)
  print(f"{args.rows:,} x {args.width}, {CLASSES} classes, {args.penalties} penalties from 1e-6 to 1e5")
  (seconds, memory), (their_seconds, their_memory) = (costs[side] for side in SIDES)
  for side, (s, m) in costs.items():
    print(f"{side:>13} {s:>8.1f} CPU s {m:>7.0f} MiB")
  print(f"{'ratio':>13} {seconds / their_seconds:>8.3f} {memory / their_memory:>13.3f}")
  lowest = np.minimum(*objectives.values())
  above = {side: x / lowest - 1 for side, x in objectives.items()}
  print("     C  objective " + "".join(f"{side:>14}" for side in SIDES))
  for i, c in enumerate(penalties):
    print(f"{c:6.0e} {lowest[i]:10.4g} " + "".join(f"{above[side][i]:14.1e}" for side in SIDES))
  rows = [dict(side=side, seconds=s, peak_mib=m, above=list(above[side])) for side, (s, m) in costs.items()]
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
