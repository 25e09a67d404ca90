"""Chaos: two processes train while things happen to them, and the run must end as if nothing had happened.

  python tests/chaos.py --rounds=25 --seed=0 --workdir=runs/chaos

Each round strikes at a random instant, while the processes start, compile, train, evaluate or save; all of them must
end within a bound, and the next start must go on from the newest checkpoint. After the last round the run goes on to
its end undisturbed: its checkpoint must have the bits of a run that nothing happened to, and each row must be there
once. The run lives on a small disk of its own (tmpfs) where one may be mounted.
"""

import argparse
import contextlib
import errno
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # ssl_jax where it is not installed

from runs import ROOT, address, assert_same_run, command, environment
from ssl_jax.run import checkpoint, cluster, log

KINDS = ("kill", "term", "stop", "disk", "limit", "unreadable")
CONNECT = 30  # seconds that a process waits for the other at the start
BOUND = cluster.HEARTBEAT + 30  # seconds within which all processes end, whatever happens to one of them
WHOLE = 1200  # seconds that an undisturbed run may take
DISK = 24 << 20  # bytes of the small disk


class Running(NamedTuple):
  """Two processes, and where they write."""

  processes: list[subprocess.Popen]
  logs: list[pathlib.Path]
  run: pathlib.Path

  def said(self) -> str:
    return self.logs[0].read_text()

  def step(self) -> int:
    """The newest row's step; -1 until this start has done a step of its own."""
    if "first step done" not in self.said():
      return -1
    return max(row["step"] for row in log.read_rows(self.run / "metrics.jsonl"))

  def resumed(self) -> int | None:
    """The step that it went on from; None until it has said so."""
    found = re.search(r"^(?:resuming at step (\d+)|starting in )", self.said(), re.MULTILINE)
    return int(found[1] or 0) if found else None

  def alive(self) -> bool:
    return all(process.poll() is None for process in self.processes)

  def describe(self) -> str:
    tails = "\n".join(f"{log}:\n{log.read_text()[-3000:]}" for log in self.logs)
    return f"{[process.poll() for process in self.processes]}\n{tails}"


def chaos(workdir: pathlib.Path, cache: pathlib.Path, kinds: list[str], seed: int, say: Callable = print) -> None:
  """One round for each of `kinds` on one run in `workdir`, then to its end. Raises AssertionError where it fails."""
  rng = random.Random(seed)
  steps = 8 * len(kinds) + 20  # A round gets 4 steps further on average: it is not to be through before the last one.
  settings = dict(steps=steps, log_every_steps=1, checkpoint_every_steps=5, eval_every_epochs=2)
  whole = workdir / "whole"
  began = time.monotonic()
  running = launch(cache, whole, workdir / "logs" / "whole", settings)
  assert ended(running, WHOLE) == [0, 0], running.describe()
  say(f"an undisturbed run of {steps} steps: {time.monotonic() - began:.0f} s")

  running, damaged = None, None
  with small_disk(workdir / "disk") as mounted:
    run = workdir / "disk" / "run"
    say(f"the run lives on {'a tmpfs' if mounted else 'no disk of its own, so a full one is a file-size limit'}")
    try:
      for i, kind in enumerate(kinds, 1):
        kind = "limit" if kind == "disk" and not mounted else kind
        fresh = running is None
        if fresh:
          newest = [*checkpoint.steps(run / "checkpoints"), 0]
          running = launch(cache, run, workdir / "logs" / f"round_{i:02d}", settings)
        when = instant(rng, running, kind, fresh)
        victim = rng.randrange(2)
        what, statuses, seconds = strike(rng, kind, running, victim, run)
        if fresh and (start := running.resumed()) is not None:
          check_start(start, newest, damaged, running)
          damaged = None
        begins = f"from step {running.resumed()}" if running.resumed() is not None else "had not begun"
        ends = f"ended {statuses}" if statuses else "went on"
        if statuses:
          running = None
        if kind == "unreadable":
          damaged, how = damage(rng, run / "checkpoints")
          what += f", then {how}"
        say(f"round {i:2d}: {begins:14s} {when}: {what}; {ends} after {seconds:.1f} s")
      if running is None:
        newest = [*checkpoint.steps(run / "checkpoints"), 0]
        running = launch(cache, run, workdir / "logs" / "last", settings)
        assert ended(running, WHOLE) == [0, 0], running.describe()
        check_start(running.resumed(), newest, damaged, running)
      assert ended(running, WHOLE) == [0, 0], running.describe()
      say(f"to the end: from step {running.resumed()} to {steps}")
    finally:
      for process in running.processes if running else ():
        process.kill()
        process.wait()
      if mounted and run.exists():
        shutil.copytree(run, workdir / "run")
    assert_same_run(run, whole, steps)
    left = [
      p for p in run.rglob("*") if p.name.startswith(".shared") or p.suffix == ".tmp" or "checkpoint-tmp" in p.name
    ]
    assert not left, left


