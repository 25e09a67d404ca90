"""Writes a run's encoder as a folder that timm, transformers or torchvision loads, and compares features.

  python -m ssl_jax export --workdir=runs/dino --out=exported                  for timm, and transformers beside timm
  python -m ssl_jax export --workdir=runs/dino --out=exported --to=hf          for transformers alone

The folder gets model.safetensors, config.json and README.md, a model card; for transformers preprocessor_config.json
too. Where the library is installed, the folder is loaded by it, and the difference of the features is printed.

  --workdir=DIR        the run
  --out=DIR            the folder to write, new or empty
  --to=TARGET          timm, hf (ViTModel, Dinov2Model, Dinov2WithRegistersModel or ResNetModel, by the encoder), hf_mae
                       (ViTMAEForPreTraining, with the decoder), torchvision, safetensors (the arrays alone) or
                       stablehlo (the features as a program for jax); by default timm, or safetensors where timm has
                       no class
  --step=N             which checkpoint; by default the newest
"""

import functools
import pathlib
import sys
from typing import Any

import jax
import numpy as np
from absl import flags

from ssl_jax import augment, build, data, restore
from ssl_jax import config as configs
from ssl_jax.commands import check_writable
from ssl_jax.errors import UserError
from ssl_jax.models.mae import MAEDecoder
from ssl_jax.run import cli, cluster, log, whole
from ssl_jax.run.workdir import read_resolved
from ssl_jax.weights import export, proof

_IMAGES = 8  # that are compared
# Which of a method's encoders its evaluation takes, and so an export.
_ROLES = {
  "barlow_twins": "the encoder, without the projector",
  "byol": "the online encoder, not the target",
  "dino": "the teacher, the student's moving average",
  "dinov2": "the teacher, the student's moving average",
  "lejepa": "the encoder, without the linear layer to the embedding and the projector",
  "mae": "the encoder, without the decoder",
  "moco_v1": "the query encoder, not the momentum encoder",
  "moco_v2": "the query encoder, not the momentum encoder",
  "moco_v3": "the base encoder, not the momentum encoder",
  "simclr": "the encoder, without the projector",
  "simsiam": "the encoder, without projector and predictor",
  "vicreg": "the encoder, without the projector",
}


def run(workdir: pathlib.Path, out: pathlib.Path, target: str | None, step: int | None) -> int:
  """Exports. Returns the exit status."""
  restored = restore.restore_run(workdir, step)
  check_writable("--out", out / "model.safetensors")
  config, (encoder, variables) = restored.config, restore.with_mask_token(restored)
  variables = jax.device_get(variables)
  view, channels = configs.eval_view(config), config.data.channels
  if target is None and (reason := export.why_not(encoder, "timm", channels)):
    target = "safetensors"
    cli.say(f"{reason}: the arrays alone are written")
  facts = facts_of(workdir, restored)
  images, source = real_images(config, view)
  with whole.folder(out) as work:
    if target == "hf_mae":
      exported, differences = with_decoder(restored, view, facts, work, images)
    else:
      make = export.make_program if target == "stablehlo" else functools.partial(export.make, target=target or "timm")
      exported = make(encoder, variables, view, channels=channels, facts=facts)
      export.write(exported, work)
      differences = proof.prove(exported, work, encoder, variables, images) if len(images) else {}
    lines = [
      f"{library}: the outputs for {len(images)} images of {source} differ by at most {value:.1e} of the largest"
      for library, value in differences.items()
    ]
    if not lines:
      needed = " and ".join(exported.readers)
      missing = f"{needed} and torch are needed here" if needed else "ssl_jax alone loads these arrays"
      lines = [f"nothing was proven: {missing if len(images) else 'there are no images to compare by'}"]
    (work / "README.md").write_text(card(out.resolve().name, exported, facts, view, lines))
  left = [f"left out, since this layout has no place for it: {name}" for name in exported.left_out]
  for line in [f"step {restored.step} of {workdir}: {facts['weights']}", *left, *lines]:
    cli.say(line)
  for path in sorted(out.iterdir()):
    cli.say(f"wrote {path}")
  if wrong := [library for library, value in differences.items() if not value <= proof.TOLERANCE]:
    raise UserError(f"the outputs of {', '.join(wrong)} differ by more than {proof.TOLERANCE:g}: do not use {out}.")
  return 0


def with_decoder(restored: restore.RestoredRun, view, facts, out: pathlib.Path, images: np.ndarray):
  """Writes a MAE with its decoder. Returns (export.Exported, the differences)."""
  config = restored.config
  encoder: Any = restored.encoder  # a ViT
  if config.method.name != "mae":
    raise UserError(f"--to=hf_mae is for runs of mae, and this is one of {config.method.name}: --to=hf.")
  facts["weights"] = "the encoder and the decoder"
  channels, settings = config.data.channels, config.method
  decoder = MAEDecoder(encoder.patch_size**2 * channels, **settings.decoder)
  params = jax.device_get(restored.params)
  exported = export.make_mae(encoder, decoder, params, view, settings=settings, channels=channels, facts=facts)
  export.write(exported, out)
  proven = proof.prove_mae(out, encoder, decoder, params, images, settings.mask_ratio) if len(images) else {}
  return exported, proven


