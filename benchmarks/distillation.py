"""DINO's loss and centre, value and gradient to the student: time and memory against the official form and lightly.

  pip install -r requirements.txt -r requirements-bench.txt
  PYTHONPATH=. taskset -c 0 python benchmarks/distillation.py --json=distillation.json

"official" is what `DINOLoss` in main_dino.py of facebookresearch/dino computes, written anew: one cross-entropy a pair
of views. CPU seconds, medians, the sides taking turns; peak memory is the growth of a fresh process, gradient included.
"""

import common
import jax
import numpy as np
import torch
from lightly.loss import DINOLoss

from ssl_jax import dino_center, dino_loss

STUDENT, TEACHER, MOMENTUM = 0.1, 0.04, 0.9  # temperatures, and the centre's momentum


def logits(views, batch, prototypes):
  """Student [V, B, K], teacher [2, B, K]."""
  rng = np.random.default_rng(0)
  return [0.3 * rng.standard_normal((n, batch, prototypes), dtype=np.float32) for n in (views, 2)]


def ours(student, teacher):
  def loss(student, teacher, center):
    value = dino_loss(student, teacher, center, student_temperature=STUDENT, teacher_temperature=TEACHER)
    return value, dino_center(center, teacher, momentum=MOMENTUM)

  arguments = [*map(jax.numpy.array, (student, teacher)), jax.numpy.zeros(student.shape[-1])]
  program = jax.jit(jax.value_and_grad(loss, has_aux=True)).lower(*arguments).compile()
  return lambda: jax.block_until_ready(program(*arguments))


def official(student, teacher):
  views, batch = student.shape[:2]
  student = torch.tensor(student).flatten(0, 1).requires_grad_()
  teacher = torch.tensor(teacher).flatten(0, 1)
  center = torch.zeros(1, student.shape[-1])

  def call():
    logits = (student / STUDENT).chunk(views)
    targets = torch.softmax((teacher - center) / TEACHER, dim=-1).detach().chunk(2)
    total, pairs = 0, 0
    for i, target in enumerate(targets):
      for j, logit in enumerate(logits):
        if i != j:
          total += torch.sum(-target * torch.log_softmax(logit, dim=-1), dim=-1).mean()
          pairs += 1
    value = total / pairs
    new_center = MOMENTUM * center + (1 - MOMENTUM) * torch.sum(teacher, dim=0, keepdim=True) / (2 * batch)
    return (value.detach(), new_center), torch.autograd.grad(value, student)[0]

  return call


def lightly(student, teacher):
  loss = DINOLoss(student.shape[-1], student_temp=STUDENT, center_momentum=MOMENTUM)
  student = [torch.tensor(view, requires_grad=True) for view in student]
  teacher = [torch.tensor(view) for view in teacher]

  def call():
    loss.center.zero_()  # every call starts from the same centre
    value = loss(teacher, student, teacher_temp=TEACHER)
    return (value.detach(), loss.center), torch.autograd.grad(value, student)

  return call


SIDES = dict(ours=ours, official=official, lightly=lightly)


def make(side, views, batch, prototypes):
  return SIDES[side](*logits(views, batch, prototypes))


def main():
  parser = common.arguments(__doc__)
  parser.add_argument("--views", type=int, default=10, help="crops, two of them the teacher's")
  parser.add_argument("--batch", type=int, default=16)
  parser.add_argument("--prototypes", type=int, default=65536)
  parser.add_argument("--repeats", type=int, default=7)
  args = parser.parse_args()
  common.introduce()
  shape = args.views, args.batch, args.prototypes
  calls = {side: make(side, *shape) for side in SIDES}
  values = {side: float(call()[0][0]) for side, call in calls.items()}
  assert max(values.values()) < 1.0001 * min(values.values()), values
  seconds = common.take_turns(calls, args.repeats)
  memory = {side: common.alone(make, (side, 3, 2, 64), (side, *shape))[1] for side in SIDES}
  print(f"{args.views} crops x batch {args.batch} x {args.prototypes:,} prototypes, float32")
  print(f"{'':>9} {'CPU s':>7} {'ours/it':>8} {'peak MiB':>9} {'ours/it':>8}")
  for side in SIDES:
    line = f"{side:>9} {seconds[side]:>7.3f} {seconds['ours'] / seconds[side]:>8.2f}"
    print(f"{line} {memory[side]:>9.0f} {memory['ours'] / memory[side]:>8.2f}")
  common.write_json(args, [dict(side=side, seconds=seconds[side], peak_mib=memory[side]) for side in SIDES])


if __name__ == "__main__":
  main()