def launch(cache, workdir, logs, settings) -> Running:
  logs.mkdir(parents=True)
  files = [logs / f"process_{i}.txt" for i in range(2)]
  flags = f"--coordinator_address={address()}", "--num_processes=2", f"--connect_timeout={CONNECT}"
  processes = []
  for i, file in enumerate(files):
    with file.open("w") as log:
      argv = command("train.py", workdir, *flags, f"--process_id={i}", **settings)
      processes.append(subprocess.Popen(argv, env=environment(cache), stdout=log, stderr=log, cwd=ROOT))
  return Running(processes, files, workdir)


def instant(rng, running, kind, fresh) -> str:
  """Waits for a random instant; returns what it is called."""
  if fresh and kind != "unreadable" and rng.random() < 0.3:
    seconds = rng.uniform(0, 15)
    until(lambda: running.step() >= 0, running, seconds)
    return f"{seconds:.1f} s after the start"
  until(lambda: running.step() >= 0, running, BOUND)
  target = running.step() + rng.randint(0, 8)
  # What is made unreadable must not be all there is.
  enough = (lambda: len(checkpoint.steps(running.run / "checkpoints")) >= 2) if kind == "unreadable" else lambda: True
  assert until(lambda: running.step() >= target and enough(), running, BOUND), running.describe()
  time.sleep(rng.uniform(0, 0.4))
  return f"at step {running.step()}"


def until(reached, running, seconds) -> bool:
  """Waits for it; whether it came in time. Nothing may end by itself."""
  deadline = time.monotonic() + seconds
  while not reached():
    assert running.alive(), running.describe()
    if time.monotonic() > deadline:
      return False
    time.sleep(0.005)
  return True


def strike(rng, kind, running, victim, run) -> tuple[str, list[int], float]:
  """Does it. Returns (what was done, how the processes ended or [] if they go on, seconds until then)."""
  process, other = running.processes[victim], running.processes[1 - victim]
  began, before = time.monotonic(), running.step()
  assert running.alive(), running.describe()
  if kind == "kill":
    process.kill()
    statuses = ended(running)
    assert statuses[1 - victim] != 0, running.describe()
    what = f"SIGKILL to process {victim}"
  elif kind == "term":
    process.terminate()
    statuses = ended(running)
    assert statuses == [143, 143] or (before < 0 and 0 not in statuses), running.describe()
    what = f"SIGTERM to process {victim}"
  elif kind == "stop":
    seconds = rng.uniform(1, 5)
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)
    process.send_signal(signal.SIGCONT)
    assert until(lambda: running.step() > before, running, BOUND), running.describe()
    statuses, what = [], f"SIGSTOP to process {victim} for {seconds:.1f} s"
  elif kind == "freeze":
    process.send_signal(signal.SIGSTOP)
    other.wait(BOUND)
    took = time.monotonic() - began
    process.kill()
    statuses = ended(running)
    assert statuses[1 - victim] != 0, running.describe()
    return f"SIGSTOP to process {victim} for ever", statuses, took
  elif kind == "disk":
    room = rng.randrange(0, 40_000)
    fill(run.parent / "ballast", room)
    statuses = ended(running)
    (run.parent / "ballast").unlink()
    assert 0 not in statuses, running.describe()
    what = f"a full disk with room for {room} bytes"
  elif kind == "limit":
    size = rng.randrange(24_000, 45_000)  # more than a log, less than the arrays
    for each in running.processes:
      resource.prlimit(each.pid, resource.RLIMIT_FSIZE, (size, size))
    statuses = ended(running)
    assert 0 not in statuses, running.describe()
    what = f"no file may be longer than {size} bytes"
  else:
    process.kill()
    other.kill()
    statuses = ended(running)
    what = "SIGKILL to both"
  return what, statuses, time.monotonic() - began


