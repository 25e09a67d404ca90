"""A full disk leaves what was there before, and nothing else; and it is named."""

import contextlib
import resource

import numpy as np
import pytest

import eval_linear
from ssl_jax.commands import check, evaluate, neighbours
from ssl_jax.evaluation import embeddings
from ssl_jax.evaluation.scores import Scored
from ssl_jax.run import log, plots, whole


@contextlib.contextmanager
def full_disk():
  """Files take ten bytes."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
  "knn.json": lambda path: evaluate.hand_over({"top1": 50.0, "balanced": 50.0}, path.parent, "knn"),
  "linear.csv": lambda path: eval_linear.tell_classes([Scored(np.arange(2), np.ones(2))], np.arange(2), 2, (), path),
  "table.csv": lambda path: neighbours.write_table(path, ("query", "neighbour"), [("a", "b")] * 9000),
  "grid.png": lambda path: plots.draw_grid(path, [("image", [np.zeros((4, 4, 3))])], "title"),
  "curves.png": lambda path: plots.draw_curves(path.parent, None, "title"),
  "metrics.jsonl": lambda path: log.Writer(path.parent, 1),
  "bad.txt": lambda path: check.main([str(path.parent / "images"), f"--report={path}"]),
  "x.npz": lambda path: embeddings._write_whole(path, lambda file: np.savez(file, np.zeros(9))),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_is_handed_over_is_whole_or_as_it_was(tmp_path, name, monkeypatch, capsys):
  monkeypatch.setattr(evaluate, "place", lambda workdir, name, suffix: workdir / f"{name}.{suffix}")
  (tmp_path / "images").mkdir()
  for i in range(2):
    (tmp_path / "images" / f"{i}.png").write_bytes(b"damaged")
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
  path = tmp_path / name
  if not path.exists():
    path.write_text("before")
  before, there = path.read_bytes(), sorted(tmp_path.iterdir())
  told = ""
  with full_disk():
    try:
      WRITERS[name](path)
    except OSError as error:
      told = str(error.filename)
  told += "".join(capsys.readouterr())
  assert path.read_bytes() == before and sorted(tmp_path.iterdir()) == there
  assert str(path) in told and f"{path}.tmp" not in told


def test_an_exception_of_any_kind_leaves_the_old_file(tmp_path):
  whole.text(tmp_path / "x", "old")
  with pytest.raises(KeyboardInterrupt), whole.file(tmp_path / "x") as scratch:
    scratch.write_text("new")
    raise KeyboardInterrupt
  assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
