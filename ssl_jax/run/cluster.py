"""Several processes as one program: how they connect, agree, and end together.

With a single process everything here is a no-op, or returns that process's own answer.
"""

import contextlib
import errno
import os
import pathlib
import re
import secrets
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ssl_jax.errors import UserError
from ssl_jax.run import progress

HEARTBEAT = 60  # seconds without a heartbeat of one process after which JAX ends all others
_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_REFUSED = (
  *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
  *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.EMFILE, errno.ENFILE),
)
_SEEN_WITHIN = 20.0  # seconds that a shared file system may take to show a file


def connect(coordinator_address: str | None, num_processes: int | None, process_id: int | None, timeout: int) -> None:
  """Connects to the other processes of this run.

  Without arguments they are those of the cluster that JAX finds on Cloud TPU, under SLURM, Open MPI and Kubernetes;
  where it finds none, this is a single process. Must be called before JAX is used in any other way.

  Args:
    coordinator_address: HOST:PORT of process 0.
    num_processes: how many there are.
    process_id: which of them this is.
    timeout: seconds to wait for all of them.

  Raises:
    UserError: some of the three are missing or out of range, or the processes have unequal numbers of devices. If the
      others do not connect in time, the process exits.
  """
  given: dict[str, Any] = dict(
    coordinator_address=coordinator_address, num_processes=num_processes, process_id=process_id
  )
  missing = [f"--{name}" for name, value in given.items() if value is None]
  if 0 < len(missing) < 3:
    are = f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"
    raise UserError(f"{are} missing: give all three, or none where JAX finds the cluster itself.")
  if not missing and not 0 <= given["process_id"] < given["num_processes"]:
    raise UserError(f"--process_id must be in [0, {num_processes}), got {process_id}.")
  where = "" if missing else f"process {process_id} of {num_processes} at {coordinator_address}: "

  def late():  # JAX itself would abort with a stack trace
    leave(
      f"{where}the other processes did not connect within {timeout} s. Is process 0 running, can it be reached, and "
      "was each process started with the same address and number of processes, and a number of its own?"
    )

  timer = threading.Timer(timeout, late)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **given,
      initialization_timeout=timeout + 30,
      heartbeat_timeout_seconds=HEARTBEAT,
      shutdown_timeout_seconds=HEARTBEAT,
    )
  except ValueError as error:
    if len(missing) < 3 or "coordinator_address should be defined" not in str(error):
      raise UserError(f"{where}{error}") from error
  except RuntimeError as error:  # a port in use, two processes with one id
    raise UserError(f"{where}{str(error).splitlines()[0]}") from error
  else:  # Each process sees all devices; with unequal numbers JAX's own collectives would hang.
    counts = [sum(d.process_index == i for d in jax.devices()) for i in range(jax.process_count())]
    if len(set(counts)) > 1:
      raise UserError(f"all processes must have equally many devices; they have {', '.join(map(str, counts))}.")
  finally:
    timer.cancel()


def is_main() -> bool:
  """Whether this is the process that writes files and prints."""
  return not jax.distributed.is_initialized() or jax.process_index() == 0


def exchange(text: str) -> list[str]:
  """Every process's text, in order. All processes have to call it, so that it is also a barrier."""
  if jax.process_count() == 1:
    return [text]
  content = np.frombuffer(text.encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.int32(len(content)))
  padded = np.zeros(max(1, lengths.max()), np.uint8)
  padded[: len(content)] = content
  everyone = np.asarray(multihost_utils.process_allgather(padded))
  return [row[:length].tobytes().decode() for row, length in zip(everyone, lengths, strict=True)]


def together(function: Callable[[], Any]) -> Any:
  """Calls `function` on every process. Where it raises UserError on one of them, all of them raise it."""
  result, problem = None, ""
  try:
    result = function()
  except UserError as error:
    problem = str(error)
  problems = exchange(problem)
  for i, text in enumerate(problems):
    if text:
      raise UserError(text if jax.process_count() == 1 or len(set(problems)) == 1 else f"process {i}: {text}")
  return result