def facts_of(workdir: pathlib.Path, restored: restore.RestoredRun) -> dict[str, Any]:
  """What the run was, and what it was worth at this step, as JSON holds it."""
  config, resolved = restored.config, read_resolved(workdir)
  name = f"moco_v{config.method.version}" if config.method.name == "moco" else config.method.name
  rows = [row for row in log.read_rows(workdir / "metrics.jsonl") if row["step"] <= restored.step]
  figures = {}
  for key in ("loss", "knn_top1", "knn_balanced", "guessing_top1"):
    if values := [row[key] for row in rows if key in row]:
      figures[key] = values[-1]
  return {
    "method": name,
    "weights": _ROLES.get(name, "the encoder that its evaluation takes"),
    "data": pathlib.Path(config.data.folder).name if config.data.folder else config.data.name,
    "split": config.data.split,
    "images": resolved.get("images"),
    "step": restored.step,
    "steps": resolved.get("steps"),
    "batch_size": config.batch_size,
    "figures": figures,
  }


def real_images(config, view: augment.EvaluationView) -> tuple[np.ndarray, str]:
  """A few images as the encoder takes them, and where they are from: the run's own, or the built-in ones."""
  try:
    dataset = build.dataset(config, config.data.test_split or config.data.split).tried()
  except UserError:
    if config.data.channels not in (1, 3):
      return np.zeros((0, view.size, view.size, config.data.channels), np.float32), "none"
    dataset = data.load("fashion_mnist_mini", "test", channels=config.data.channels)
  some = dataset.thinned(_IMAGES)
  images, _, keep = next(iter(some.in_order(view, len(some))))
  return np.asarray(augment.evaluation_view(np.asarray(images)[keep], view)), f"{dataset.name} {dataset.split}"


def card(
  name: str, exported: export.Exported, facts: dict[str, Any], view: augment.EvaluationView, checked: list[str]
) -> str:
  """The model card, with the header that the Hugging Face Hub reads."""
  library = exported.readers[0] if exported.readers and exported.target != "torchvision" else None
  head = [f"library_name: {library}"] if library else []
  head += ["pipeline_tag: image-feature-extraction", f"tags: [self-supervised, {facts['method']}]"]
  values = sum(x.size for x in exported.state.values())
  of = f" of {facts['steps']:,}" if facts["steps"] else ""
  many = f", {facts['images']:,} images" if facts["images"] else ""
  look = f"short side to {view.resize} pixels ({view.interpolation}), centre crop of {view.size}, values in [0, 1]"
  if view.mean:
    look += f", less the mean {tuple(view.mean)}, by the standard deviation {tuple(view.std)}"
  names = {
    "loss": "training loss",
    "knn_top1": "k-NN top-1, %",
    "knn_balanced": "k-NN balanced, %",
    "guessing_top1": "guessing the most frequent class, %",
  }
  figures = [f"| {names[key]} | {value:.4g} |" for key, value in facts["figures"].items()]
  table = ["", "| at this step | |", "|---|---|", *figures] if figures else []
  shape = ", ".join(f"{name} {value}" for name, value in exported.config["ssl_jax"]["encoder"].items())
  usage = exported.usage.replace("FOLDER", name)
  imports = sorted({*exported.readers, "torch"} if exported.readers else {"ssl_jax"})
  if exported.program is not None:
    imports = ["jax.export"]
  return "\n".join(
    [
      *("---", *head, "---", f"# {name}", ""),
      f"An image encoder without a classifier, pre-trained without labels by {facts['method']} on {facts['data']} "
      f"({facts['split']}{many}); {values:,} values.",
      "",
      f"- Weights: {facts['weights']}, after step {facts['step']:,}{of} of {facts['batch_size']} images.",
      *(f"- Without {name}, for which this layout has no place." for name in exported.left_out),
      f"- Images: {look}.",
      f"- Encoder: {shape}.",
      *table,
      *("", "```python", f"import {', '.join(imports)}", "", usage, "```", ""),
      *(f"Checked when it was written: {line}." for line in checked),
      "",
    ]
  )


def main() -> None:
  """The command."""
  if not {"-h", "--help"}.isdisjoint(sys.argv):  # absl's own would list every flag of every library
    print(__doc__.strip())
    return
  workdir = flags.DEFINE_string("workdir", None, "the run")
  out = flags.DEFINE_string("out", None, "the folder to write, new or empty")
  target = flags.DEFINE_enum("to", None, [*export.TARGETS, "hf_mae", "stablehlo"], "for which library")
  step = flags.DEFINE_integer("step", None, "which checkpoint; by default the newest")

  def start():
    if not workdir.value or not out.value:
      raise UserError("give a run and a folder: --workdir=runs/quickstart --out=exported")
    folder = pathlib.Path(out.value)
    with cluster.ending_together(orderly=UserError, folder=folder):
      return run(pathlib.Path(workdir.value), folder, target.value, step.value)

  cli.run(start)
