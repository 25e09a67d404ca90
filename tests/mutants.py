"""Applies the wrong wirings of mutants.toml one by one, and sees whether the tests notice.

  python tests/mutants.py                           all mutants that the log does not have yet
  python tests/mutants.py 'byol-*' norm-x --fresh   some by name, whether the log has them or not
  python tests/mutants.py --report                  what the log says, and nothing is run

  --likely-only    only the test files that are likely to notice, not the whole fast suite after them
  --workers=N      pytest-xdist's processes; 0, the default, tests in pytest's own
  --timeout=S      seconds that pytest may take; a mutant that hangs longer is killed
  --log=FILE       JSON lines, by default mutants.jsonl: a stopped run goes on where it was

A mutant is killed if a test fails, and has survived if none does: then a test is missing. One is broken if pytest does
not come to run its tests. Each is applied to a copy of the repository, so that the files here stay as they are.
"""

import argparse
import collections
import fnmatch
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).parents[1]
ITSELF = "tests/test_mutants.py"  # It would see every mutant, since a text that was replaced is not found.
STEPS = ("test_step.py", "test_methods.py", "test_all_methods.py")
TRAJECTORY = "test_trajectories.py::test_six_steps_are_pytorchs"
WHOLE = ("test_trajectories.py", *STEPS)  # whole steps of every method, the fastest first
# By the beginning of a file's path, of which the longest counts: which tests to try first.
LIKELY = {
  "ssl_jax/methods/": (WHOLE[0], "test_initialisation.py", "test_microbatch.py", *STEPS),
  "ssl_jax/methods/simclr.py": (
    f"{TRAJECTORY}[simclr]",
    "test_initialisation.py",
    "test_simclr.py",
    "test_microbatch.py",
    *STEPS,
  ),
  "ssl_jax/methods/moco.py": (
    f"{TRAJECTORY}[moco_v1]",
    f"{TRAJECTORY}[moco_v2]",
    "test_initialisation.py",
    "test_random_streams.py",
    *STEPS,
  ),
  "ssl_jax/methods/moco_v3.py": (
    f"{TRAJECTORY}[moco_v3_vit]",
    f"{TRAJECTORY}[moco_v3]",
    "test_initialisation.py",
    "test_microbatch.py",
    *STEPS,
  ),
  "ssl_jax/methods/byol.py": (f"{TRAJECTORY}[byol]", "test_initialisation.py", "test_microbatch.py", *STEPS),
  "ssl_jax/methods/mae.py": (
    f"{TRAJECTORY}[mae]",
    "test_initialisation.py",
    "test_pictures.py",
    "test_random_streams.py",
    "test_vit.py",
    *STEPS,
  ),
  "ssl_jax/methods/dino.py": (
    f"{TRAJECTORY}[dino]",
    "test_initialisation.py",
    "test_pictures.py",
    "test_random_streams.py",
    *STEPS,
  ),
  "ssl_jax/losses/": ("test_losses.py", "test_other_losses.py", WHOLE[0], *STEPS),
  "ssl_jax/losses/contrastive.py": ("test_losses.py", "test_other_losses.py"),
  "ssl_jax/losses/distillation.py": ("test_other_losses.py", f"{TRAJECTORY}[dino]"),
  "ssl_jax/losses/reconstruction.py": ("test_other_losses.py", f"{TRAJECTORY}[mae]", "test_vit.py"),
  "ssl_jax/losses/regression.py": ("test_other_losses.py", f"{TRAJECTORY}[byol]"),
  "ssl_jax/optim.py": ("test_optim.py", WHOLE[0], "test_config.py", *STEPS),
  "ssl_jax/models/": ("test_models.py", WHOLE[0], "test_initialisation.py", *STEPS),
  "ssl_jax/models/heads.py": (WHOLE[0], "test_initialisation.py", "test_models.py", "test_vit.py", *STEPS),
  "ssl_jax/models/vit.py": (
    "test_vit.py",
    "test_initialisation.py",
    f"{TRAJECTORY}[dino]",
    f"{TRAJECTORY}[moco_v3_vit]",
    f"{TRAJECTORY}[mae]",
    "test_lowering.py",
  ),
  "ssl_jax/models/mae.py": (f"{TRAJECTORY}[mae]", "test_vit.py"),
  "ssl_jax/models/cpu.py": ("test_cpu_convolution.py", "test_cpu_linear.py", "test_models.py"),
  "ssl_jax/training.py": (f"{TRAJECTORY}[byol]", "test_parallel.py", *WHOLE, "test_train.py"),
  "train.py": ("test_train.py", "test_folder.py", "test_all_methods.py"),
  "ssl_jax/build.py": (*WHOLE, "test_config.py"),
  "ssl_jax/restore.py": ("test_old_runs.py", "test_train.py"),
  "ssl_jax/parallel.py": ("test_parallel.py", f"{TRAJECTORY}[byol]", "test_microbatch.py", *STEPS),
  "ssl_jax/random_streams.py": ("test_random_streams.py", *WHOLE),
  "ssl_jax/augment.py": ("test_augment.py", "test_stream.py", WHOLE[0]),
  "ssl_jax/data/": ("test_data.py", "test_dataset.py", "test_stream.py"),
  "ssl_jax/data/dataset.py": ("test_dataset.py", "test_data.py", "test_stream.py", "test_folder.py"),
  "ssl_jax/data/crop.py": ("test_stream.py", "test_random_streams.py"),
  "ssl_jax/data/memory.py": ("test_stream.py", "test_data.py"),
  "ssl_jax/data/pipeline.py": ("test_stream.py", "test_folder.py"),
  "ssl_jax/data/resize.py": ("test_resize.py", "test_stream.py"),
  "ssl_jax/data/image.py": ("test_image.py",),
  "ssl_jax/data/folder.py": ("test_folder.py",),
  "ssl_jax/data/stream.py": ("test_stream.py", "test_random_streams.py", "test_folder.py"),
  "ssl_jax/run/checkpoint.py": ("test_parallel.py", "test_train.py"),
  "ssl_jax/run/log.py": ("test_train.py",),
  "ssl_jax/run/workdir.py": ("test_folder.py", "test_train.py"),
  "ssl_jax/config.py": ("test_config.py", "test_train.py"),
  "ssl_jax/convert.py": ("test_convert.py", "test_models.py", "test_vit.py"),
  "ssl_jax/evaluation/": (
    "test_knn.py",
    "test_linear.py",
    "test_eval_linear.py",
    "test_heads.py",
    "test_without_labels.py",
    "test_train.py",
  ),
  "ssl_jax/flops.py": ("test_flops.py",),
  "ssl_jax/monitors.py": ("test_monitors.py",),
  "eval_knn.py": ("test_train.py", "test_knn.py", "test_cli.py"),
}


