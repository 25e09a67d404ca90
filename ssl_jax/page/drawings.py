"""SVG for the page: curves with their reference lines, small curves, and a map of points.

Our own, since colours then come from the page's CSS, light and dark, and text stays text of a readable size on a phone;
matplotlib's SVG has neither. Ticks are matplotlib's.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from matplotlib.ticker import MaxNLocator

Points = Sequence[tuple[float, float]]
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 420, 250, 46, 122, 12, 30
_MOST, _TOLD = 200, 120  # points of a curve, and how many of them tell their numbers
_LINE = 16  # between two lines of text


class Curve(NamedTuple):
  """A curve: its label, its (x, y), and which of the runs it is of."""

  label: str
  points: Points
  run: int


class Level(NamedTuple):
  """A dashed horizontal line, which run it is of (None: of all), and whether it is drawn however far off it is."""

  label: str
  value: float
  run: int | None
  always: bool = False


def thinned(points: Points, most: int = _MOST) -> Points:
  """At most so many of the points, evenly spaced, the first and the last among them."""
  if len(points) <= most:
    return points
  return [points[i] for i in np.unique(np.round(np.linspace(0, len(points) - 1, most)).astype(int))]


def chart(curves: Sequence[Curve], levels: Sequence[Level], about: str) -> Markup:
  """Curves over the steps. A level so far off that it would flatten them is left out (`far_off`).

  `about` says what is drawn, for those who hear the page.
  """
  levels = [x for x in levels if not far_off(x, curves)]
  ys = [y for curve in curves for _, y in curve.points] + [x.value for x in levels]
  xs = [x for curve in curves for x, _ in curve.points]
  x_ticks, (x0, x1) = _ticks(min(xs, default=0), max(xs, default=1), 4, whole=True)
  y_ticks, (y0, y1) = _ticks(min(ys, default=0), max(ys, default=1), 5)
  right = _WIDTH - _RIGHT

  def place(x, y):
    return (
      round(_LEFT + (x - x0) / (x1 - x0) * (right - _LEFT), 1),
      round(_TOP + (y1 - y) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM), 1),
    )

  parts = []
  for y in y_ticks:
    _, at = place(x0, y)
    parts.append(Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, right, at, at))
    parts.append(Markup('<text x="{}" y="{}" text-anchor="end">{}</text>').format(_LEFT - 6, at + 4, f"{y:,.5g}"))
  for x in x_ticks:
    at, _ = place(x, y0)
    parts.append(Markup('<text x="{}" y="{}" text-anchor="middle">{}</text>').format(at, _HEIGHT - 8, f"{x:,.0f}"))
  labels = []
  for level in levels:
    _, at = place(x0, level.value)
    kind = "level" if level.run is None else f"level run{level.run}"
    parts.append(Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(kind, _LEFT, right, at, at))
    labels.append((at, "", f"{level.label} {level.value:.4g}"))
  for curve in curves:
    shown = thinned(curve.points)
    placed = [place(x, y) for x, y in shown]
    parts.append(_line(placed, f"curve run{curve.run}"))
    for (x, y), (left, top) in zip(shown, placed, strict=True) if len(shown) <= _TOLD else ():
      radius = 3 if len(shown) <= 30 else 1.5
      circle = '<circle class="dot run{}" cx="{}" cy="{}" r="{}"><title>step {}: {}</title></circle>'
      parts.append(Markup(circle).format(curve.run, left, top, radius, f"{x:,.0f}", f"{y:.5g}"))
    if placed:
      labels.append((placed[-1][1], f"label run{curve.run}", f"{curve.label} {shown[-1][1]:.4g}"))
  for at, kind, text in _apart(labels):
    parts.append(Markup('<text class="{}" x="{}" y="{}">{}</text>').format(kind, right + 7, round(at + 4, 1), text))
  return _svg(_WIDTH, _HEIGHT, "chart", about, parts)


def far_off(level: Level, curves: Sequence[Curve]) -> bool:
  """Whether a level is left out, as it lies so far below or above the curves that these would be flat beside it."""
  ys = [y for curve in curves for _, y in curve.points]
  if level.always or not ys:
    return False
  low, high = min(ys), max(ys)
  room = 3 * max(high - low, 0.05 * abs(high), 1e-9)
  return not low - room <= level.value <= high + room


def small_chart(curves: Sequence[Curve], about: str) -> Markup:
  """Curves without axes, the width of a few words."""
  width, height, margin = 160, 40, 4
  ys = [y for curve in curves for _, y in curve.points]
  xs = [x for curve in curves for x, _ in curve.points]
  if not ys:
    return Markup("")
  low, high, first, last = min(ys), max(ys), min(xs), max(xs)
  parts = []
  for curve in curves:
    placed = [
      (
        round(margin + (x - first) / max(last - first, 1e-9) * (width - 2 * margin), 1),
        round(height / 2 if high == low else margin + (high - y) / (high - low) * (height - 2 * margin), 1),
      )
      for x, y in thinned(curve.points, 80)
    ]
    parts.append(_line(placed, f"curve run{curve.run}"))
    if placed:
      x, y = placed[-1]
      parts.append(Markup('<circle class="dot run{}" cx="{}" cy="{}" r="3"/>').format(curve.run, x, y))
  return _svg(width, height, "small", about, parts)


def scatter(points: Sequence[Sequence[float]], groups: Sequence[int], names: Sequence[str], about: str) -> Markup:
  """A map of points, x and y in [0, 1].

  Args:
    points: (x, y) each.
    groups: which colour each has; -1: none.
    names: what each is.
    about: what is drawn, for those who hear the page.
  """
  side, margin = 400, 8
  parts = []
  for i, ((x, y), group, name) in enumerate(zip(points, groups, names, strict=True)):
    left, top = (round(margin + z * (side - 2 * margin), 1) for z in (x, 1 - y))
    circle = '<circle class="point c{}" cx="{}" cy="{}" r="4" data-i="{}"><title>{}</title></circle>'
    parts.append(Markup(circle).format("n" if group < 0 else group, left, top, i, name))
  return _svg(side, side, "map", about, parts)


def _svg(width, height, kind, about, parts):
  head = Markup('<svg class="{}" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(kind, width, height, about)
  return head + Markup("").join(parts) + Markup("</svg>")


def _line(placed, kind):
  return Markup('<polyline class="{}" points="{}"/>').format(kind, " ".join(f"{x:g},{y:g}" for x, y in placed))


def _ticks(low, high, count, whole=False):
  """(ticks, the range they lie in), the range a little larger than the values."""
  if low == high:
    low, high = low - max(abs(low) * 0.1, 0.5), high + max(abs(high) * 0.1, 0.5)
    low = max(low, 0) if whole else low
  margin = 0 if whole else 0.04 * (high - low)
  low, high = low - margin, high + margin
  ticks = MaxNLocator(count, integer=whole, min_n_ticks=2).tick_values(low, high)
  return [float(x) for x in ticks if low <= x <= high], (low, high)


def _apart(labels):
  """The labels (y, kind, text), each moved so far that none covers another."""
  labels = sorted(labels)
  placed: list[float] = []
  for at, *_ in labels:
    placed.append(max(at, placed[-1] + _LINE) if placed else at)
  limit = _HEIGHT - _BOTTOM + 6
  for i in range(len(placed) - 1, -1, -1):
    placed[i] = min(placed[i], limit)
    limit = placed[i] - _LINE
  return [(y, kind, text) for y, (_, kind, text) in zip(placed, labels, strict=True)]
