"""What an import loads, and that every public name is where the package says."""

import ast
import pathlib
import subprocess
import sys

import pytest

import ssl_jax

ROOT = pathlib.Path(__file__).parents[1]
LOADED = """
import sys
import jax
before = set(sys.modules)
import {module}
print(*sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)))
"""


@pytest.mark.parametrize("module", ["ssl_jax", "ssl_jax.losses"])
def test_a_loss_is_had_without_anything_but_jax(module):
  program = LOADED.format(module=module) + "ssl_jax.nt_xent, ssl_jax.losses.mae_loss\n"
  for forbidden in ("flax", "optax", "einops", "PIL", "grain", "chex", "orbax", "ml_collections", "absl.flags"):
    program += f"assert {forbidden!r} not in sys.modules, {forbidden!r}\n"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
  assert done.returncode == 0, done.stderr
  assert done.stdout.split() == ["ssl_jax"]


def test_every_public_name_is_there_and_is_its_modules():
  assert len(ssl_jax.__all__) == len(set(ssl_jax.__all__)) > 20
  for name in ssl_jax.__all__:
    value = getattr(ssl_jax, name)
    assert value is getattr(sys.modules[value.__module__], name)
  assert set(ssl_jax.__all__) <= set(dir(ssl_jax))
  with pytest.raises(AttributeError, match="no attribute 'nt_xnet'"):
    _ = ssl_jax.nt_xnet


def test_modules_are_had_as_attributes():
  program = "import ssl_jax; ssl_jax.data.read_image, ssl_jax.augment.View, ssl_jax.models.resnet.resnet18"
  program += "; assert ssl_jax.read_image is ssl_jax.data.read_image"
  subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_type_checkers_are_told_the_same_names():
  tree = ast.parse((ROOT / "ssl_jax" / "__init__.py").read_text())
  (block,) = (node for node in tree.body if isinstance(node, ast.If))
  told = {alias.asname: f"{node.module}" for node in block.body for alias in node.names}
  assert told == {name: f"ssl_jax.{home}" for name, home in ssl_jax._HOMES.items()}
