"""The scripts in examples/ run, and what they train learns."""

import pathlib
import runpy

import numpy as np
import pytest

SCRIPTS = sorted((pathlib.Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_example_learns(path, capsys):
  steps = 100
  losses = runpy.run_path(str(path))["main"](steps)
  assert f"after {steps} steps" in capsys.readouterr().out
  # DINO's loss rises at first, while its centre finds its place.
  assert np.mean(losses[-3:]) < 0.75 * max(losses)


def test_there_is_one_for_each_loss_and_the_losses_need_no_flax():
  text = {path.stem: path.read_text() for path in SCRIPTS}
  for loss in ("nt_xent", "info_nce", "byol_loss", "mae_loss", "dino_loss"):
    users = [name for name, content in text.items() if f"{loss}(" in content]
    assert len(users) == 1 and "flax" not in text[users[0]], loss
