"""Self-distillation: match the student's distribution over prototypes to the teacher's (DINO)."""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import check_input, check_temperature, wide


def dino_loss(
  student: jax.Array,
  teacher: jax.Array,
  center: jax.Array,
  *,
  student_temperature: float | jax.Array = 0.1,
  teacher_temperature: float | jax.Array,
) -> jax.Array:
  r"""Cross-entropy of the student's views against the centred, sharpened teacher of the other views.

  .. math:: L = \frac{1}{n B} \sum_{t < T} \sum_{v \neq t} \sum_b
      - \sum_k q_{tbk} \log \mathrm{softmax}(s_{vb} / \tau_s)_k, \quad
      q_{tb} = \mathrm{softmax}((g_{tb} - c) / \tau_t)

  over the n = T V - T pairs of a teacher view and another student view. As softmax targets sum to one, each student
  view costs one log-sum-exp and one product with the sum of its targets, however many teacher views there are.

  Args:
    student: float [V, B, K] logits; the first T views are the teacher's.
    teacher: float [T, B, K] logits, T <= V. Takes no gradient.
    center: float [K], subtracted from the teacher's logits: the one from before this batch. Takes no gradient.
    student_temperature, teacher_temperature: > 0, Python numbers or traced scalars.

  Returns:
    float32 scalar (float64 for float64 inputs); log K for a uniform student.

  Raises:
    TypeError: an input is not floating point, or a temperature is not a number.
    ValueError: shapes do not fit or have an empty axis, there is no pair of different views, or a temperature is not
      positive and finite.

  Reference: Caron et al., 2021, arXiv:2104.14294, eq. 3 and algorithm 1; `DINOLoss` in main_dino.py of
  facebookresearch/dino.
  """
  _check_logits("student", student, 3)
  _check_logits("teacher", teacher, 3)
  _check_logits("center", center, 1)
  check_temperature("student_temperature", student_temperature)
  check_temperature("teacher_temperature", teacher_temperature)
  views, teachers = student.shape[0], teacher.shape[0]
  if student.shape[1:] != teacher.shape[1:] or center.shape != student.shape[-1:]:
    raise ValueError(
      f"student, teacher and center must be [V, B, K], [T, B, K] and [K], got {student.shape}, {teacher.shape} and "
      f"{center.shape}."
    )
  pairs = teachers * views - teachers
  if not 1 <= teachers <= views or pairs == 0:
    raise ValueError(
      f"dino_loss needs 1 <= T <= V and V >= 2, got T = {teachers} teacher and V = {views} student views."
    )
  logits = wide(student) / student_temperature
  targets = jax.nn.softmax((wide(teacher) - wide(center)[None, None]) / teacher_temperature, axis=-1)
  targets = lax.stop_gradient(targets)
  log_z = jax.nn.logsumexp(logits, axis=-1)  # [V, B]
  agreement = jnp.sum(logits * jnp.sum(targets, axis=0, keepdims=True), axis=-1)  # with all teacher views
  own = jnp.sum(logits[:teachers] * targets, axis=-1)  # with the same view, which is excluded
  total = teachers * jnp.sum(log_z) - jnp.sum(log_z[:teachers]) - jnp.sum(agreement) + jnp.sum(own)
  return total / (pairs * student.shape[1])


def dino_center(
  center: jax.Array, teacher: jax.Array, *, momentum: float = 0.9, axis_name: str | None = None
) -> jax.Array:
  """The centre after this batch: momentum * center + (1 - momentum) * mean of the teacher's raw logits.

  Args:
    center: float [K].
    teacher: float [T, B, K] logits, before centring and temperature.
    momentum: in [0, 1].
    axis_name: mapped axis over which the batch is split.

  Returns:
    [K], float32 (float64 for float64 inputs), the same on every device. Takes no gradient.

  Raises:
    TypeError: an input is not floating point.
    ValueError: shapes do not fit or have an empty axis.

  Reference: Caron et al., 2021, arXiv:2104.14294, eq. 4; `update_center` in main_dino.py of facebookresearch/dino.
  """
  _check_logits("center", center, 1)
  _check_logits("teacher", teacher, 3)
  if center.shape != teacher.shape[-1:]:
    raise ValueError(f"center and teacher must be [K] and [T, B, K], got {center.shape} and {teacher.shape}.")
  mean = jnp.mean(lax.stop_gradient(wide(teacher)), axis=(0, 1))
  if axis_name is not None:
    mean = lax.pmean(mean, axis_name)
  return momentum * lax.stop_gradient(wide(center)) + (1 - momentum) * mean


def _check_logits(name, x, ndim):
  check_input(name, x)
  if x.ndim != ndim:
    raise ValueError(f"{name} must have {ndim} axes, got shape {x.shape}.")
