"""examples/tutorial.ipynb: what it takes of ssl_jax exists, and from top to bottom every method learns."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import types

import pytest

import ssl_jax

PATH = pathlib.Path(__file__).parents[1] / "examples" / "tutorial.ipynb"
CELLS = json.loads(PATH.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def ours(tree):
  """The names that the imports of a module of code bind to something of ssl_jax; each import is made."""
  found = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Import):
      found |= {x.name: importlib.import_module(x.name) for x in node.names if x.name == "ssl_jax"}
    if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "ssl_jax":
      module = importlib.import_module(node.module)
      found |= {x.asname or x.name: getattr(module, x.name) for x in node.names}
  return found


def test_what_the_notebook_takes_exists_and_is_called_as_it_can_be():
  tree = ast.parse("\n".join(CODE))  # of which every cell compiles
  names = ours(tree)
  taken = {}
  for node in ast.walk(tree):
    if isinstance(node, ast.Name) and node.id in names:
      taken[ast.unparse(node)] = names[node.id]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
      module = names.get(node.value.id)
      if isinstance(module, types.ModuleType):
        taken[ast.unparse(node)] = getattr(module, node.attr)
  for method in ("simclr", "moco", "byol", "mae", "dino"):
    assert f"ssl_jax.{method}" in taken
  called = 0
  for node in ast.walk(tree):
    if isinstance(node, ast.Call) and ast.unparse(node.func) in taken:
      function = taken[ast.unparse(node.func)]
      keywords = {x.arg: None for x in node.keywords if x.arg}
      inspect.signature(function).bind_partial(*node.args, **keywords)
      called += 1
  assert called > 20 and set(ssl_jax.__all__) >= {
    x.partition(".")[2] for x in taken if re.fullmatch("ssl_jax.[a-z_]+", x)
  }


def test_the_notebook_is_small():
  assert PATH.stat().st_size < 300_000


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's parts
def test_the_notebook_runs_and_every_method_learns():
  nbclient = pytest.importorskip("nbclient", reason="pip install -r requirements-bench.txt", exc_type=ImportError)
  nbformat = pytest.importorskip("nbformat", reason="pip install -r requirements-bench.txt", exc_type=ImportError)
  notebook = nbformat.read(PATH, 4)
  resources = {"metadata": {"path": str(PATH.parent)}}
  client = nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources)
  client.execute(env={name: x for name, x in os.environ.items() if name != "XLA_FLAGS"})  # one device, as a user has
  printed = "".join(
    output["text"] for cell in notebook.cells for output in cell.get("outputs", ()) if output["output_type"] == "stream"
  )
  pairs = re.findall(r"^the formula (\S+)   \w+ (\S+)$", printed, re.MULTILINE)
  assert len(pairs) == 5 and all(float(a) == pytest.approx(float(b), rel=1e-4) for a, b in pairs)
  reached = re.findall(r"^(SimCLR|MoCo|BYOL|MAE|DINO) +(\S+) +(\S+)$", printed, re.MULTILINE)
  assert len(reached) == 5
  # Measured are 3 to 10 points more than the untrained network has.
  assert all(float(trained) > float(untrained) + 1 for _, untrained, trained in reached), reached
