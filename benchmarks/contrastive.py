"""NT-Xent and InfoNCE, value and gradient: time and memory against optax, lightly and the textbook form.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/contrastive.py --json=contrastive.json

Times are CPU seconds, medians, the sides taking turns in one process. Memory is what a fresh process of each side
grows by at most; and, for programs that are only compiled, XLA's own count of temporaries. A side stops where it would
not fit: optax keeps an array of [2N, 2N, d].
"""

import common
import jax
import jax.numpy as jnp
import optax
import torch
from lightly.loss import NTXentLoss

from ssl_jax import info_nce, nt_xent

TEMPERATURE = 0.1


def optax_ntxent(z1, z2):
  labels = jnp.tile(jnp.arange(len(z1)), 2)
  return optax.losses.ntxent(jnp.concatenate([z1, z2]), labels, TEMPERATURE)


def textbook_info_nce(query, key):
  query, key = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (query, key))
  similarity = query @ jax.lax.stop_gradient(key).T / TEMPERATURE
  return jnp.mean(jax.nn.logsumexp(similarity, axis=1) - jnp.diagonal(similarity))


def our_nt_xent(z1, z2):
  return nt_xent(z1, z2, temperature=TEMPERATURE)


def our_info_nce(query, key):
  return info_nce(query, key, temperature=TEMPERATURE)


IN_JAX = dict(ours=our_nt_xent, optax=optax_ntxent, our_info_nce=our_info_nce, textbook_info_nce=textbook_info_nce)


def compile_gradient(loss, n, width):
  z = jax.ShapeDtypeStruct((n, width), jnp.float32)
  return jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(z, z).compile()


def make(side, n, width):
  """A function that computes value and gradients once and returns them."""
  z = jax.random.normal(jax.random.key(0), (2, n, width))
  if side in IN_JAX:
    program, arguments = compile_gradient(IN_JAX[side], n, width), [*z]
    return lambda: jax.block_until_ready(program(*arguments))
  loss, leaves = NTXentLoss(TEMPERATURE), [torch.tensor(jax.device_get(x), requires_grad=True) for x in z]

  def call():
    value = loss(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves)

  return call


def check(width):
  """The sides agree on a small batch."""
  values = {side: float(make(side, 256, width)()[0]) for side in ("ours", "optax", "lightly")}
  assert max(values.values()) - min(values.values()) < 1e-4, values


def measure(sides, n, args):
  """The row of a batch: its size, then CPU seconds and peak MiB a side."""
  row = dict(n=n)
  repeats = args.repeats if n < 4096 else 1
  seconds = common.take_turns({side: make(side, n, args.width) for side in sides if side != "optax"}, repeats)
  if "optax" in sides:  # Not in turns: its gigabytes would slow the others down.
    seconds |= common.take_turns(dict(optax=make("optax", n, args.width)), 1)
  for side in sides:
    _, memory = common.alone(make, (side, 64, args.width), (side, n, args.width))
    row[side] = dict(seconds=seconds[side], peak_mib=memory)
  return row


def show(row, sides):
  line = f"{row['n']:>7}"
  for what, digits in (("seconds", 3), ("peak_mib", 0)):
    line += f" | {row[sides[0]][what]:>8.{digits}f}"
    for side in sides[1:]:
      value = row[side][what] if side in row else float("nan")
      line += f" {value:>9.{digits}f} {row[sides[0]][what] / value:>7.3f}"
  print(line, flush=True)


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--run", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192, 16384], help="nt_xent")
  parser.add_argument("--optax_limit", type=int, default=512, help="largest batch: 2 GiB; twice that takes 8")
  parser.add_argument("--lightly_limit", type=int, default=8192, help="largest batch: 5 GiB; twice that takes 17")
  parser.add_argument("--info_nce", type=int, nargs="*", default=[1024, 4096], help="batches, against the textbook")
  parser.add_argument("--compile", type=int, nargs="*", default=[16384, 32768, 65536], help="XLA's count alone")
  parser.add_argument("--width", type=int, default=128)
  parser.add_argument("--repeats", type=int, default=9, help="below 4,096; from there once, after a warm-up")
  args = parser.parse_args()
  common.introduce()
  check(args.width)
  rows = []
  print(f"value and gradient, d = {args.width}, float32: CPU seconds | peak MiB, each with ours / it")
  print("nt_xent: N | ours, lightly, optax")
  limits = dict(ours=max(args.run, default=0), lightly=args.lightly_limit, optax=args.optax_limit)
  for n in args.run:
    rows.append(measure([side for side, limit in limits.items() if n <= limit], n, args))
    show(rows[-1], list(limits))
  print("info_nce: N | ours, the textbook's matrix")
  for n in args.info_nce:
    sides = ["our_info_nce", "textbook_info_nce"]
    rows.append(measure(sides, n, args))
    show(rows[-1], sides)
  print("nt_xent: N | XLA's temporaries of ours in MiB")
  for n in args.compile:
    temporaries = compile_gradient(our_nt_xent, n, args.width).memory_analysis().temp_size_in_bytes / common.MIB
    rows.append(dict(n=n, temporaries_mib=temporaries))
    print(f"{n:>7} | {temporaries:>8.1f}", flush=True)
  common.write_json(args, rows)


if __name__ == "__main__":
  main()
