"""The lines that a run prints, from made-up numbers."""

import types

import numpy as np
import pytest

from ssl_jax.run import messages

ROW = dict(step=40, epoch=1.25, loss=2.5, learning_rate=0.003, images_per_second=1600.0)


@pytest.mark.parametrize(
  "share, mfu, told",
  [
    (0.05, None, "1,600 images/s  00:08 left"),
    (0.06, None, "1,600 images/s, 6 % of the time for input  00:08 left"),
    (0.0, 0.414, "1,600 images/s, MFU 41 %  00:08 left"),
    (0.5, 0.414, "1,600 images/s, MFU 41 %, 50 % of the time for input  00:08 left"),
  ],
)
def test_a_steps_line_tells_what_binds_it_and_how_long_is_left(share, mfu, told):
  config = types.SimpleNamespace(batch_size=128)
  run = types.SimpleNamespace(config=config, steps=200, last_step=140, chance=5.541)
  row = ROW | dict(input_share=share) | ({} if mfu is None else {"mfu": mfu})
  want = f"step 40/200  epoch 1.25  loss 2.5000 (chance 5.54)  lr 3.00e-03  {told}"
  assert messages.step_line(run, row) == want


def test_the_summary_sets_the_last_figure_beside_the_first_and_the_pixels():
  config = types.SimpleNamespace(
    knn=types.SimpleNamespace(k=20, temperature=0.07), data=types.SimpleNamespace(test_split="test")
  )
  rows = [
    {"loss": 1.0},
    {"knn_top1": 60.0, "pixels_top1": 70.0, "guessing_top1": 10.0},
    {"knn_top1": 65.0},
    {"loss": 0.5},
    {"knn_top1": 75.5, "knn_balanced": 74.0},
  ]
  assert messages.summary(config, rows) == [
    "k-NN top-1 (cosine, k=20, T=0.07) on test:",
    "  encoder                75.50 %",
    "  encoder, balanced      74.00 %",
    "  encoder, untrained     60.00 %",
    "  guessing               10.00 %",
    "  raw pixels             70.00 %",
  ]
  assert messages.summary(config, rows[:1]) == []
  config.init_from = "weights.pth"
  assert "  encoder, as loaded     60.00 %" in messages.summary(config, rows)


def test_without_labels_the_summary_sets_the_features_beside_their_first_selves():
  rows = [{"encoder_rankme": 2.0, "step": 0}, {"loss": 1.0}, {"encoder_rankme": 3.0, "encoder_effective_rank": 1.23456}]
  lines = messages.summary(types.SimpleNamespace(), rows)
  assert (
    lines[1:] == ["  untrained: rankme 2", "  trained: rankme 3  effective rank 1.235"] and "no accuracy" in lines[0]
  )
  assert messages.summary(types.SimpleNamespace(init_from="weights.pth"), rows)[1] == "  as loaded: rankme 2"


def test_what_is_not_finite_is_named_with_its_array():
  line = messages.nonfinite(7, {"loss": np.nan, "grad_norm": 1.0}, {"params": {"w": np.array([1.0, np.inf])}})
  assert line.startswith("step 7 is not finite (loss): the first array that is not finite is ") and "w" in line
  line = messages.nonfinite(7, {"loss": 1.0, "grad_norm": np.inf}, {"params": {"w": np.ones(2)}})
  assert line.startswith("step 7 is not finite (grad_norm): the state is finite, so the gradient is not.")
  line = messages.nonfinite(7, {"grad_norm": 1.0, "update_norm": np.nan}, {"params": {"w": np.ones(2)}})
  assert "(update_norm): the state is finite, so the update that the optimizer made of the gradient is not." in line