def load() -> list[dict]:
  """The mutants as the file has them."""
  return tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]


def likely(mutant: dict) -> list[str]:
  """The test files to try first: the mutant's own, else those of the longest beginning of its file's path."""
  best = max((start for start in LIKELY if mutant["file"].startswith(start)), key=len, default=None)
  files = [f"tests/{name}" for name in mutant.get("tests") or LIKELY.get(best, ())]
  return [file for file in files if (ROOT / file.partition("::")[0]).exists()]


def fingerprint(mutant: dict) -> str:
  """Changes where the file or the mutant does: then an old verdict counts no longer."""
  parts = (ROOT / mutant["file"]).read_text(), mutant["old"], mutant["new"]
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def copy_repository(to: pathlib.Path) -> None:
  """Copies what git knows or does not ignore, and makes it a repository: some tests may ask git for the files."""
  listed = subprocess.check_output(["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, text=True)
  for name in filter(None, listed.split("\0")):
    if (ROOT / name).is_file():  # one that is deleted, and not committed so, is still listed
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, to / name)
  for command in (["init", "-q"], ["add", "-A"]):
    subprocess.check_call(["git", *command], cwd=to)


def pytest(copy: pathlib.Path, files: list[str], workers: int, seconds: float) -> tuple[str, str]:
  """("killed", the first failing test or "hung"), ("passed", ""), or ("broken", why): no test ran, or none could."""
  options = ["-x", "-q", "-rfE", "-p", "no:cacheprovider", "-n", str(workers), f"--ignore={ITSELF}"]
  command = [sys.executable, "-m", "pytest", *options, *files]
  env = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}  # not a package that is installed
  with tempfile.TemporaryFile("w+") as out:
    process = subprocess.Popen(command, cwd=copy, env=env, stdout=out, stderr=out, start_new_session=True)
    try:
      status = process.wait(seconds)
    except subprocess.TimeoutExpired:
      return "killed", "hung"
    finally:
      if process.poll() is None:  # The group has pytest's workers, and what tests started.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    out.seek(0)
    return verdict(status, out.read())


