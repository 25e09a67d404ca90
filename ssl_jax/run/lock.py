"""One run at a time in a workdir: a file that names its holder, kept fresh while the holder lives."""

import contextlib
import json
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import psutil

from ssl_jax.errors import UserError
from ssl_jax.run import cluster
from ssl_jax.run.cli import say

HEARTBEAT, STALE = 30.0, 120.0  # seconds
_CLOCK = 10.0  # seconds that a start time may seem to move when a machine's clock is set


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
  """Creates the workdir and holds it for this run, of one or of several processes, until it ends.

  WORKDIR/lock says which process on which host holds it. On this host a holder that has died is known at once. On
  another host it counts as dead if it has not touched the file for two minutes, and this waits as long as that takes.

  Raises:
    UserError: another run holds it, or nothing can be written there.
  """
  path = workdir / "lock"
  mine = cluster.together(lambda: _take(path) if cluster.is_main() else None)
  ended = threading.Event()
  if mine:
    threading.Thread(target=_keep, args=(path, mine, ended), daemon=True).start()
  try:
    yield
  finally:
    ended.set()
    if mine and _read(path) == mine:
      path.unlink(missing_ok=True)


def _take(path):
  """Creates the lock. Returns what is in it."""
  mine = {**_this_process(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "token": secrets.token_hex(8)}
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
      try:
        path.open("x").close()
      except FileExistsError:
        _wait_for_the_end_of(path)
        continue
      try:
        path.write_text(json.dumps(mine))
      except OSError:  # A full disk. An empty lock would hold up the next run.
        path.unlink()
        raise
      return mine
  except OSError as error:
    raise UserError(f"cannot write to {error.filename or path.parent}: {error.strerror}.") from error


def _wait_for_the_end_of(path):
  """Removes the lock of a holder that has died. Raises UserError as soon as it is known to live."""
  holder, first, told = _read(path), _age(path), False
  who = f"process {holder.get('pid', '?')} on {holder.get('host', 'another host')}"
  while first is not None and _read(path) == holder:
    lives, age = _lives(holder), _age(path)
    if lives or (age is not None and age < first):
      raise UserError(
        f"{path.parent} is in use by another run: {who}, since {holder.get('since', 'some time')}. Wait for its end, "
        f"or take another workdir. If there is no such process, delete {path}."
      )
    if age is None:
      return
    if lives is False or age > STALE:
      say(f"taking over {path.parent} from {who}, which has ended without removing its lock")
      aside = path.with_name(f"lock.{secrets.token_hex(8)}")
      with contextlib.suppress(FileNotFoundError):  # Of several runs that wait, one renames it.
        path.rename(aside)
        if _read(aside) != holder:  # Another run has taken over since: it keeps its lock.
          aside.rename(path)
        aside.unlink(missing_ok=True)
      return
    if not told:
      say(f"{path.parent} was last in use by {who}; waiting up to {STALE - age:.0f} s for a sign that it still runs")
      told = True
    first = max(first, age)
    time.sleep(1)


def _lives(holder):
  """Whether the holder's process runs; None where this host cannot tell."""
  here = _this_process()
  if any(holder.get(key) != here[key] for key in ("host", "namespace")):
    return None
  try:
    return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < _CLOCK
  except psutil.NoSuchProcess:
    return False
  except psutil.AccessDenied:
    return True


def _this_process() -> dict[str, Any]:
  namespace = "/proc/self/ns/pid"  # Containers may share a host's name, and not its processes.
  return {
    "host": socket.gethostname(),
    "namespace": os.readlink(namespace) if os.path.exists(namespace) else "",
    "pid": os.getpid(),
    "started": psutil.Process().create_time(),
  }


def _age(path):
  """Seconds since the holder touched the lock, by the clock of the file system; None: there is no lock."""
  now = path.with_name(f"now.{secrets.token_hex(8)}")
  try:
    now.touch()
    age = now.stat().st_mtime - path.stat().st_mtime
  except FileNotFoundError:
    age = None
  now.unlink(missing_ok=True)
  return age


def _read(path):
  try:
    content = json.loads(path.read_text())
  except (OSError, ValueError):  # not there, or not yet written
    return {}
  return content if isinstance(content, dict) else {}


def _keep(path, mine, ended):
  """Touches the lock until the run has ended, and ends the run if another one has taken it."""
  while not ended.wait(HEARTBEAT):
    with contextlib.suppress(OSError):  # A network file system may be away for a while.
      holder = _read(path)
      if holder and holder != mine:
        cluster.leave(
          f"{path.parent} was taken over by process {holder.get('pid')} on {holder.get('host')}, since this run had "
          "not touched its lock for two minutes."
        )
      os.utime(path)
