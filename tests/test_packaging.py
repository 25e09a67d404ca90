"""What the package consists of and needs: five dependencies for the library, extras for the rest."""

import ast
import functools
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile

import pytest
from packaging.requirements import Requirement

import ssl_jax
from ssl_jax import extras
from ssl_jax.__main__ import COMMANDS

ROOT = pathlib.Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, EXTRAS = PYPROJECT["project"], PYPROJECT["project"]["optional-dependencies"]
CORE = {"jax", "flax", "optax", "chex", "einops"}
NAMES = {"PIL": "pillow", "absl": "absl-py", "orbax": "orbax-checkpoint", "tensorflow_datasets": "tensorflow-datasets"}
BROUGHT = {"jaxlib", "numpy", "ml_dtypes", "markupsafe"}  # by jax and jinja2
ON_REQUEST = {"wandb", "mlflow", "torch", "torchvision", "timm", "transformers", "sklearn", "threadpoolctl"}
HIDING = """
import runpy, sys
from importlib.machinery import BuiltinImporter, FrozenImporter, PathFinder

class Hiding(PathFinder):
  def find_spec(name, *others):
    return None if name.partition(".")[0] in {hidden} else PathFinder.find_spec(name, *others)

sys.meta_path = [BuiltinImporter, FrozenImporter, Hiding]
runpy.run_path({file!r})
"""
OF_EXTRAS = ("data", "load_weights", "read_image", "restore_encoder")


def listed(extra):
  """The requirements of an extra, and of the extras that it names."""
  own = [Requirement(line) for line in EXTRAS[extra]]
  others = [listed(name) for x in own if x.name == "ssl_jax" for name in x.extras]
  return {str(x) for x in own if x.name != "ssl_jax"}.union(*others)


def names(requirements):
  return {Requirement(line).name for line in requirements}


def file_of(module):
  path = ROOT.joinpath(*module.split("."))
  return next((file for file in (path / "__init__.py", path.with_suffix(".py")) if file.is_file()), None)


@functools.cache
def imports_of(module):
  """What a module of ours imports, in a function too but not for type checkers alone, and the package that it is in."""
  found, nodes = {module.rpartition(".")[0]} - {""}, [ast.parse(file_of(module).read_text())]
  for node in nodes:
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      modules = {name for alias in node.names if file_of(name := f"{node.module}.{alias.name}")}
      found |= {node.module} | modules
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
      continue
    elif isinstance(node, ast.mod | ast.stmt | ast.excepthandler):
      nodes += ast.iter_child_nodes(node)
  return found


def imported(modules):
  """The packages that modules of ours import, and the modules of ours that these import, and so on."""
  found = list(modules)
  for module in found:
    if file_of(module):
      found += imports_of(module).difference(found)
  return {name.partition(".")[0] for name in found if not file_of(name)} - set(sys.stdlib_module_names)


def needed(modules):
  """What has to be installed for them, by the names that pip knows."""
  return {NAMES.get(name, name) for name in imported(modules) - BROUGHT - ON_REQUEST}


def modules_in(*folders):
  files = [file for folder in folders for file in (ROOT / "ssl_jax" / folder).rglob("*.py")]
  return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files}


def test_the_library_imports_five_packages_and_a_command_what_its_extra_brings():
  has = {extra: CORE | names(listed(extra)) for extra in EXTRAS}
  assert names(PROJECT["dependencies"]) == CORE
  library = modules_in("losses", "methods", "models")
  library |= {f"ssl_jax.{home}" for name, home in ssl_jax._HOMES.items() if name not in OF_EXTRAS}
  library |= {f"ssl_jax.{name}" for name in ssl_jax._MODULES if name not in OF_EXTRAS}
  assert needed(library) == CORE
  assert needed({f"ssl_jax.{ssl_jax._HOMES.get(name, name)}" for name in OF_EXTRAS}) <= has["train"]
  for command, extra in COMMANDS.items():
    assert needed({f"ssl_jax.commands.{command}"}) <= has[extra], command
  everything = {"train", "eval_knn", "eval_linear", "finetune"} | modules_in("")
  assert needed(everything) <= has["train"]
  # TFDS imports importlib_resources, and jax.export flatbuffers
  assert needed(everything) | {"importlib_resources", "flatbuffers"} == has["all"]


