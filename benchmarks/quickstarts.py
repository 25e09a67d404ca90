"""What the quickstarts' encoders are worth, by every protocol: trains several seeds, judges them, prints a table.

  python benchmarks/quickstarts.py --workdir=runs/quickstarts --seeds 0 1 2
  python benchmarks/quickstarts.py --workdir=runs/quickstarts --seeds 0 --methods simclr --columns knn logreg

It calls the project's own commands, each in a process of its own, and prints each with the seconds that it took. What a
command has finished is not made again, so a killed one goes on, and a table can grow. All figures are top-1 on the
built-in test images, means over the seeds with the range from the lowest to the highest. The penalty C is chosen on a
held-out tenth of the training images. Fine-tuning is MAE's protocol, and is done for MAE alone.
"""

import argparse
import json
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
METHODS = {
  "simclr": ("SimCLR", "quickstart"),
  "moco": ("MoCo v2", "moco_quickstart"),
  "byol": ("BYOL", "byol_quickstart"),
  "dino": ("DINO", "dino_quickstart"),
  "mae": ("MAE", "mae_quickstart"),
}
# {column: its labels}; fine-tuning is compared with the same network from scratch, the others with the untrained one.
LOGREG = {"logreg": "all", "logreg 10 per class": "10-per-class", "logreg 1%": "1%", "logreg 10%": "10%"}
FINETUNE = {"finetune": "all", "finetune 10%": "10%"}
COLUMNS = ("knn", *LOGREG, "linear", *FINETUNE)
# Of few and small features (DINO's, MAE's) larger C are the best; of thousands they take minutes each.
FEW, MANY = "--C=0.1,1,10,100", "--C=0.003,0.03,0.3"


def commands(method, seed, column, folder, pixels=True):
  """[(a command, the file that it writes last)]: what a column needs, in order; the pixels need be tried only once."""
  run = folder / f"{method}_{seed}"
  train = f"train.py --config=configs/{METHODS[method][1]}.py --config.seed={seed} --workdir={run}", run / "report.json"
  if column == "knn":
    return [train]
  if column in LOGREG:
    labels = LOGREG[column]
    name = "linear.json" if labels == "all" else f"linear_labels-{labels.replace('%', 'pct')}.json"
    penalties = FEW if method in ("dino", "mae") else MANY
    command = f"eval_linear.py --workdir={run} {penalties} --labels={labels} --cache{'' if pixels else ' --nopixels'}"
    return [train, (command, run / name)]
  if column == "linear":
    recipe = f"--config=configs/linear.py:{method} --config.batch_size=256 --config.epochs=10"
    command = f"eval_linear.py --protocol=linear --workdir={run} {recipe} --seed={seed}"
    return [train, (command, run / f"linear_{method}{f'_seed-{seed}' if seed else ''}.json")]
  found = [train]
  for source, origin in (("finetuned", run), ("scratch", "scratch")):
    workdir = folder / f"{method}_{seed}_{source}_{FINETUNE[column].replace('%', 'pct')}"
    command = f"finetune.py --from={origin} --like={run} --labels={FINETUNE[column]} --config.seed={seed}"
    found.append((f"{command} --workdir={workdir}", workdir / "finetune.json"))
  return found


def figures(method, seed, column, folder):
  """{"encoder" | "compared" | "pixels" | "standardised": top-1} of a column whose commands have run."""
  files = [file for _, file in commands(method, seed, column, folder)]
  if column == "knn":
    rows = [json.loads(line) for line in files[0].with_name("metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "knn_top1" in row]
    first, last = rows[0], rows[-1]["knn_top1"]
    pixels = dict(pixels=first["pixels_top1"], standardised=first["pixels_standardised_top1"])
    return dict(encoder=last, compared=first["knn_top1"]) | pixels
  found = [json.loads(file.read_text()) for file in files[1:]]
  if column in FINETUNE:
    return dict(encoder=found[0]["top1"], compared=found[1]["top1"])
  names = dict(encoder="top1", compared="untrained_top1", pixels="pixels_top1", standardised="pixels_standardised_top1")
  return {name: found[0][key] for name, key in names.items() if key in found[0]}


def call(command):
  start = time.perf_counter()
  done = subprocess.run([sys.executable, *shlex.split(command)], cwd=ROOT, capture_output=True, text=True)
  print(f"{time.perf_counter() - start:6.0f} s  python {command}", flush=True)
  if done.returncode:
    sys.exit(done.stdout[-2000:] + done.stderr[-2000:])


def in_words(values):
  """The mean and the range of one figure over the seeds."""
  if not values:
    return "-"
  spread = f" ({min(values):.2f} to {max(values):.2f})" if max(values) > min(values) else ""
  return f"{sum(values) / len(values):.2f}{spread}"


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--workdir", required=True, help="for all runs")
  parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
  parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
  parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
  args = parser.parse_args()
  folder = pathlib.Path(args.workdir).resolve()
  table = {}
  for seed in args.seeds:
    for method in args.methods:
      for column in args.columns:
        if column in FINETUNE and method != "mae":
          continue
        first = (method, seed) == (args.methods[0], args.seeds[0])
        for command, file in commands(method, seed, column, folder, first):
          if not file.exists():
            call(command)
        for line, value in figures(method, seed, column, folder).items():
          name = (method, line) if line in ("encoder", "compared") else (None, line)
          table.setdefault(name, {}).setdefault(column, []).append(value)
  print(f"\n| | {' | '.join(args.columns)} |\n|---|{'---|' * len(args.columns)}")
  names = dict(encoder="{}", compared="{}, untrained; fine-tuned: from scratch", pixels="raw pixels")
  names["standardised"] = "standardised pixels"
  for (method, line), row in sorted(table.items(), key=lambda item: item[0][0] is None):
    cells = (in_words(row.get(column, [])) for column in args.columns)
    print(f"| {names[line].format(METHODS[method][0] if method else '')} | {' | '.join(cells)} |")


if __name__ == "__main__":
  main()
