"""benchmarks/accelerator.py measures what it says, on tiny sizes, and tells what it left out."""

import json
import math
import os
import subprocess
import sys

import pytest

from runs import ROOT

SECTIONS = ("knn", "blocks", "recompute", "steps")


def report(path, *arguments):
  command = [sys.executable, str(ROOT / "benchmarks" / "accelerator.py"), "--small", f"--json={path}", *arguments]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert done.returncode == 0, done.stdout
  return json.loads(path.read_text())["rows"], done.stdout


@pytest.mark.slow
def test_every_section_has_finite_positive_numbers(tmp_path):
  rows, out = report(tmp_path / "rows.json", "--sections", *SECTIONS, "--recipes", "mae_imagenet")
  assert {row["section"] for row in rows} == set(SECTIONS)
  for row in rows:
    keys = ["ms", "temporary_mib", "case_seconds"]
    keys += ["compile_s", "images_s", "tflop"] if row["section"] == "steps" else []
    assert all(math.isfinite(row[key]) and row[key] > 0 for key in keys), row
  assert {row["recompute"] for row in rows if row["section"] == "recompute"} == {True, False}
  assert "fastest for nt_xent, N = 64" in out and "fastest for info_nce, N = 64" in out


@pytest.mark.slow
def test_blocks_are_measured(tmp_path):
  rows, _ = report(tmp_path / "rows.json", "--sections", "blocks")
  assert rows and all(row["ms"] > 0 and row["temporary_mib"] > 0 for row in rows)


@pytest.mark.slow
def test_what_there_is_no_time_for_is_named(tmp_path):
  rows, out = report(tmp_path / "rows.json", "--sections", "steps", "--recipes", "dino_imagenet", "--seconds=0")
  assert [(row["section"], row["left_out"]) for row in rows] == [("steps", ["recipe=dino_imagenet batch=4 small=True"])]
  assert "steps: 0 seconds are over; not measured: recipe=dino_imagenet" in out
