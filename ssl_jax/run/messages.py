"""What a run tells people: what it is, how far it is, what it was worth, what went wrong."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import flops, optim, parallel
from ssl_jax.evaluation import guard
from ssl_jax.run.cli import large_pages_hint

if TYPE_CHECKING:
  from ssl_jax.build import Run


def describe(run: "Run") -> list[str]:
  """What the user sees first."""
  config, params = run.config, run.state.params
  encoder = run.method.encoder(params, run.state.state)["params"]
  encoder, all_of_it = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (encoder, params))
  images, channels = run.train_set, config.data.channels
  peak = optim.scaled_learning_rate(config.lr.base, config.batch_size, config.lr.scaling)
  trained = "in all" if "encoder" in params else "are trained"
  lines = [
    f"devices: {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, in {jax.process_count()} process(es)",
    f"data: {images.name} {images.split}, {len(images):,} images {images.kind}",
    f"{config.method.name}: {encoder:,} parameters in the encoder, {all_of_it:,} {trained}",
    f"state: {parallel.bytes_a_device(run.state) / 2**20:,.1f} MiB a device"
    f"{', sharded' if config.parallel.shard_state else ''}",
    f"batch {config.batch_size}, {run.steps_per_epoch} steps an epoch, {run.steps} steps, ending at {run.last_step}",
    f"{flops.in_words(run.flops)} a step" + (f" of the devices' {flops.in_words(run.peak)}/s" if run.peak else ""),
    f"learning rate: base {config.lr.base:g}, {config.lr.scaling} scaling, peak {peak:g}, end {config.lr.end:g}",
  ]
  lines += [f"{x.split}: {note}" for x in (run.train_set, run.test_set) if x for note in x.notes]
  if run.chance is not None:
    lines.append(f"loss at chance: {run.chance:.4f}")
  if channels not in (1, 3):
    lines.append(f"images of {channels} channels: colour jitter and grayscale are left out")
  if not run.test_set:
    labelled = run.train_set.is_labelled
    missing = (
      f"data.test_split={config.data.test_split!r} names no images of classes that it trains on"
      if labelled
      else "no labels"
    )
    lines.append(f"{missing}: {'nothing is scored' if run.classifier else 'the online k-NN is off'}")
  elif run.bank and not run.classifier and config.knn.k > len(run.bank):
    lines.append(f"knn.k={config.knn.k} is more than the {len(run.bank)} images of the bank: all of them vote")
  return [*lines, hint] if (hint := large_pages_hint()) else lines


def step_line(run: "Run", row: dict) -> str:
  """The line of a step that is logged."""
  rate, share = row["images_per_second"], row["input_share"]
  used = f", MFU {100 * row['mfu']:.0f} %" if "mfu" in row else ""
  waits = f", {100 * share:.0f} % of the time for input" if share > 0.05 else ""
  chance = "" if run.chance is None else f" (chance {run.chance:.2f})"
  left = format_duration((run.last_step - row["step"]) * run.config.batch_size / rate)
  return (
    f"step {row['step']}/{run.steps}  epoch {row['epoch']:.2f}  loss {row['loss']:.4f}{chance}  "
    f"lr {row['learning_rate']:.2e}  {rate:,.0f} images/s{used}{waits}  {left} left"
  )


def live_line(run: "Run", step: int, rate: float) -> str:
  """The live line between two that are logged; `rate` is 0 where it is not known yet."""
  done = f"step {step}/{run.steps}  {100 * step / run.last_step:.0f} %"
  if not rate:
    return done
  left = format_duration((run.last_step - step) * run.config.batch_size / rate)
  return f"{done}  {rate:,.0f} images/s  {left} left"


def evaluation(row: dict) -> str:
  """What an evaluation found, in a line."""
  if "test_top1" in row:
    return f"test {_top1(row)}, balanced {row['test_balanced']:.2f} %"
  if "knn_top1" in row:
    return f"k-NN top-1 {row['knn_top1']:.2f} %, balanced {row['knn_balanced']:.2f} %"
  return in_words({name.removeprefix("encoder_"): x for name, x in row.items() if name.startswith("encoder_")})


def in_words(measured: dict[str, float]) -> str:
  """What was measured without labels: "rankme 12.3  effective rank 4.5"."""
  return "  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in measured.items())


def _top1(row):
  return f"top-1 {row['test_top1']:.2f} % (95 %: {row['test_top1_low']:.2f} to {row['test_top1_high']:.2f})"


def summary(config, rows: list[dict]) -> list[str]:
  """What the encoder is worth, beside its untrained self and the pixels; or what its classifier is, beside guessing."""
  if classified := [row for row in rows if "test_top1" in row]:
    guessed = f"; guessing {classified[0]['guessing_top1']:.2f} %" if "guessing_top1" in classified[0] else ""
    return [
      f"test {_top1(classified[-1])} on {classified[-1]['test_images']:,} images of {config.data.test_split}{guessed}"
    ]
  scored, told = [row for row in rows if "knn_top1" in row], guard.in_words(rows)
  looked_at = [row for row in rows if "encoder_rankme" in row]
  if not scored and looked_at:
    begin = "as loaded" if getattr(config, "init_from", None) else "untrained"
    return [
      "without labels, which is no accuracy (docs/evaluation.md says what it tells):",
      f"  {begin}: {evaluation(looked_at[0])}",
      f"  trained: {evaluation(looked_at[-1])}",
      *told,
    ]
  if not scored:
    return told
  first, last = scored[0], scored[-1]
  figures = {
    "encoder": last["knn_top1"],
    "encoder, balanced": last.get("knn_balanced"),
    f"encoder, {'as loaded' if getattr(config, 'init_from', None) else 'untrained'}": first["knn_top1"],
    "guessing": first.get("guessing_top1"),
    "raw pixels": first.get("pixels_top1"),
    "pixels, centred": first.get("pixels_centred_top1"),
    "pixels, standardised": first.get("pixels_standardised_top1"),
  }
  figures = {name: value for name, value in figures.items() if value is not None}  # large images have no pixel lines
  title = f"k-NN top-1 (cosine, k={config.knn.k}, T={config.knn.temperature:g}) on {config.data.test_split}:"
  return [title, *(f"  {name:<22}{value:6.2f} %" for name, value in figures.items()), *told]


def nonfinite(step: int, values: dict, state: dict) -> str:
  """What went wrong, from a step's metrics and the state, which that step left as it was."""
  bad = ", ".join(name for name, value in values.items() if not np.isfinite(value))
  leaf = nonfinite_leaf(state)
  of = "gradient" if not np.isfinite(values["grad_norm"]) else "update that the optimizer made of the gradient"
  cause = f"the first array that is not finite is {leaf}" if leaf else f"the state is finite, so the {of} is not"
  return (
    f"step {step} is not finite ({bad}): {cause}. Nothing of it was kept, and checkpoints from before are untouched. "
    "A lower lr.base, in a new --workdir, often helps."
  )


def format_duration(seconds: float) -> str:
  """'1:02:03' or '02:03'."""
  minutes, seconds = divmod(max(0, round(seconds)), 60)
  hours, minutes = divmod(minutes, 60)
  return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes:02d}:{seconds:02d}"


def nonfinite_leaf(tree: Any) -> str | None:
  """The path of the first array of a tree that holds NaN or infinity."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    if not jnp.all(jnp.isfinite(leaf)):  # wherever its parts are
      return jax.tree_util.keystr(path, simple=True, separator="/")
  return None