def test_what_a_clone_installs_is_what_the_package_names():
  lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
  installed = {str(Requirement(line)) for line in lines if line}
  assert installed == listed("all") | {str(Requirement(line)) for line in PROJECT["dependencies"]}
  assert str(Requirement("orbax-checkpoint<1").specifier) in str(next(x for x in installed if "orbax" in x))


def test_every_folder_of_the_package_is_packed():
  folders = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "ssl_jax").rglob("*.py")}
  assert folders == set(PYPROJECT["tool"]["setuptools"]["packages"])


def test_the_library_works_with_its_core_dependencies_alone():
  hidden = imported(modules_in("")) - CORE - BROUGHT - {"absl", "scipy"}  # which optax and jax import
  assert {"PIL", "orbax", "safetensors", "tensorflow_datasets"} <= hidden
  program = HIDING.format(hidden=hidden, file=str(ROOT / "tests" / "core_alone.py"))
  env = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, env=env)
  assert done.returncode == 0 and done.stdout == "works\n", done.stderr


def test_a_mistake_of_ours_and_a_broken_package_keep_their_traceback(tmp_path, monkeypatch):
  (tmp_path / "half").mkdir()
  (tmp_path / "half" / "__init__.py").write_text("import half.other")
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.setattr(extras.importlib, "import_module", lambda name: exec("import half"))
  with pytest.raises(ModuleNotFoundError, match=r"No module named 'half.other'"):
    extras.load("data", "ssl_jax.data", "train")
  monkeypatch.undo()
  with pytest.raises(ModuleNotFoundError, match=r"No module named 'ssl_jax.dataa'"):
    extras.load("dataa", "ssl_jax.dataa", "train")


@pytest.mark.slow  # pip downloads jax into a new environment
def test_a_wheel_is_the_library(tmp_path):
  tree = tmp_path / "tree"  # a build leaves its folders there
  shutil.copytree(ROOT / "ssl_jax", tree / "ssl_jax", ignore=shutil.ignore_patterns("__pycache__"))
  for name in ("pyproject.toml", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, tree)
  pip = [sys.executable, "-m", "pip", "--quiet", "wheel", "--no-deps", "--wheel-dir", str(tmp_path)]
  subprocess.run([*pip, str(tree)], check=True)
  (wheel,) = tmp_path.glob("*.whl")
  assert wheel.name.startswith(f"ssl_jax-{ssl_jax.__version__}-")
  with zipfile.ZipFile(wheel) as packed:
    inside = {name for name in packed.namelist() if not re.match(r"ssl_jax-[^/]*\.dist-info/", name)}
  files = {str(file.relative_to(ROOT)) for file in (ROOT / "ssl_jax").rglob("*") if file.is_file()}
  assert inside == {name for name in files if "__pycache__" not in name}  # py.typed, page.html and the images too

  venv.create(tmp_path / "env", with_pip=True)
  python = str(tmp_path / "env" / "bin" / "python")
  subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
  env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"XLA_FLAGS": ""}
  run = functools.partial(subprocess.run, capture_output=True, text=True, cwd=tmp_path, env=env)
  done = run([python, str(ROOT / "tests" / "core_alone.py"), "--compile"])
  assert done.returncode == 0 and done.stdout == "works\n", done.stderr
  done = run([python, "-c", "import ssl_jax; print(ssl_jax.__file__); ssl_jax.read_image"])
  told = 'ssl_jax.read_image needs PIL, which is not installed: pip install "ssl_jax[train]"'
  assert done.stdout.startswith(str(tmp_path)) and done.stderr.splitlines()[-1].endswith(told)
  done = run([python, "-m", "ssl_jax", "report"])
  assert done.returncode == 1 and re.fullmatch(r'.* pip install "ssl_jax\[train\]"\n', done.stderr), done.stderr
