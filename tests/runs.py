"""Real runs of train.py and eval_knn.py in processes of their own, and what they leave behind."""

import os
import pathlib
import socket
import subprocess
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp

from ssl_jax.run import log

ROOT = pathlib.Path(__file__).parents[1]
# 8 steps an epoch, 20 steps, a checkpoint every 4, an evaluation every 8.
SMALL = {
  "data.split": "train[:512]",
  "data.test_split": "test[:200]",
  "batch_size": 64,
  "steps": 20,
  "encoder.width": 0.125,
  "method.projector.hidden": 16,
  "method.projector.features": 8,
  "log_every_steps": 2,
  "eval_every_epochs": 1,
  "checkpoint_every_steps": 4,
  "report": False,  # but for the run that all share
}


def command(script, workdir, *arguments, **overrides):
  flags = [f"--config.{key}={value}" for key, value in {**SMALL, **overrides}.items()] if script == "train.py" else []
  return [sys.executable, str(ROOT / script), f"--workdir={workdir}", *flags, *arguments]


def environment(cache, devices=1):
  flags = f"--xla_force_host_platform_device_count={devices}"
  return {**os.environ, "XLA_FLAGS": flags, "NPROC": "8", "JAX_COMPILATION_CACHE_DIR": str(cache)}


def address():
  """HOST:PORT with a port that is free."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    return f"127.0.0.1:{free.getsockname()[1]}"


def start(cache, *args, devices=1, **overrides):
  return subprocess.Popen(
    command(*args, **overrides),
    env=environment(cache, devices),
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=ROOT,
  )


def finish(process, status=0):
  out, _ = process.communicate(timeout=120)
  assert process.returncode == status, out
  return out


def final_state(workdir, step=20):
  """A checkpoint's arrays, whatever devices wrote them."""
  folder = (workdir / "checkpoints" / str(step) / "state").absolute()
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder).item_metadata.tree
    return reader.restore(folder, restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree))


def rows(workdir):
  """The metrics without what depends on the clock."""
  return [
    {k: v for k, v in row.items() if k not in ("images_per_second", "input_share")}
    for row in log.read_rows(workdir / "metrics.jsonl")
  ]


def assert_same_run(a, b, step=20):
  """Every leaf of parameters, state and optimizer bit for bit, and every row once."""
  got, want = (jax.tree_util.tree_leaves_with_path(final_state(d, step)) for d in (a, b))
  assert [path for path, _ in got] == [path for path, _ in want]
  for (path, x), (_, y) in zip(got, want, strict=True):
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes(), jax.tree_util.keystr(path)
  assert rows(a) == rows(b)


def checksums(folder):
  return {p: zlib.crc32(p.read_bytes()) for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for_step(step):
  def reached(workdir):
    return any(row["step"] >= step for row in log.read_rows(workdir / "metrics.jsonl"))

  return reached


def wait_for_save(step):
  """True while the checkpoint of `step` is being written, or just was."""

  def reached(workdir):
    folder = workdir / "checkpoints"
    return folder.exists() and any(p.name.startswith(f"{step}.") or p.name == str(step) for p in folder.iterdir())

  return reached