def verdict(status: int, output: str) -> tuple[str, str]:
  """What pytest's exit status and output mean. By -x a module that cannot be imported ends with 1, as a test does."""
  failed = re.search(r"^(?:FAILED|ERROR) (\S+::.*?)(?: - .*)?$", output, re.MULTILINE)
  if status in (1, 2) and failed:  # pytest-xdist ends with 2 where -x stops it
    return "killed", failed[1]
  if status == 0:
    return "passed", ""
  lines = [line for line in output.splitlines() if line.strip()]
  return "broken", f"status {status}: {lines[-1] if lines else 'no output'}"


def try_mutant(mutant: dict, copy: pathlib.Path, options: argparse.Namespace) -> tuple[str, str]:
  """The verdict on one mutant and the test that it rests on. The copy is whole again afterwards."""
  path, deadline = copy / mutant["file"], time.monotonic() + options.timeout
  text = path.read_text()
  assert text.count(mutant["old"]) == 1, f"{mutant['name']}: its text is not in {mutant['file']} once"
  path.write_text(text.replace(mutant["old"], mutant["new"]))
  found = "passed", ""
  try:
    for files in (likely(mutant),) if options.likely_only else (likely(mutant), []):
      if found[0] == "passed":
        found = pytest(copy, files, options.workers, max(1.0, deadline - time.monotonic()))
  finally:
    path.write_text(text)
  if found[0] != "passed":
    return found
  return "survived the likely files" if options.likely_only else "survived", ""


def read_log(path: pathlib.Path) -> dict[str, dict]:
  """The last row of each mutant, by name."""
  return {row["name"]: row for row in map(json.loads, path.read_text().splitlines())} if path.exists() else {}


def is_known(mutant: dict, row: dict | None, options: argparse.Namespace) -> bool:
  """Whether the log has a verdict on the mutant as it is now, and not a lesser one than is asked for."""
  if row is None or row["hash"] != fingerprint(mutant):
    return False
  return options.likely_only or row["verdict"] != "survived the likely files"


def report(mutants: list[dict], rows: dict[str, dict]) -> None:
  """Prints a line a mutant, and how many there are of each verdict."""
  counts: collections.Counter[str] = collections.Counter()
  for mutant in mutants:
    row = rows.get(mutant["name"], {})
    said = row["verdict"] if row.get("hash") == fingerprint(mutant) else "not tried, or changed since"
    said = "equivalent" if mutant.get("equivalent") else said
    counts[said] += 1
    test = row.get("test", "") if said in ("killed", "broken") else ""
    print(f"{mutant['name']:<46} {said:<10} {test or mutant.get('equivalent', '')}".rstrip())
  print(", ".join(f"{count} {said}" for said, count in counts.most_common()) + f"; {len(mutants)} mutants")


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("names", nargs="*", default=["*"])
  for flag in ("--fresh", "--report", "--likely-only"):
    parser.add_argument(flag, action="store_true")
  parser.add_argument("--workers", type=int, default=0)
  parser.add_argument("--timeout", type=float, default=900.0)
  parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("mutants.jsonl"))
  options = parser.parse_args()
  mutants = [m for m in load() if any(fnmatch.fnmatch(m["name"], pattern) for pattern in options.names)]
  if not mutants:
    parser.error(f"no mutant is called {' or '.join(options.names)}")
  rows = read_log(options.log)
  if options.report:
    report(mutants, rows)
    return
  wanted = [m for m in mutants if options.fresh or not is_known(m, rows.get(m["name"]), options)]
  wanted = [m for m in wanted if not m.get("equivalent")]
  with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
    copy_repository(pathlib.Path(folder))
    for i, mutant in enumerate(wanted):
      start = time.monotonic()
      said, test = try_mutant(mutant, pathlib.Path(folder), options)
      row = dict(name=mutant["name"], verdict=said, test=test, seconds=round(time.monotonic() - start, 1))
      with options.log.open("a") as file:
        file.write(json.dumps(row | {"hash": fingerprint(mutant)}) + "\n")
      print(f"{i + 1}/{len(wanted)} {mutant['name']}: {said} {test} ({row['seconds']:.0f} s)", flush=True)


if __name__ == "__main__":
  main()
