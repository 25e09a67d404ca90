"""Four virtual CPU devices, set before JAX starts; a window of float64; the golden files."""

import importlib.metadata
import os
import pathlib
import sys
import time

XLA_FLAGS = "--xla_force_host_platform_device_count=4"
if importlib.metadata.version("jaxlib").startswith(
  "0.10."
):  # it compiles in two thirds of the time; 0.12 has no choice
  XLA_FLAGS += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {XLA_FLAGS}".strip()
# XLA's thread pool is as large as the core count: with fewer threads than devices a collective can hang for ever.
os.environ["NPROC"] = "8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

TESTS = pathlib.Path(__file__).parent
for folder in (TESTS / "golden", TESTS.parent):  # named_weights; ssl_jax and train where they are not installed
  sys.path.insert(0, str(folder))

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from jax.sharding import Mesh  # noqa: E402
from photographs import photograph  # noqa: E402

import runs  # noqa: E402

# Most of the suite's time is XLA's compiler. Not in the environment: real runs in processes of their own are optimised.
jax.config.update("jax_disable_most_optimizations", True)
# An array of fewer axes than it meets is a mistake until somebody says where its axes belong. Real runs are as JAX is.
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def x64():
  """float64 for one test."""
  with jax.enable_x64(True):
    yield


@pytest.fixture
def optimised():
  """XLA's optimisations back on, for what computes longer than it compiles."""
  jax.config.update("jax_disable_most_optimizations", False)
  yield
  jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(scope="session")
def golden():
  """`golden(name)`: the arrays of tests/golden/{name}.npz."""
  return lambda name: np.load(TESTS / "golden" / f"{name}.npz", allow_pickle=False)


@pytest.fixture(scope="session")
def mesh():
  """`mesh(n)`: the first n devices on the axis "batch"."""
  return lambda n: Mesh(np.array(jax.devices()[:n]), ("batch",))


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
  """Compiled programs, shared by all real runs, in all workers of pytest-xdist."""
  return shared_folder(tmp_path_factory) / "xla"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory, cache):
  """A whole run, its page too: (workdir, what it printed). The first worker that asks makes it, another waits."""
  folder = shared_folder(tmp_path_factory) / "unbroken"
  workdir, printed = folder / "run", folder / "printed.txt"
  try:
    folder.mkdir()
  except FileExistsError:
    deadline = time.time() + 120
    while not printed.exists():
      assert time.time() < deadline
      time.sleep(0.1)
  else:
    out = runs.finish(runs.start(cache, "train.py", workdir, report=True))
    (folder / "scratch").write_text(out)
    (folder / "scratch").rename(printed)
  return workdir, printed.read_text()


def shared_folder(tmp_path_factory):
  base = tmp_path_factory.getbasetemp()
  return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture
def photographs(tmp_path):
  """Twenty-four photographs of two classes, one of them broken, and eight to test, one broken."""
  root = tmp_path / "photographs"
  for i in range(24):
    photograph(root / "train" / "ab"[i % 2] / f"{i}.{('jpg', 'png', 'webp')[i % 3]}", i)
  for i in range(8):
    photograph(root / "val" / "ab"[i % 2] / f"{i}.png", 100 + i)
  (root / "train" / "a" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\nno more")
  (root / "val" / "b" / "3.png").write_bytes(b"")
  return root
