"""A profile of some steps, for TensorBoard and Perfetto."""

import pathlib
from typing import Any

import jax

from ssl_jax.run import cluster
from ssl_jax.run.cli import say


class Profile:
  """Records the steps from the first to the last of `steps`, on the main process, into a folder of TensorBoard's.

  What is recorded slows these steps down a little and changes no number. A run that goes on behind the first of them,
  or ends before it, records nothing and says so; one that ends before the last has what came until then.
  """

  def __init__(self, folder: pathlib.Path, steps: tuple[int, int] | None, start: int, last_step: int):
    self.folder, self.steps = folder, steps if steps and cluster.is_main() else None
    self.recording = False
    if steps and not start < steps[0] <= last_step:
      say(
        f"no profile will be written: profile_steps={steps[0]},{steps[1]} begins at step {steps[0]}, and "
        f"training goes from step {start + 1} to {last_step}"
      )

  def before(self, step: int, train: Any) -> None:
    """Begins, if this is the first of the steps; `train` is what it waits for, the steps before."""
    if self.steps and step == self.steps[0]:
      jax.block_until_ready(train)
      jax.profiler.start_trace(str(self.folder), create_perfetto_trace=True)
      self.recording = True

  def after(self, step: int, train: Any) -> bool:
    """Ends, if this is the last of the steps, and returns whether it did: it takes seconds."""
    if not self.steps or not self.recording or step < self.steps[1]:
      return False
    jax.block_until_ready(train)
    self.close()
    say(f"wrote a profile of steps {self.steps[0]} to {step} into {self.folder / 'plugins' / 'profile'}")
    return True

  def close(self) -> None:
    if self.recording:
      jax.profiler.stop_trace()
    self.recording = False
