"""benchmarks/pods.py compiles recipes for a described slice of TPUs, where their compiler is installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from runs import ROOT


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not here: requirements-tpu.txt has it."
)
@pytest.mark.parametrize("recipe", ["simclr_imagenet", "mae_imagenet:base"])
def test_a_recipe_is_compiled_for_four_chips(recipe, tmp_path):
  command = [sys.executable, str(ROOT / "benchmarks" / "pods.py"), "--recipes", recipe, "--topologies", "v5e:2x2"]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  command += ["--batch=64", f"--json={tmp_path / 'rows.json'}"]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert done.returncode == 0, done.stdout
  (row,) = json.loads((tmp_path / "rows.json").read_text())
  assert row["fits"] and 0 < row["temporary"] < row["held"] < 16e9
  # Sixteen images a chip: the program's own FLOPs are the model's and what is recomputed, augmented and optimised.
  assert row["model_flops"] < row["flops"] < 1.5 * row["model_flops"]
  # A float32 gradient of each parameter is reduced over four chips, which send twice 3 / 4 of it.
  parameters = {"simclr_imagenet": 28.0e6, "mae_imagenet:base": 111.7e6}[recipe]
  assert 0.95 < row["collectives"]["all-reduce"][1] / (1.5 * 4 * parameters) < 1.1
  assert 0 < row["mfu"] <= 1
