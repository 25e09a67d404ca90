"""SIGReg, KoLeo and Sinkhorn-Knopp: time and memory against the official forms in PyTorch.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/distribution.py --json=distribution.json

"official" is what rbalestr-lab/lejepa (MINIMAL.md) and facebookresearch/dinov2 compute, written anew: SIGReg of all
slices at once, KoLeo from the whole [N, N] matrix of cosines. SIGReg and KoLeo with the gradient to the embeddings;
Sinkhorn-Knopp has none. CPU seconds, medians, the sides taking turns; peak memory is the growth of a fresh process.
"""

import common
import jax
import numpy as np
import torch

from ssl_jax import koleo_loss, sigreg, sinkhorn_knopp

TEMPERATURE, ITERATIONS = 0.07, 3
# {loss: (its sizes, those that only load the libraries)}
PROBLEMS = {
  "sigreg": ((8192, 512, 1024), (8, 4, 2)),
  "koleo": ((16384, 384), (8, 4)),
  "sinkhorn": ((512, 65536), (8, 4)),
}


def inputs(loss, sizes):
  rng = np.random.default_rng(0)
  x = rng.standard_normal(sizes[:2], dtype=np.float32)
  if loss != "sigreg":
    return (0.1 * x,) if loss == "sinkhorn" else (x,)  # logits of unit vectors are small
  directions = rng.standard_normal(sizes[1:], dtype=np.float32)
  return x, directions / np.linalg.norm(directions, axis=0)


def ours(loss, *arrays):
  if loss == "sinkhorn":
    function = lambda x: sinkhorn_knopp(x, temperature=TEMPERATURE, iterations=ITERATIONS)  # noqa: E731
  else:
    function = jax.value_and_grad(sigreg if loss == "sigreg" else koleo_loss)
  arguments = [*map(jax.numpy.array, arrays)]
  program = jax.jit(function).lower(*arguments).compile()
  return lambda: jax.tree.map(np.asarray, program(*arguments))


def official(loss, *arrays):
  x, *rest = map(torch.tensor, arrays)
  if loss == "sinkhorn":
    return lambda: official_sinkhorn(x)
  function = official_sigreg if loss == "sigreg" else official_koleo
  x.requires_grad_()

  def call():
    value = function(x, *rest)
    return value.detach(), torch.autograd.grad(value, x)[0]

  return call


def official_sigreg(x, directions):
  t = torch.linspace(0, 3, 17)
  weights = torch.full((17,), 2 * 3 / 16)
  weights[[0, -1]] = 3 / 16
  normal = torch.exp(-(t**2) / 2)
  angles = (x @ directions)[..., None] * t
  error = (angles.cos().mean(0) - normal) ** 2 + angles.sin().mean(0) ** 2
  return (len(x) * error @ (weights * normal)).mean()


def official_koleo(x):
  x = torch.nn.functional.normalize(x, eps=1e-8)
  with torch.no_grad():
    cosines = x @ x.T
    cosines.fill_diagonal_(-1)
    nearest = cosines.argmax(dim=1)
  return -torch.log(torch.nn.functional.pairwise_distance(x, x[nearest], p=2, eps=1e-8) + 1e-8).mean()


@torch.no_grad()
def official_sinkhorn(logits):
  q = torch.exp(logits / TEMPERATURE).t()
  prototypes, samples = q.shape
  q /= q.sum()
  for _ in range(ITERATIONS):
    q /= q.sum(dim=1, keepdim=True)
    q /= prototypes
    q /= q.sum(dim=0, keepdim=True)
    q /= samples
  return ((q * samples).t(),)


SIDES = dict(ours=ours, official=official)


def make(side, loss, sizes):
  return SIDES[side](loss, *inputs(loss, sizes))


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--losses", nargs="+", choices=PROBLEMS, default=list(PROBLEMS))
  parser.add_argument("--repeats", type=int, default=5)
  args = parser.parse_args()
  common.introduce()
  rows = []
  print(f"{'':>36} {'CPU s':>7} {'ours/it':>8} {'peak MiB':>9} {'ours/it':>8}")
  for loss in args.losses:
    sizes, small = PROBLEMS[loss]
    calls = {side: make(side, loss, sizes) for side in SIDES}
    values = [np.asarray(jax.tree.leaves(call())[0]) for call in calls.values()]
    np.testing.assert_allclose(*values, rtol=1e-3, atol=1e-7)
    seconds = common.take_turns(calls, args.repeats)
    memory = {side: common.alone(make, (side, loss, small), (side, loss, sizes))[1] for side in SIDES}
    for side in SIDES:
      line = f"{loss} {' x '.join(f'{n:,}' for n in sizes)}, {side}"
      line = f"{line:>36} {seconds[side]:>7.3f} {seconds['ours'] / seconds[side]:>8.2f}"
      print(f"{line} {memory[side]:>9.0f} {memory['ours'] / memory[side]:>8.2f}", flush=True)
      rows.append(dict(loss=loss, sizes=sizes, side=side, seconds=seconds[side], peak_mib=memory[side]))
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
