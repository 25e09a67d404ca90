"""The live line of a run in a terminal, a notebook and a file."""

import io
import types

import pytest

from ssl_jax.run import log, messages, progress


class Screen(io.StringIO):
  """What somebody sees who looks at a stream that takes carriage returns."""

  tty = True

  def isatty(self):
    return self.tty

  def lines(self):
    shown = []
    for line in self.getvalue().split("\n"):
      row = ""
      for part in line.split("\r"):
        row = part + row[len(part) :]
      shown.append(row.rstrip())
    return shown


class Notebook(Screen):
  tty = False


Notebook.__module__ = "ipykernel.iostream"


@pytest.fixture
def watched(monkeypatch):
  """`watched(stream)`: prints to it, and `clock[0]` is the time."""
  clock = [1000.0]
  monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
  monkeypatch.setattr(progress._Shown, "length", 0)
  monkeypatch.setattr(progress._Shown, "time", 1000.0)
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "40")

  def watch(stream):
    monkeypatch.setattr("sys.stdout", stream)
    return stream, clock

  return watch


@pytest.mark.parametrize("stream, every", [(Screen, 0.2), (Notebook, 2.0)])
def test_one_line_lives_below_those_that_stay(watched, stream, every):
  screen, clock = watched(stream())
  drawn = []
  for i in range(100):  # with lines that get shorter, and at first would wrap
    clock[0] += every / 10
    progress.live(lambda i=i: drawn.append(i) or f"step {i} " + "." * (120 - i))
  assert 9 <= len(drawn) <= 10  # and no text was made for nothing
  assert screen.lines() == [f"step {drawn[-1]} {'.' * (120 - drawn[-1])}"[:39]]
  assert max(map(len, screen.getvalue().split("\r"))) == 39  # a longer one would wrap, and stay
  progress.keep("a row")
  clock[0] += every
  progress.live(lambda: "short")
  assert screen.lines() == ["a row", "short"]
  with progress.cleared():
    pass
  progress.keep("the end")
  assert screen.lines() == ["a row", "the end", ""]


@pytest.mark.parametrize("dumb", [False, True])
def test_a_file_gets_no_carriage_return_and_a_line_after_a_silent_minute(watched, monkeypatch, dumb):
  screen, clock = watched(Screen())
  screen.tty = dumb
  if dumb:
    monkeypatch.setenv("TERM", "dumb")
  for i in range(1, 151):
    clock[0] += 1
    progress.live(lambda i=i: f"step {i}")
    if i == 30:
      progress.keep("a row")
  progress.clear()
  assert screen.getvalue() == "a row\nstep 90\nstep 150\n"


def test_the_live_line_tells_the_rate_once_it_is_measured(monkeypatch):
  now = [0.0]
  monkeypatch.setattr(log, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
  clock = log.Clock(0, 64)
  now[0] += 60
  clock.images_per_second(1)  # with the compilation
  now[0] += 0.9
  run = types.SimpleNamespace(steps=200, last_step=100, config=types.SimpleNamespace(batch_size=64))
  assert messages.live_line(run, 3, clock.rate_now(3)) == "step 3/200  3 %"
  now[0] += 0.7
  assert messages.live_line(run, 6, clock.rate_now(6)) == "step 6/200  6 %  200 images/s  00:30 left"
  assert clock.rate == pytest.approx(64 / 60)  # it was no question
  clock.restart(6)
  assert clock.rate_now(6) == pytest.approx(200)
  now[0] += 0.5  # less than a second, and a row
  assert clock.images_per_second(8) == clock.rate_now(9) == pytest.approx(256)
