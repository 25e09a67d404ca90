"""What a run tells people: what it is, how far it is, what it was worth, what went wrong."""

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ssl_jax import flops, optim, parallel
from ssl_jax.run.cli import large_pages_hint

if TYPE_CHECKING:
  from ssl_jax.build import Run


def describe(run: "Run") -> list[str]:
  """What the user sees first."""
  config, params = run.config, run.state.params
  encoder, all_of_it = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (params["encoder"], params))
  images, channels = run.train_set, config.data.channels
  peak = optim.scaled_learning_rate(config.lr.base, config.batch_size, config.lr.scaling)
  lines = [
    f"devices: {run.mesh.size} x {run.mesh.devices.flat[0].device_kind}, in {jax.process_count()} process(es)",
    f"data: {images.name} {images.split}, {len(images):,} images {images.kind}",
    f"{config.method.name}: {encoder:,} parameters in the encoder, {all_of_it:,} in all",
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
    lines.append(f"{missing}: the online k-NN is off")
  elif run.bank and config.knn.k > len(run.bank):
    lines.append(f"knn.k={config.knn.k} is more than the {len(run.bank)} images of the bank: all of them vote")
  return [*lines, hint] if (hint := large_pages_hint()) else lines


def progress(run: "Run", row: dict) -> str:
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


def underway(run: "Run", step: int, rate: float) -> str:
  """The live line between two that are logged; `rate` is 0 where it is not known yet."""
  done = f"step {step}/{run.steps}  {100 * step / run.last_step:.0f} %"
  if not rate:
    return done
  left = format_duration((run.last_step - step) * run.config.batch_size / rate)
  return f"{done}  {rate:,.0f} images/s  {left} left"


def summary(config, rows: list[dict]) -> list[str]:
  """What the encoder is worth, beside its untrained self and the pixels."""
  scored = [row for row in rows if "knn_top1" in row]
  if not scored:
    return []
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
  return [title, *(f"  {name:<22}{value:6.2f} %" for name, value in figures.items())]


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
