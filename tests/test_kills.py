"""Streaming runs that are killed for real: the order that they read in, what workers do, what is left behind."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from photographs import photograph

from runs import ROOT, SMALL, environment
from ssl_jax import data
from ssl_jax.run import log

STEPS, BATCH, IMAGES = 300, 8, 61
# train.py, noting what each step is given before it is taken. Workers import this file too, and then start nothing.
DRIVER = """
import json, os, pathlib, sys
if __name__ == "__main__":
  from absl import flags
  from ml_collections import config_flags
  import train
  from ssl_jax.data.stream import Streamed
  from ssl_jax.run import cli
  recipe, workdir, read = sys.argv.pop(1), pathlib.Path(sys.argv.pop(1)), Streamed.batches
  config = config_flags.DEFINE_config_file("config", recipe)
  def noted(*args, start, **kwargs):
    with open(workdir / "order.jsonl", "a") as file:
      for step, batch in enumerate(read(*args, start=start, **kwargs), start):
        file.write(json.dumps([step, batch["index"].tolist()]) + "\\n")
        file.flush()
        os.fsync(file.fileno())
        yield batch
  Streamed.batches = noted
  cli.run(lambda: train.main(config.value, workdir))
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory):
  root = tmp_path_factory.mktemp("images")
  for i in range(IMAGES):
    photograph(root / f"{i}.png", i)
  return root


def start(images, workdir, cache, threads, workers):
  workdir.mkdir(exist_ok=True)
  driver = workdir / "driver.py"
  driver.write_text(DRIVER)
  small = {k: v for k, v in SMALL.items() if not k.startswith("data.")}
  keys = {"data.folder": images, "data.channels": 3, "data.threads": threads, "data.workers": workers}
  keys |= {"batch_size": BATCH, "steps": STEPS, "log_every_steps": 1, "checkpoint_every_steps": 20}
  flags = [f"--config.{key}={value}" for key, value in {**small, **keys}.items()]
  command = [sys.executable, str(driver), str(ROOT / "configs" / "quickstart.py"), str(workdir), *flags]
  env = {**environment(cache), "PYTHONPATH": str(ROOT)}
  pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
  return subprocess.Popen(command, env=env, start_new_session=True, **pipes)


def wait(process, workdir, step):
  deadline = time.time() + 120
  while process.poll() is None and not any(r["step"] >= step for r in log.read_rows(workdir / "metrics.jsonl")):
    assert time.time() < deadline
    time.sleep(0.005)
  assert process.poll() is None, process.communicate()[0]


def group_is_gone(process, seconds=20):
  for _ in range(10 * seconds):
    try:
      os.killpg(process.pid, 0)
    except ProcessLookupError:
      return True
    time.sleep(0.1)
  return False


@pytest.mark.slow
def test_killed_three_times_every_index_comes_once_an_epoch_in_the_same_order(images, cache, tmp_path):
  parts = ((50, 0, 0), (120, 1, 0), (200, 1, 1), (None, 3, 3))
  for step, threads, workers in parts:
    process = start(images, tmp_path, cache, threads, workers)
    if step:
      wait(process, tmp_path, step)
      process.kill()  # the run alone: its workers must see that it is gone
      process.communicate()
    else:
      out, _ = process.communicate(timeout=200)
      assert process.returncode == 0 and "resuming at step" in out, out
    assert group_is_gone(process)
  lines = [json.loads(line) for line in (tmp_path / "order.jsonl").read_text().splitlines()]
  order: dict = {}
  for step, index in lines:
    assert order.setdefault(step, index) == index  # steps after the last checkpoint come again, as they were
  assert sorted(order) == list(range(STEPS)) and len(lines) > STEPS
  for step, index in order.items():
    assert index == data.batch_indices(IMAGES, BATCH, 0, step).tolist()
  a = IMAGES // BATCH
  for epoch in range(STEPS // a):
    seen = np.concatenate([order[s] for s in range(epoch * a, (epoch + 1) * a)])
    assert len(np.unique(seen)) == a * BATCH  # the five left over are other ones each epoch


@pytest.mark.slow
@pytest.mark.parametrize("number, status, word", [(signal.SIGTERM, 143, "saved"), (signal.SIGINT, 130, "saved")])
def test_a_signal_to_the_whole_group_ends_quietly(images, cache, tmp_path, number, status, word):
  process = start(images, tmp_path, cache, 1, 2)
  wait(process, tmp_path, 5)
  os.killpg(process.pid, number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == status and word in out and "Traceback" not in out, out
  assert group_is_gone(process)
