"""Self-distillation: match the student's distribution over prototypes to the teacher's (DINO, iBOT, DINOv2)."""

import jax
import jax.numpy as jnp
from jax import lax

from ssl_jax.losses._common import check_input, check_temperature, check_whole, wide


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
  pairs = _count_pairs("dino_loss", views, teachers)
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


def distillation_loss(
  student: jax.Array, targets: jax.Array, *, student_temperature: float | jax.Array = 0.1
) -> jax.Array:
  r"""Cross-entropy of the student's views against given distributions of the other views: `dino_loss` after centring.

  .. math:: L = \frac{1}{n B} \sum_{t < T} \sum_{v \neq t} \sum_b
      - \sum_k q_{tbk} \log \mathrm{softmax}(s_{vb} / \tau_s)_k

  over the n = T V - T pairs of a teacher view and another student view.

  Args:
    student: float [V, B, K] logits; the first T views are the teacher's.
    targets: float [T, B, K] probabilities q, T <= V: `sinkhorn_knopp` of all of the teacher's rows, or the softmax of
      its centred logits over its temperature. Takes no gradient.
    student_temperature: > 0, a Python number or a traced scalar.

  Returns:
    float32 scalar (float64 for float64 inputs); log K for a uniform student. DINOv2's global and local terms are the
    two parts of this sum.

  Raises:
    TypeError: an input is not floating point, or the temperature is not a number.
    ValueError: shapes do not fit or have an empty axis, there is no pair of different views, or the temperature is not
      positive and finite.

  Reference: Oquab et al., 2023, arXiv:2304.07193, section 4; loss/dino_clstoken_loss.py and train/ssl_meta_arch.py of
  facebookresearch/dinov2.
  """
  _check_logits("student", student, 3)
  _check_logits("targets", targets, 3)
  check_temperature("student_temperature", student_temperature)
  if student.shape[1:] != targets.shape[1:]:
    raise ValueError(f"student and targets must be [V, B, K] and [T, B, K], got {student.shape} and {targets.shape}.")
  pairs = _count_pairs("distillation_loss", student.shape[0], targets.shape[0])
  log_p = jax.nn.log_softmax(wide(student) / student_temperature, axis=-1)
  targets = lax.stop_gradient(wide(targets))
  every_pair = jnp.sum(log_p * jnp.sum(targets, axis=0, keepdims=True))
  same_view = jnp.sum(log_p[: targets.shape[0]] * targets)
  return (same_view - every_pair) / (pairs * student.shape[1])


def ibot_loss(
  student: jax.Array, targets: jax.Array, weights: jax.Array, *, student_temperature: float | jax.Array = 0.1
) -> jax.Array:
  r"""Cross-entropy of the student's masked patches against the teacher's distributions of the same patches (iBOT).

  .. math:: L = - \sum_u w_u \sum_k q_{uk} \log \mathrm{softmax}(s_u / \tau_s)_k

  Args:
    student: float [U, K], logits of the masked patches of all crops, in any order and padded to a fixed number.
    targets: float [U, K], the teacher's probabilities q of these patches, from crops without a mask. Takes no gradient.
    weights: float [U]: 1 / (2 B m_i) for each of the m_i masked patches of crop i of B images with two crops, and 0 for
      padding, whose entries must be finite. Crops without a mask count in the 2 B.
    student_temperature: > 0, a Python number or a traced scalar.

  Returns:
    float32 scalar (float64 for float64 inputs), a sum: over several devices the mean of their losses is that of the
    global batch, where B counts a device's images.

  Raises:
    TypeError: an input is not floating point, or the temperature is not a number.
    ValueError: shapes do not fit or have an empty axis, or the temperature is not positive and finite.

  Reference: Zhou et al., 2022, arXiv:2111.07832, eq. 2, with the mean over the crops of the means over their patches as
  in loss/ibot_patch_loss.py of facebookresearch/dinov2.
  """
  _check_logits("student", student, 2)
  _check_logits("targets", targets, 2)
  _check_logits("weights", weights, 1)
  check_temperature("student_temperature", student_temperature)
  if student.shape != targets.shape or weights.shape != student.shape[:1]:
    raise ValueError(
      f"student, targets and weights must be [U, K], [U, K] and [U], got {student.shape}, {targets.shape} and "
      f"{weights.shape}."
    )
  log_p = jax.nn.log_softmax(wide(student) / student_temperature, axis=-1)
  entropies = -jnp.sum(lax.stop_gradient(wide(targets)) * log_p, axis=-1)
  return jnp.sum(entropies * lax.stop_gradient(weights).astype(entropies.dtype))


