"""Several real processes with JAX's own runtime and real collectives: one run, whatever happens to one of them."""

import concurrent.futures
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import PIL.Image
import pytest
from chaos import chaos
from test_all_methods import METHODS

from runs import (
  ROOT,
  address,
  assert_same_run,
  command,
  environment,
  final_state,
  finish,
  rows,
  start,
  wait_for_save,
  wait_for_step,
)
from ssl_jax.errors import UserError
from ssl_jax.run import cluster, log, signals

SLOW = pytest.mark.slow


def launch(cache, workdir, processes=2, devices=1, each=(), **overrides):
  """Starts train.py in every process; `each` has more arguments for each of them."""
  at = address()
  return [
    subprocess.Popen(
      command(
        "train.py",
        workdir,
        f"--coordinator_address={at}",
        f"--num_processes={processes}",
        f"--process_id={i}",
        *(each[i] if each else ()),
        **overrides,
      ),
      env=environment(cache, devices if isinstance(devices, int) else devices[i]),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=ROOT,
    )
    for i in range(processes)
  ]


def outputs(running, timeout=120):
  """[(exit status, what it printed)]; none outlives the test."""
  deadline = time.monotonic() + timeout
  try:
    printed = [process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in running]
  finally:
    for process in running:
      process.kill()
  return [(process.returncode, text) for process, text in zip(running, printed, strict=True)]


def wait(running, workdir, reached, timeout=120):
  deadline = time.monotonic() + timeout
  while not reached(workdir):
    assert time.monotonic() < deadline and all(process.poll() is None for process in running)
    time.sleep(0.002)


def assert_nearly_the_same_rows(got, want):
  assert [row["step"] for row in got] == [row["step"] for row in want]  # each once
  for a, b in zip(got, want, strict=True):
    if "loss" in a:
      tolerance = 1e-5 if a["step"] <= 8 else 1e-3  # float32 sums in another order, amplified by Adam step for step
      np.testing.assert_allclose(a["loss"], b["loss"], rtol=tolerance)