def ended(running, seconds=BOUND) -> list[int]:
  """How they ended; none may take longer."""
  deadline = time.monotonic() + seconds
  for process in running.processes:
    try:
      process.wait(max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
      raise AssertionError(f"a process is still there after {seconds} s: {running.describe()}") from None
  return [process.returncode for process in running.processes]


def damage(rng, folder) -> tuple[int, str]:
  """Makes a random file of the newest checkpoint unreadable. Returns its step and what was done."""
  step = checkpoint.steps(folder)[0]
  file = rng.choice(sorted(p for p in (folder / str(step)).rglob("*") if p.is_file() and p.stat().st_size))
  content = bytearray(file.read_bytes())
  kind = rng.choice(("cut in half", "a bit flipped", "deleted", "a folder in its place"))
  file.unlink()
  if kind == "cut in half":
    file.write_bytes(content[: len(content) // 2])
  elif kind == "a bit flipped":
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
  elif kind == "a folder in its place":
    file.mkdir()  # Root may read whatever chmod forbids.
  return step, f"{step}/{file.relative_to(folder / str(step))}: {kind}"


def check_start(start, newest, damaged, running) -> None:
  """It goes on from the newest checkpoint, or, with a word, from the one before where that was damaged."""
  if damaged == newest[0] and start != damaged:
    newest = newest[1:]
    assert f"skipped the checkpoint of step {damaged}" in running.said(), running.describe()
  assert start == newest[0], f"started from {start}, the checkpoints are {newest}: {running.describe()}"


def fill(ballast, room) -> None:
  """Writes a file that leaves `room` bytes of its disk, or less."""
  with ballast.open("wb", buffering=0) as file:
    while (free := os.statvfs(ballast).f_bavail * os.statvfs(ballast).f_frsize - room) > 0:
      try:
        file.write(bytes(min(free, 1 << 16)))
      except OSError as error:  # The processes write as well.
        assert error.errno == errno.ENOSPC
        return


@contextlib.contextmanager
def small_disk(folder: pathlib.Path) -> Iterator[bool]:
  """Mounts one on `folder` for as long as it is needed; yields whether this was allowed."""
  folder.mkdir(parents=True)
  mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", str(folder)]
  mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
  try:
    yield mounted
  finally:
    if mounted:
      subprocess.run(["umount", "--lazy", str(folder)], check=True)


def main() -> int:
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--rounds", type=int, default=25)
  parser.add_argument("--seed", type=int, default=0)
  parser.add_argument("--workdir", type=pathlib.Path, required=True, help="a new folder")
  args = parser.parse_args()
  # All kinds in turn, and once a process that is stopped and never goes on, which takes a minute to be found out.
  kinds = [KINDS[i % len(KINDS)] for i in range(args.rounds - 1)] + ["freeze"]
  random.Random(args.seed).shuffle(kinds)
  began = time.monotonic()
  try:
    chaos(args.workdir, args.workdir / "xla", kinds, args.seed, lambda line: print(line, flush=True))
  except AssertionError as error:
    print(f"{error}\nFAILED after {time.monotonic() - began:.0f} s")
    return 1
  print(f"PASSED in {time.monotonic() - began:.0f} s: bit for bit the undisturbed run, each row once")
  return 0


if __name__ == "__main__":
  sys.exit(main())