def sinkhorn_knopp(
  logits: jax.Array,
  *,
  temperature: float | jax.Array,
  iterations: int = 3,
  weights: jax.Array | None = None,
  axis_name: str | None = None,
) -> jax.Array:
  r"""Targets that use all prototypes about equally (SwAV, DINOv2): the Sinkhorn-Knopp algorithm.

  From :math:`Q = e^{g / \tau}`, each iteration divides Q by its sums over the samples, so that all prototypes weigh the
  same, and then by its sums over the prototypes, so that each sample is a distribution. The official code's divisions
  by N and K cancel. The first iteration runs on logarithms, and neither overflows nor underflows; after it no sum over
  the samples is below 1 / NK.

  Args:
    logits: float [N, K], the teacher's raw logits: of both crops of all images, or of all masked patches.
    temperature: tau > 0, a Python number or a traced scalar.
    iterations: at least 1.
    weights: [N], 0 for padding, which is left out of all sums; any other value counts as one. None: no padding.
    axis_name: mapped axis over which the samples are split; they are one problem. Alone, a device would balance the
      prototypes over its own few samples.

  Returns:
    [N, K], float32 (float64 for float64 inputs): rows that sum to one, zeros for padding. Takes no gradient.

  Raises:
    TypeError: the logits are not floating point, the temperature is not a number or `iterations` not an integer.
    ValueError: shapes do not fit or have an empty axis, the temperature is not positive and finite, or `iterations` is
      below one.

  Reference: Caron et al., 2020, arXiv:2006.09882, section 3.1 and its appendix's listing; `sinkhorn_knopp_teacher` in
  loss/dino_clstoken_loss.py and loss/ibot_patch_loss.py of facebookresearch/dinov2.
  """
  _check_logits("logits", logits, 2)
  check_temperature("temperature", temperature)
  check_whole("iterations", iterations, 1)
  if weights is not None and weights.shape != logits.shape[:1]:
    raise ValueError(f"weights must have shape [{logits.shape[0]}], got {weights.shape}.")
  scaled = lax.stop_gradient(wide(logits) / temperature)
  real = jnp.ones((logits.shape[0], 1), bool) if weights is None else weights[:, None] != 0
  q = jax.nn.softmax(scaled - _log_sum_exp(jnp.where(real, scaled, -jnp.inf), axis_name), axis=1)
  # From here on Q = q * sample * prototype, of which only the two scales change.
  sample, prototype = real.astype(q.dtype), jnp.ones_like(q[:1])
  with jax.default_matmul_precision("highest"):
    for _ in range(iterations - 1):
      used = sample.T @ q
      prototype = 1 / (used if axis_name is None else lax.psum(used, axis_name))
      sample = jnp.where(real, 1 / (q @ prototype.T), 0)
  return jnp.where(real, q * sample * prototype, 0)


def _log_sum_exp(x, axis_name):
  """Over the first axis and all devices, [1, K]."""
  if axis_name is None:
    return jax.nn.logsumexp(x, axis=0, keepdims=True)
  top = lax.pmax(jnp.max(x, axis=0, keepdims=True), axis_name)
  return top + jnp.log(lax.psum(jnp.sum(jnp.exp(x - top), axis=0, keepdims=True), axis_name))


def _count_pairs(loss, views, teachers):
  """The number of pairs of a teacher view and another student view."""
  pairs = teachers * views - teachers
  if not 1 <= teachers <= views or pairs == 0:
    raise ValueError(f"{loss} needs 1 <= T <= V and V >= 2, got T = {teachers} teacher and V = {views} student views.")
  return pairs


def _check_logits(name, x, ndim):
  check_input(name, x)
  if x.ndim != ndim:
    raise ValueError(f"{name} must have {ndim} axes, got shape {x.shape}.")
