"""What the README shows works: its Python as it stands, its commands on a small scale. What the pages name exists."""

import os
import pathlib
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys

import numpy as np
import pytest
from absl import flags

import eval_knn  # noqa: F401  its flags, and those of the next two
import eval_linear  # noqa: F401
import ssl_jax.commands.judge  # noqa: F401
from ssl_jax import build
from ssl_jax import config as configs
from ssl_jax.__main__ import COMMANDS as COMMANDS_OF_THE_PACKAGE

ROOT = pathlib.Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PODS = (ROOT / "docs" / "pods.md").read_text()
LOGGING = (ROOT / "docs" / "logging.md").read_text()
EVALUATION = (ROOT / "docs" / "evaluation.md").read_text()
DOCS = [path for path in sorted((ROOT / "docs").rglob("*.md")) if "_build" not in path.parts]
PAGES = "\n".join([TEXT, *(path.read_text().replace("../", "") for path in DOCS)])  # paths as from the root
BLOCKS = {kind: re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL) for kind in ("bash", "python")}
COMMANDS = [command.strip() for block in BLOCKS["bash"] for line in block.splitlines() for command in line.split("&&")]
SMALL = "--config.data.split=train[:512] --config.data.test_split=test[:200] --config.stop_after_steps=2"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """Runs a README command beside a copy of nothing: the scripts are the checkout's, the runs go to a scratch folder."""
  folder = tmp_path_factory.mktemp("readme")
  env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
  env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"  # it is the compiler that takes long here

  def call(command):
    script, *arguments = shlex.split(command)[1:]
    return subprocess.run(
      [sys.executable, str(ROOT / script), *arguments], cwd=folder, env=env, capture_output=True, text=True
    )

  return folder, call


def test_the_two_commands_come_first():
  assert COMMANDS[:4] == [
    "pip install -r requirements.txt",
    "python train.py",
    "pip install -r requirements-dev.txt",
    "pytest",
  ]


def test_the_gate_runs_the_two_commands():
  gate = (ROOT / ".ci" / "run").read_text().replace(" --quiet", "")
  assert "pip install -r requirements.txt && python train.py" in gate
  assert "pip install -r requirements-dev.txt && pytest" in gate


def test_every_command_runs_and_the_python_after_it(run):
  folder, call = run
  scripts = [command for command in COMMANDS if command.startswith("python ")]
  assert any("eval_knn.py" in command for command in scripts)
  for command in scripts:
    small = f"{command} {SMALL}" if "train.py" in command else command
    done = call(small)
    assert done.returncode == 0, f"{small}\n{done.stdout}\n{done.stderr}"
  for block in BLOCKS["python"]:
    here = {"images": np.random.default_rng(0).uniform(size=(2, 28, 28, 1)).astype(np.float32)}
    cwd = os.getcwd()
    os.chdir(folder)
    try:
      exec(block, here)
    finally:
      os.chdir(cwd)
    if "state_dict" in here:
      assert here["features"].shape[0] == 2 and "conv1.weight" in here["state_dict"]


