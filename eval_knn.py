"""k-NN accuracy of a run's encoder, by the protocol of the official DINO code (eval_knn.py).

  python eval_knn.py --workdir=runs/quickstart
  python eval_knn.py --workdir=runs/quickstart --step=500 --k=20 --data=fashion_mnist --data_dir=D

The last line is JSON; the same figures are in WORKDIR/knn.json, and those that other flags
ask for have names of their own, such as WORKDIR/knn_features-flat.json (docs/evaluation.md).
"""

import pathlib
from typing import Any

import numpy as np
from absl import flags

from ssl_jax import build, parallel, restore
from ssl_jax.commands import evaluate
from ssl_jax.commands.evaluate import BATCH_SIZE, FEATURES, STEP, TEST_SPLIT, WORKDIR, features_of, load
from ssl_jax.errors import UserError
from ssl_jax.evaluation import intervals, scores
from ssl_jax.evaluation.accuracy import guessing, knn_scores
from ssl_jax.evaluation.features import Extractor, reading
from ssl_jax.run import cli
from ssl_jax.run.cli import say
from ssl_jax.settings import positive

K = flags.DEFINE_list("k", ["10", "20", "100", "200"], "numbers of neighbours")
TEMPERATURE = flags.DEFINE_float("temperature", 0.07, "of the votes exp(similarity / T)")
BANK_SPLIT = flags.DEFINE_string(
  "bank_split", None, "split of the labelled bank, which may be the test split; by default the run's training split"
)
flags.adopt_module_key_flags(evaluate)  # so that --help shows them


def main() -> int:
  workdir = pathlib.Path(WORKDIR.value)
  try:
    ks = [int(k) for k in K.value]
  except ValueError:
    ks = []
  if not ks or min(ks) < 1:
    raise UserError(f"--k must be whole numbers from 1 on with commas between, got {','.join(K.value)!r}.")
  if not positive().holds(TEMPERATURE.value):
    raise UserError(f"--temperature must be a positive number, got {TEMPERATURE.value}.")
  restored = restore.restore_encoder(workdir, STEP.value)
  config, read = restored.config, reading(restored.encoder, FEATURES.value)
  why = "k-NN classifies by labels"
  bank = load(config, BANK_SPLIT.value or config.data.split, why)
  queries = load(config, TEST_SPLIT.value or config.data.test_split, why)
  queries = queries.numbered_as(bank)
  say(f"step {restored.step} of {workdir}")
  for role, x in (("bank", bank), ("queries", queries)):
    say(f"{role}: {x.name} {x.split}, {len(x):,} images")
    for note in x.notes:
      say(f"{role}: {note}")
  if not queries.is_labelled:
    raise UserError("none of the queries is of a class that the bank has.")

  mesh = parallel.make_mesh()
  batch_size = -(-BATCH_SIZE.value // mesh.size) * mesh.size
  extractor = Extractor(restored.encoder, restored.eval_view, mesh, batch_size, read)
  about = config, f"step_{restored.step}", {"features": FEATURES.value}
  bank_features, bank_labels = features_of(extractor, restored.variables, bank, *about)
  overlap = bank.split != queries.split and build.overlap(evaluate.of_flags(config), bank.split, queries.split)
  if overlap:
    say("note: an image that is in both finds itself; only equal splits leave each out of its own neighbours")
  same = bank.split == queries.split  # each image is its own nearest neighbour then, and must not count
  if same:
    say("bank and queries are the same images: each is left out of its own neighbours")
  query_features, labels = bank_features, bank_labels
  if not same:
    query_features, labels = features_of(extractor, restored.variables, queries, *about)
  exclude = np.arange(len(bank_features)) if same else None
  for role, x, features in (("bank", bank, bank_features), ("queries", queries, query_features)):
    if left_out := len(x) - len(features):
      say(f"{left_out:,} of the {role} cannot be read or {'has' if left_out == 1 else 'have'} no label: left out")

  sets = {"bank": (bank, len(bank_labels)), "test": (queries, len(labels))}
  figures = {"step": restored.step} | evaluate.facts(config, **sets) | {"temperature": TEMPERATURE.value}
  figures |= {"overlap": overlap, "guessing_top1": guessing(bank_labels, labels)}
  figures["feature_norm"] = float(np.mean(np.linalg.norm(bank_features, axis=1)))
  low, high = intervals.wilson(figures["guessing_top1"], len(labels))
  figures |= {"guessing_top1_low": low, "guessing_top1_high": high}
  say(f"guessing the most frequent class: {figures['guessing_top1']:.2f} % (95 %: {low:.2f} to {high:.2f})")
  for k in ks:
    if k > len(bank_features):
      say(f"k={k} is more than the {len(bank_features):,} images of the bank: all of them vote")
    settings: dict[str, Any] = dict(
      k=min(k, len(bank_features)), temperature=TEMPERATURE.value, exclude=exclude, mesh=mesh
    )
    found = knn_scores(bank_features, bank_labels, query_features, labels, **settings)
    score = scores.summarise([scores.scored(found, labels, {}, most=min(5, k))], labels)
    shown = [
      f"{text} {score[name]:6.2f} % (95 %: {score[f'{name}_low']:.2f} to {score[f'{name}_high']:.2f})"
      for name, text in (("top1", "top-1"), ("top5", "top-5"), ("balanced", "balanced"))
    ]
    say(f"k={k:<4} {'  '.join(shown)}")
    figures |= {f"k{k}_{name}": value for name, value in score.items()}
  evaluate.hand_over(figures, workdir, "knn")
  return 0


if __name__ == "__main__":
  cli.run(main, joins=True)
