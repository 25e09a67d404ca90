"""The report on a folder before a run."""

import numpy as np
import PIL.Image
import pytest
from photographs import photograph

from ssl_jax.commands import check


def test_check_counts_names_and_measures(tmp_path, capsys):
  PIL.Image.fromarray(np.full((4, 6, 3), (0, 51, 255), np.uint8)).save(tmp_path / "a.png")
  PIL.Image.fromarray(np.full((4, 6, 3), (255, 51, 255), np.uint8)).save(tmp_path / "b.png")
  PIL.Image.fromarray(np.full((4, 6, 3), 7, np.uint8)).save(grey := tmp_path / "grey.png")
  assert check.main([str(tmp_path), "--channels=1"]) == 0
  lost = "data.channels=1: 2 of 3 images looked at have colours, which become grey\n"
  assert lost in capsys.readouterr().out
  grey.unlink()
  report = tmp_path / "report.txt"
  assert check.main([str(tmp_path), "--strict"]) == 0
  out = capsys.readouterr().out
  assert "2 images, 0 skipped\n" in out and "1 size, width x height: 6x4 (2)" in out
  assert "grey" not in out and "left out" not in out and "smallest" not in out
  assert "mean (0.5000, 0.2000, 1.0000), std (0.5000, 0.0000, 0.0000)" in out
  for name in ("empty.jpg", "none.gif"):
    (tmp_path / name).touch()
  assert check.main([str(tmp_path), f"--report={report}"]) == 0
  assert check.main([str(tmp_path), "--strict"]) == 1
  assert "4 images, 2 skipped:\n  2 empty file: empty.jpg, none.gif" in capsys.readouterr().out
  assert report.read_text() == "empty.jpg\tempty file\nnone.gif\tempty file\n"
  for wrong in (["--threads=0"], ["--channels=x"], ["--report=/proc/no/report.txt"]):
    with pytest.raises(SystemExit):
      check.main([str(tmp_path), *wrong])
    told = capsys.readouterr().err
    assert told.startswith("python -m ssl_jax check: error: ") and told.count("\n") == 1, told
  with pytest.raises(SystemExit):
    check.main([str(tmp_path / "nothing")])
  (tmp_path / "empty").mkdir()
  with pytest.raises(SystemExit):
    check.main([str(tmp_path / "empty")])
  assert "holds no images" in capsys.readouterr().err


def test_check_tells_the_range_of_sizes_what_is_left_out_and_where_all_names_are(tmp_path, capsys):
  for i, size in enumerate([(30, 20), (7, 9), (50, 40)]):
    photograph(tmp_path / f"{i}.png", i, size)
  for name in ("IMG_1.HEIC", "b/IMG_2.heic", "IMG_3", ".DS_Store", *(f"{i}.jpg" for i in range(3))):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
  assert check.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "the smallest is 7x9, the largest 50x40\n" in out
  assert "left out by their names: .heic (2), no ending (1)\n" in out
  assert "--report" not in out  # All three names are there.
  (tmp_path / "3.jpg").touch()
  assert check.main([str(tmp_path)]) == 0
  out = capsys.readouterr().out
  assert "4 empty file: 0.jpg, 1.jpg, 2.jpg, ...\n  --report=FILE writes all names and reasons\n" in out