@pytest.mark.slow
def test_every_command_of_the_page_on_evaluation_runs_and_the_python_after_it(run, photographs):
  folder, _ = run
  env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
  env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "true"
  small = SMALL.replace("512", "2000")  # of which 1 % are more than the classes

  def call(command):
    script, *arguments = shlex.split(command)[1:]
    where = [script] if script == "-m" else [str(ROOT / script)]
    done = subprocess.run([sys.executable, *where, *arguments], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"

  page = folder / "page"
  for name, width in (("quickstart", "--config.encoder.width=0.125"), ("mae_quickstart", "")):
    recipe, workdir = ROOT / "configs" / f"{name}.py", page / "runs" / name
    call(f"python train.py --config={recipe} --workdir={workdir} {small} {width}")
  folder = page
  blocks = {kind: re.findall(rf"```{kind}\n(.*?)```", EVALUATION, re.DOTALL) for kind in ("bash", "python")}
  commands = [line for block in blocks["bash"] for line in block.splitlines()]
  assert len(commands) > 8
  for command in commands:
    shorter = "--head_steps=20" if "=heads" in command else "--C=0.1,1" if "eval_linear" in command else ""
    call(f"{command} {shorter}")  # of a flag that is given twice the last counts
  rng = np.random.default_rng(0)
  here = {"labels": np.arange(30) % 3} | {
    name: rng.integers(0, 256, (30, 28, 28, 1), dtype=np.uint8) for name in ("images", "test_images")
  }
  os.symlink(photographs, folder / "photographs")
  cwd = os.getcwd()
  os.chdir(folder)
  try:
    for block in blocks["python"]:
      exec(block, here)
  finally:
    os.chdir(cwd)
  assert here["answers"].shape == (30,) and len(here["names"]) == 23


def test_every_flag_that_the_page_on_evaluation_names_exists():
  names = set(re.findall(r"(?<![\w-])--(\w+)", EVALUATION))
  of_finetune = re.findall(r'DEFINE_\w+\(\s*"(\w+)"', (ROOT / "finetune.py").read_text())
  known = {*flags.FLAGS, *of_finetune} | {f"no{name}" for name in flags.FLAGS if flags.FLAGS[name].boolean}
  assert len(names) > 15 and not names - known


@pytest.mark.slow
def test_two_processes_started_as_the_page_on_pods_says_end_well(run):
  folder, _ = run
  block = re.findall(r"```bash\n(.*?)```", PODS, re.DOTALL)[0]
  script = block.replace("python train.py", f"{sys.executable} {ROOT / 'train.py'} {SMALL}").replace(
    "wait", "wait -n\nwait -n"
  )
  env = {**os.environ, "XLA_FLAGS": "", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
  done = subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=env, capture_output=True, text=True, timeout=300)
  assert done.returncode == 0 and "in 2 process(es)" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_command_of_the_page_on_logging_runs(run):
  folder, call = run
  for name in ("wandb", "mlflow"):
    pytest.importorskip(name, reason="pip install -r requirements-loggers.txt", exc_type=ImportError)
  _, command = re.findall(r"```bash\n(.*?)\n```", LOGGING, re.DOTALL)[0].splitlines()
  done = call(f"{command} {SMALL}")
  assert done.returncode == 0 and "failed" not in done.stdout, done.stdout + done.stderr
  for path in ("tensorboard", "wandb", "mlflow.db", "mlartifacts"):
    assert (folder / "runs" / "logged" / path).exists(), path


def test_every_path_that_is_named_exists():
  # Below one of our folders, or any script, or a list of requirements. A star stands for some files.
  folders = "benchmarks|configs|docs|examples|ssl_jax|tests"
  paths = re.findall(rf"(?<![\w./$])(?:(?:{folders})/[\w./*]*|[\w./*]+\.py|requirements[\w-]*\.txt)(?<!\.)", PAGES)
  assert len(set(paths)) > 20 and not [path for path in paths if not list(ROOT.glob(path))]


def test_every_module_that_is_named_can_be_imported():
  names = set(re.findall(r"(?<![\w./])ssl_jax(?:\.\w+)+", PAGES))
  assert len(names) >= 3
  for name in names:
    pkgutil.resolve_name(name)


def test_every_command_that_is_named_exists():
  named = set(re.findall(r"python -m ssl_jax (\w+)", PAGES))
  assert named and named <= set(COMMANDS_OF_THE_PACKAGE)


def recipe(path, *version):
  return runpy.run_path(str(ROOT / path))["get_config"](*version)


def test_every_version_of_a_recipe_that_is_named_exists():
  # The first stands after the path, and others may follow in the line: `configs/mae_imagenet.py:base`, `:large`.
  named = [
    (path, version)
    for line in PAGES.splitlines()
    for path in re.findall(r"configs/\w+\.py", line)[:1]
    for version in re.findall(r"(?<=`):(\w+)`|\.py:(\w+)", line)
  ]
  assert len(named) > 10
  for path, version in named:
    config = recipe(path, "".join(version))
    if "own_images" not in path:  # which test_decide builds, once all is decided
      build.method_of(config, 100, 10)  # some recipes hand the version on, unseen


def test_every_config_key_that_is_named_is_one_of_all_recipes():
  keys = set(re.findall(r"--config\.([\w.]*\w)", PAGES))
  assert len(keys) > 10
  for path in (ROOT / "configs").glob("*.py"):
    config = recipe(path)
    assert not [key for key in keys if not configs.has_key(config, key)], path