def check_alike(facts: dict[str, str]) -> None:
  """Raises UserError, on all processes, unless `facts` are the same on all of them."""
  if jax.process_count() == 1:
    return
  lines = [text.splitlines() for text in exchange("\n".join(f"{name}={value}" for name, value in facts.items()))]
  for i, other in enumerate(lines):
    differ = [f"{a} and {b}" for a, b in zip(lines[0], other, strict=False) if a != b]
    if differ or len(other) != len(lines[0]):
      raise UserError(f"process 0 and process {i} were not started alike: {'; '.join(differ) or 'their keys differ'}.")


def check_shared(folder: pathlib.Path) -> None:
  """Creates a folder on process 0 and raises UserError, on all processes, if another one does not see it."""
  if jax.process_count() == 1:
    return
  proof = folder / f".shared_{exchange(secrets.token_hex(8))[0]}"

  def prove():
    if not is_main():
      return
    try:
      folder.mkdir(parents=True, exist_ok=True)
      for old in folder.glob(".shared_*"):  # left by a run that was killed here
        old.unlink()
      proof.touch()
    except OSError as error:
      raise UserError(f"cannot write to {folder}: {error.strerror}.") from error

  together(prove)
  deadline = time.monotonic() + _SEEN_WITHIN
  while not proof.exists() and time.monotonic() < deadline:
    with contextlib.suppress(OSError):
      os.scandir(folder).close()  # makes NFS refresh its cache
    time.sleep(0.2)
  seen = exchange("seen" if proof.exists() else "")
  if is_main():
    proof.unlink()
  blind = [str(i) for i, text in enumerate(seen) if not text]
  if blind:
    raise UserError(
      f"process {', '.join(blind)} does not see what process 0 writes to {folder}: all processes need one shared "
      "--workdir, such as a network file system."
    )


def refusal(error: Exception, folder: pathlib.Path | None = None) -> str | None:
  """What the file system refused, as a line; None for any other error.

  A refusal comes as an OSError, or in the text of an exception of TensorStore or ArrayRecord. A missing file is a bug
  of this program, unless it is in `folder`: then somebody has removed it.
  """
  named = re.search(r'local file "([^"]+)"', str(error))
  full = next((text for text in map(os.strerror, _FULL) if text in str(error)), None)
  if not isinstance(error, OSError) and not named and not full:
    return None
  place = getattr(error, "filename", None) or (named and named[1]) or folder
  path = pathlib.Path(place).absolute() if place else None
  if not full:
    lost = (errno.ENOENT,) if folder and path and folder.absolute() in path.parents else ()
    why = next((text for text in map(os.strerror, (*_REFUSED, *lost)) if text in str(error)), None)
    return why and (f"{path}: {why}." if path else f"{why}.")
  then = "What was saved before is whole: make room, and go on by the same command."
  if path is None:  # No disk is known that could be the full one.
    return f"cannot write: {full}. {then}"
  free = shutil.disk_usage(next(x for x in (path, *path.parents) if x.exists())).free
  return f"cannot write to {path}: {full}, {free:,} bytes are free. {then}"


@contextlib.contextmanager
def ending_together(orderly: type[Exception] | tuple[()] = (), folder: pathlib.Path | None = None) -> Iterator[None]:
  """Ends this process at once on an exception, if there are other processes, so that they end as well.

  The others notice its closed connections; an orderly exit would wait for them. `orderly`: exceptions that all
  processes raise together, which pass through. What the file system refuses becomes a UserError; `folder` is the folder
  that is written to (see `refusal`).
  """
  try:
    yield
  except orderly:
    raise
  except Exception as error:
    refused = refusal(error, folder)
    if jax.process_count() == 1:
      if refused:
        raise UserError(refused) from error
      raise
    here = f"process {jax.process_index()}"
    if refused or isinstance(error, UserError):
      leave(f"{here}: {refused or error}")
    if any(name in str(error) for name in ("Gloo", "NCCL")):  # JaxRuntimeError or ValueError
      leave(
        f"{here} lost another process of this run ({str(error).splitlines()[0]}). The last checkpoint is whole: start "
        "all of them again with the same command to go on from it."
      )
    with contextlib.suppress(OSError):
      traceback.print_exc()
    leave(f"{here} failed, and so all of them end.")


def leave(text: str) -> None:
  """Ends this process at once with a line, whatever its threads are doing; other processes notice it."""
  try:
    progress.clear()
    print(f"{pathlib.Path(sys.argv[0]).name}: error: {' '.join(text.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
  finally:  # The log may be on the disk that is full.
    os._exit(1)
