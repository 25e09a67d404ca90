"""One run at a time in a workdir."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest

from runs import start
from ssl_jax.errors import UserError
from ssl_jax.run import lock


@pytest.fixture
def path(tmp_path, monkeypatch):
  """The lock of a workdir, where waiting takes no time."""
  monkeypatch.setattr(lock.time, "sleep", lambda _: None)
  return tmp_path / "run" / "lock"


def leave_behind(path, age=0.0, **changes):
  """A lock as this process writes it, with changes, that was touched so many seconds ago."""
  path.parent.mkdir()
  path.write_text(json.dumps({**lock._this_process(), "since": "yesterday", "token": "x"} | changes))
  touched(path, age)


def touched(path, age):
  os.utime(path, (time.time() - age, time.time() - age))


def holder(path):
  return json.loads(path.read_text())


def test_a_workdir_is_held_by_one_run_and_free_again_after_it(path):
  with lock.held(path.parent):
    assert holder(path)["pid"] == os.getpid() and os.listdir(path.parent) == ["lock"]
    told = rf"is in use by another run: process {os.getpid()} on .*, since 2.*delete"
    with pytest.raises(UserError, match=told), lock.held(path.parent):
      raise AssertionError
    assert path.exists()  # the refused one has not freed it
  assert not path.exists()
  with lock.held(path.parent):
    assert path.exists()


def test_a_holder_on_this_host_that_has_died_is_replaced_at_once(path, capsys):
  child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
  leave_behind(path, pid=int(child.stdout))
  with lock.held(path.parent):
    assert holder(path)["pid"] == os.getpid()
  assert f"taking over {path.parent} from process {int(child.stdout)}" in capsys.readouterr().out
  assert not os.listdir(path.parent)


def test_another_process_with_the_number_of_the_holder_is_not_the_holder(path):
  leave_behind(path, started=lock._this_process()["started"] - 100)
  with lock.held(path.parent):
    pass


@pytest.mark.parametrize(
  "elsewhere", [dict(host="other"), dict(namespace="pid:[1]", started=0.0), dict(pid="?", host="other")]
)
def test_a_holder_elsewhere_lives_as_long_as_it_touches_its_lock(path, monkeypatch, elsewhere):
  leave_behind(path, 20, **elsewhere)
  monkeypatch.setattr(lock.time, "sleep", lambda _: touched(path, 0))
  with pytest.raises(UserError, match="is in use by another run"), lock.held(path.parent):
    raise AssertionError


def test_a_holder_elsewhere_that_has_not_touched_its_lock_for_two_minutes_is_replaced(path, monkeypatch, capsys):
  leave_behind(path, 95, host="other")
  ages = iter(range(100, 1000, 10))
  monkeypatch.setattr(lock.time, "sleep", lambda _: touched(path, next(ages)))
  with lock.held(path.parent):
    assert holder(path)["host"] != "other"
  out = capsys.readouterr().out
  assert "waiting up to 25 s for a sign that it still runs" in out and "taking over" in out
  assert next(ages) == 140  # it was not taken before


def test_a_lock_that_was_never_written_does_not_block_for_ever(path):
  path.parent.mkdir()
  path.touch()
  touched(path, 200)
  with lock.held(path.parent):
    pass


def test_of_two_that_wait_for_a_dead_holder_one_gets_the_workdir(path, monkeypatch):
  leave_behind(path, 200, host="other")
  rename = pathlib.Path.rename

  def later(self, target):  # the other run is faster, between the look at the lock and its removal
    if self == path:
      monkeypatch.setattr(pathlib.Path, "rename", rename)
      path.write_text(json.dumps(lock._this_process() | {"token": "the other's"}))
    return rename(self, target)

  monkeypatch.setattr(pathlib.Path, "rename", later)
  with pytest.raises(UserError, match="in use"), lock.held(path.parent):
    raise AssertionError
  assert holder(path)["token"] == "the other's" and os.listdir(path.parent) == ["lock"]


def test_a_run_that_has_lost_its_lock_ends(path, monkeypatch):
  said = []
  monkeypatch.setattr(lock, "HEARTBEAT", 0.01)
  monkeypatch.setattr(lock.cluster, "leave", said.append)
  with lock.held(path.parent):
    touched(path, 500)
    deadline = time.time() + 20
    while lock._age(path) > 400 and time.time() < deadline:
      threading.Event().wait(0.01)
    assert lock._age(path) < 400 and not said  # which the heartbeat has touched
    path.write_text(json.dumps({"pid": 7, "host": "other"}))
    while not said and time.time() < deadline:
      threading.Event().wait(0.01)
  assert "was taken over by process 7 on other" in said[0]
  assert path.exists()  # the other's


def test_where_nothing_can_be_written_the_path_is_told(tmp_path):
  (tmp_path / "file").touch()
  for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
    told = rf"cannot write to {tmp_path}/file.*: (File exists|Not a directory)\."
    with pytest.raises(UserError, match=told), lock.held(workdir):
      raise AssertionError


def test_of_two_runs_started_at_once_in_one_workdir_one_is_refused(cache, tmp_path):
  processes = {seed: start(cache, "train.py", tmp_path / "run", seed=seed, steps=100_000) for seed in (0, 1)}
  deadline = time.monotonic() + 240
  while all(process.poll() is None for process in processes.values()) and time.monotonic() < deadline:
    time.sleep(0.1)
  other, winner = sorted(processes, key=lambda seed: processes[seed].poll() is None)
  printed = processes[other].communicate(timeout=10)[0]
  processes[winner].send_signal(signal.SIGTERM)
  processes[winner].communicate(timeout=120)
  assert processes[other].returncode == 1 and processes[winner].returncode != 1, printed
  assert f"is in use by another run: process {processes[winner].pid} on" in printed
  assert json.loads((tmp_path / "run" / "config.json").read_text())["seed"] == winner
