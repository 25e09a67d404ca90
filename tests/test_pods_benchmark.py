"""benchmarks/pods.py compiles recipes for described TPUs and GPUs, where their compilers are installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import compiled

PIECES = '"async_collective_fusion_config":{"flag_start":'
PROGRAM = f"""
%fused {{
  %all-gather.1 = f32[256,2,384]{{2,0,1}} all-gather(%p), channel_id=1, backend_config={{{PIECES}"-1"}}}}
}}
%fused.1 {{
  %all-gather.2 = f32[256,2,384]{{2,0,1}} all-gather(%p), channel_id=1, backend_config={{{PIECES}"2"}}}}
}}

ENTRY %main {{
  %all-reduce.1 = (f32[1000]{{0}}, f32[24]{{0}}) all-reduce(%a, %b), channel_id=2, backend_config={{{PIECES}"-1"}}}}
  %all-reduce.2 = f32[8]{{0}} all-reduce-start(%c), channel_id=3
  %all-gather.3 = (f32[2,8]{{1,0}}, f32[8,8]{{1,0}}) all-gather-start(%c), channel_id=4
  %custom-call.1 = (bf16[8]{{0}}, s8[9]{{0}}) custom-call(%c, %c), custom_call_target="__cublas$lt$matmul"
  %fusion.1 = f32[8] fusion(%c), metadata={{op_name="jit(f)/shard_map/jvp(Net)/attn/dot"}}, {{"estimated_cycles":"70"}}
  %fusion.2 = f32[8] fusion(%c), metadata={{op_name="jit(f)/add"}}, backend_config={{"estimated_cycles":"30"}}
}}
"""


def test_a_collective_in_pieces_counts_once_and_as_asynchronous():
  found = compiled.collectives(PROGRAM, 4)
  gathered, reduced, late = 4 * (256 * 2 * 384 + 8 * 8) * 3 / 4, 2 * 4 * 1024 * 3 / 4, 2 * 4 * 8 * 3 / 4
  assert found == {"all-gather-start": (2, gathered), "all-reduce": (1, reduced), "all-reduce-start": (1, late)}
  assert compiled.expected_cycles(PROGRAM) == {"attention": 70, "update": 30}
  assert compiled.kernels(PROGRAM) == {"fusion": 2, "__cublas$lt$matmul": 1}
  assert compiled.kernels(PROGRAM.replace("cublas", "")) == {}


def compiler(module, file):
  """A mark: the test runs where this compiler is."""
  return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"{module} is not here: {file}")


TPU = compiler("libtpu", "requirements-tpu.txt has it.")
GPU = compiler("jax_cuda12_plugin", 'pip install "jax[cuda12]"')


@pytest.mark.slow
@pytest.mark.parametrize(
  ("recipe", "topology"),
  [
    pytest.param("simclr_imagenet", "v5e:2x2", marks=TPU),
    pytest.param("mae_imagenet:base", "v5e:2x2", marks=TPU),
    pytest.param("mae_imagenet:base", "h100:4", marks=GPU),
  ],
)
def test_a_recipe_is_compiled_for_four_chips(recipe, topology, tmp_path):
  command = [sys.executable, str(ROOT / "benchmarks" / "pods.py"), "--recipes", recipe, "--topologies", topology]
  environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  command += ["--batch=64", f"--json={tmp_path / 'rows.json'}"]
  done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  assert done.returncode == 0, done.stdout
  (row,) = json.loads((tmp_path / "rows.json").read_text())
  assert row["fits"] and 0 < row["temporary"] < row["held"] < 16e9
  if topology == "h100:4":
    assert row["kernels"]["__cudnn$fmhaSoftmaxBackward"] == 12 + 8  # attention is cuDNN's in each block
  else:  # sixteen images a chip: the program counts what is recomputed, augmented and optimised too
    assert row["model_flops"] < row["flops"] < 1.5 * row["model_flops"]
  # A float32 gradient of each parameter is reduced over four chips, which send twice 3 / 4 of it.
  parameters = {"simclr_imagenet": 28.0e6, "mae_imagenet:base": 111.7e6}[recipe]
  reduced = sum(sent for kind, (_, sent) in row["collectives"].items() if kind.startswith("all-reduce"))
  assert 0.95 < reduced / (1.5 * 4 * parameters) < 1.1
  assert 0 < row["mfu"] <= 1