def test_sigterm_to_one_process_saves_once_on_all_and_another_topology_goes_on(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  running = launch(cache, workdir)
  wait(running, workdir, wait_for_step(4))
  running[1].send_signal(signal.SIGTERM)
  (status, text), (other, silent) = outputs(running)
  assert (status, other) == (143, 143), text + silent
  assert "devices: 2 x cpu, in 2 process(es)" in text and "stopped by SIGTERM" in text
  assert "step" not in silent, silent
  out = finish(start(cache, "train.py", workdir, devices=4))
  assert "resuming at step" in out
  assert_nearly_the_same_rows(rows(workdir), rows(unbroken[0]))


@SLOW
def test_sigterm_before_the_first_step_of_a_resumed_run_is_not_lost(cache, tmp_path):
  workdir = tmp_path / "run"
  assert [status for status, _ in outputs(launch(cache, workdir, steps=400, stop_after_steps=4))] == [0, 0]
  before = time.time()
  running = launch(cache, workdir, steps=400)
  # It has joined the other process, and is about to go on.
  wait(running, workdir, lambda workdir: (workdir / "config.json").stat().st_mtime > before)
  running[1].send_signal(signal.SIGTERM)
  assert [status for status, _ in outputs(running)] == [143, 143]


@SLOW
def test_where_a_process_is_killed_the_others_end_with_a_word(cache, tmp_path):
  workdir = tmp_path / "run"
  running = launch(cache, workdir, steps=20_000)
  wait(running, workdir, wait_for_save(4))
  running[1].kill()
  began = time.monotonic()
  (status, text), _ = outputs(running)
  assert time.monotonic() - began < 30
  assert status == 1 and "process 0 lost another process of this run" in text.splitlines()[-1], text


@SLOW
@pytest.mark.parametrize("launcher", ["slurm", "ompi"])
def test_a_launchers_processes_find_each_other(cache, tmp_path, launcher):
  def found_by(i):
    if launcher == "slurm":
      at = dict(JOB_ID="1", STEP_NODELIST="localhost", NTASKS="2", PROCID=str(i), LOCALID=str(i))
      return {f"SLURM_{name}": value for name, value in at.items()}
    at = dict(COMM_WORLD_SIZE="2", COMM_WORLD_RANK=str(i), COMM_WORLD_LOCAL_RANK=str(i))
    return {f"OMPI_{name}": value for name, value in at.items()} | {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1"}

  port = {"JAX_COORDINATOR_PORT": address().partition(":")[2]}
  running = [
    subprocess.Popen(
      command("train.py", tmp_path / "run", stop_after_steps=2),
      env=environment(cache) | port | found_by(i),
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=ROOT,
    )
    for i in range(2)
  ]
  (status, text), (other, _) = outputs(running)
  assert (status, other) == (0, 0) and "in 2 process(es)" in text, text


@SLOW
def test_a_lost_coordinator_ends_the_others_and_the_run_goes_on_exactly(unbroken, cache, tmp_path):
  whole, workdir = tmp_path / "whole", tmp_path / "run"
  assert [status for status, _ in outputs(launch(cache, whole))] == [0, 0]
  running = launch(cache, workdir)
  wait(running, workdir, wait_for_save(12))
  running[0].kill()
  began = time.monotonic()
  _, (status, text) = outputs(running)
  assert time.monotonic() - began < 30 and status != 0, text
  assert [status for status, _ in outputs(launch(cache, workdir))] == [0, 0]
  assert_same_run(workdir, whole)


@SLOW
def test_two_processes_then_one_then_four_devices_then_two_processes_again(unbroken, cache, tmp_path):
  workdir = tmp_path / "run"
  assert [status for status, _ in outputs(launch(cache, workdir, stop_after_steps=5))] == [0, 0]
  finish(start(cache, "train.py", workdir, stop_after_steps=9))
  finish(start(cache, "train.py", workdir, devices=4, stop_after_steps=13))
  assert [status for status, _ in outputs(launch(cache, workdir, devices=2))] == [0, 0]
  assert_nearly_the_same_rows([r for r in rows(workdir) if r["step"] % 2 == 0], rows(unbroken[0]))
  figures = json.loads(finish(start(cache, "eval_knn.py", workdir, "--k=20")).splitlines()[-1])
  assert figures["k20_top1"] == rows(workdir)[-1]["knn_top1"]


def test_processes_that_were_not_started_alike_are_told_so(cache, tmp_path):
  each = ["--config.seed=1"], ["--config.seed=2"]
  for status, text in outputs(launch(cache, tmp_path / "run", each=each)):
    assert status == 1 and "config.seed=1 and config.seed=2" in text and "Traceback" not in text, text
  assert not (tmp_path / "run").exists()


@SLOW
def test_unequal_devices_are_told(cache, tmp_path):
  for status, text in outputs(launch(cache, tmp_path / "run", devices=(1, 3))):
    assert status == 1 and "equally many devices; they have 1, 3" in text and "Traceback" not in text, text


@SLOW
def test_a_workdir_that_is_not_shared_is_found_out(cache, tmp_path):
  each = [f"--workdir={tmp_path / 'here'}"], [f"--workdir={tmp_path / 'far' / 'there'}"]
  for status, text in outputs(launch(cache, tmp_path / "run", each=each)):
    assert status == 1 and "process 1 does not see what process 0 writes" in text and "Traceback" not in text, text


@SLOW
def test_folders_may_lie_elsewhere_but_must_hold_the_same(cache, tmp_path):
  for i in range(32):
    pixels = np.random.default_rng(i).integers(0, 256, (20 + i % 3, 20, 3), dtype=np.uint8)
    file = tmp_path / "a" / ("val" if i % 4 == 0 else "train") / f"class{i % 2}" / f"{i}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    PIL.Image.fromarray(pixels).save(file)
  shutil.copytree(tmp_path / "a", tmp_path / "b")
  each = [[f"--config.data.folder={tmp_path / name}"] for name in "ab"]
  settings = {"data.split": "train", "data.test_split": "val", "data.channels": 3, "batch_size": 8, "steps": 6}
  settings |= {"lr.warmup_epochs": 0.0, "knn.k": 3}
  for stop in 2, 4:
    found = outputs(launch(cache, tmp_path / "run", each=each, stop_after_steps=stop, **settings))
    assert [status for status, _ in found] == [0, 0], found
  shutil.rmtree(tmp_path / "b" / "val")
  for status, text in outputs(launch(cache, tmp_path / "run", each=each, **settings)):
    assert status == 1 and "data.test_split=" in text and "and data.test_split=none" in text, text


@SLOW
def test_what_is_wrong_on_one_process_is_told_by_all(cache, tmp_path):
  each = [], [f"--config.data.data_dir={tmp_path / 'none'}"]
  for status, text in outputs(launch(cache, tmp_path / "run", each=each)):
    assert status == 1 and "process 1: " in text and "Traceback" not in text, text


def test_a_coordinator_that_never_comes_up_is_told_in_time(cache, tmp_path):
  arguments = f"--coordinator_address={address()}", "--num_processes=2", "--connect_timeout=3"
  began = time.monotonic()
  out = finish(start(cache, "train.py", tmp_path / "run", *arguments, "--process_id=1"), status=1)
  assert "the other processes did not connect within 3 s" in out.splitlines()[-1] and time.monotonic() - began < 20


@pytest.mark.parametrize(
  "arguments, text",
  [
    (("host:1", None, None), "--num_processes and --process_id are missing"),
    ((None, 2, 0), "--coordinator_address is missing"),
    (("127.0.0.1:1", 2, 2), r"process_id must be in \[0, 2\), got 2"),
  ],
)
def test_flags_that_do_not_fit_are_refused(arguments, text):
  with pytest.raises(UserError, match=text):
    cluster.connect(*arguments, timeout=1)


@pytest.mark.parametrize("error", [OSError, lambda *args: ValueError(f"RESOURCE_EXHAUSTED: {OSError(*args)}")])
def test_a_full_disk_is_told_in_a_line(error, tmp_path):
  told = rf"cannot write to {tmp_path}: No space left on device, [\d,]+ bytes are free\. What was saved before is whole"
  with pytest.raises(UserError, match=told), cluster.ending_together(folder=tmp_path):
    raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))
  # No disk is named that need not be the full one.
  with pytest.raises(UserError, match=r"^cannot write: No space left on device\."), cluster.ending_together():
    raise error(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_the_file_system_refuses_is_a_line_with_the_path_and_a_bug_is_none(tmp_path):
  file, missing = tmp_path / "file", tmp_path / "gone" / "file"
  file.touch()
  with pytest.raises(UserError, match=rf"^{file}/below: Not a directory\.$"), cluster.ending_together():
    (file / "below").read_text()
  with pytest.raises(UserError, match=rf"^{missing}: No such file or directory\.$"):  # noqa: SIM117
    with cluster.ending_together(folder=tmp_path):
      missing.write_text("")
  with pytest.raises(FileNotFoundError), cluster.ending_together():
    missing.read_text()
  text = f'PERMISSION_DENIED: Error writing local file "{file}": [OS error 13: EACCES Permission denied]'
  assert cluster.refusal(ValueError(text)) == f"{file}: Permission denied."
  assert "No space left on device" in cluster.refusal(RuntimeError("write() failed: No space left on device"), file)
  assert cluster.refusal(ValueError("Permission denied")) is None and cluster.refusal(TypeError("x")) is None


def test_a_full_disk_is_noticed_by_whoever_writes_to_tensorboard(tmp_path, monkeypatch):
  (tmp_path / "tensorboard").mkdir()
  with monkeypatch.context() as patch:
    patch.setattr(time, "time", lambda: 1e9)
    (tmp_path / "tensorboard" / f"events.out.tfevents.1000000000.{socket.gethostname()}").symlink_to("/dev/full")
    writer = log.Writer(tmp_path, -1)
  with pytest.raises(OSError, match="No space left"):  # The next rows would wait for ever for a thread that is dead.
    writer.write({"step": 1, "loss": 1.0})
  with pytest.raises(OSError, match="No space left"):
    writer.loggers[0].board._py_recordio_writer.close()
  writer.file.close()


@SLOW
def test_whatever_happens_to_it_a_run_ends_as_if_nothing_had(cache, tmp_path):
  chaos(tmp_path, cache, ["disk", "unreadable", "kill"], seed=1)  # python tests/chaos.py does 25 rounds


# Every method on three topologies, and the same numbers.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """`trained(processes, devices)`: the folder that cluster_worker.py wrote."""
  folders = {}

  def run(processes, devices):
    if (processes, devices) in folders:
      return folders[processes, devices]
    folder = folders[processes, devices] = tmp_path_factory.mktemp(f"{processes}x{devices}")
    at = address()
    running = [
      subprocess.Popen(
        [
          sys.executable,
          str(ROOT / "tests" / "cluster_worker.py"),
          str(folder),
          at,
          str(processes),
          str(i),
          *METHODS,
          "sharded",
        ],
        env={**environment(folder / "xla", devices), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT / "tests",
      )
      for i in range(processes)
    ]
    for status, text in outputs(running, timeout=600):
      assert status == 0, text
    return folder

  return run


@SLOW
@pytest.mark.parametrize("processes, devices", [(2, 2), (4, 1)])
def test_every_method_has_the_same_numbers_on_every_topology(trained, processes, devices):
  got, want = trained(processes, devices), trained(1, 4)
  for name in (name.replace(":", "_") for name in [*METHODS, "sharded"]):
    whole = "dino_quickstart" if name == "sharded" else name
    folders = got / name, want / whole
    a, b = (log.read_rows(folder / "metrics.jsonl") for folder in folders)
    assert [row["step"] for row in a] == [row["step"] for row in b]
    for row, other in zip(a, b, strict=True):
      for key in ("loss", "grad_norm", "knn_top1"):
        assert (key in row) == (key in other)
        if key in row:
          np.testing.assert_allclose(row[key], other[key], rtol=1e-5, err_msg=f"{name} {key} {row['step']}")
    states = [final_state(folder, 3) for folder in folders]
    leaves = [dict(flat(state)) for state in states]
    assert leaves[0].keys() == leaves[1].keys()
    for path, x in leaves[0].items():
      y = leaves[1][path]
      if "fingerprint" not in path:
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1e-3), err_msg=f"{name} {path}")
  with np.load(got / "views.npz") as a, np.load(want / "views.npz") as b:
    assert len(a.files) == 2
    for key in a.files:
      np.testing.assert_array_equal(a[key], b[key])


def flat(tree, prefix=""):
  if isinstance(tree, dict | list | tuple):
    for key, child in tree.items() if isinstance(tree, dict) else enumerate(tree):
      yield from flat(child, f"{prefix}/{key}")
  elif tree is not None:
    yield prefix, np.asarray(tree)


def test_the_first_ctrl_c_asks_the_run_to_save_and_the_second_ends_it(capsys):
  before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
  with signals.listening() as stopping:
    assert stopping() == 0
    signal.raise_signal(signal.SIGINT)
    assert stopping() == signal.SIGINT and "Ctrl-C once more ends at once" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert before == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))  # a notebook keeps its own

  def in_a_thread():
    with signals.listening() as stopping:
      return stopping()

  with concurrent.futures.ThreadPoolExecutor(1) as pool:  # as in a notebook
    assert pool.submit(in_a_thread).result() == 0
