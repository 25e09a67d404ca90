"""95 % intervals of accuracies over the test images: what another draw of as many test images could have given.

They hold neither what another seed of the training nor what another draw of the labels would change.
"""

import numpy as np
from numpy.typing import ArrayLike

_Z = 1.959964


def wilson(percent: float, n: int) -> tuple[float, float]:
  """The interval of a share of n independent images, in percent (Wilson, 1927)."""
  p = percent / 100
  centre = (p + _Z * _Z / (2 * n)) / (1 + _Z * _Z / n)
  half = _Z / (1 + _Z * _Z / n) * (p * (1 - p) / n + (_Z / (2 * n)) ** 2) ** 0.5
  return _bounded(percent, 100 * (centre - half), 100 * (centre + half))


def mean_of_shares(percents: ArrayLike, counts: ArrayLike) -> tuple[float, float]:
  r"""The interval of the mean of K shares, each of its own independent images: of balanced accuracy.

  From each share's Wilson interval [l_k, u_k] (Zou and Donner, 2008, doi:10.1002/sim.3095):

  .. math:: \bar p - \frac{1}{K} \sqrt{\sum_k (p_k - l_k)^2}, \quad \bar p + \frac{1}{K} \sqrt{\sum_k (u_k - p_k)^2}

  Args:
    percents: [K], in [0, 100].
    counts: [K], the images of each.
  """
  shares = np.asarray(percents, float)
  low, high = np.transpose([wilson(p, n) for p, n in zip(shares, np.asarray(counts).tolist(), strict=True)])
  below, above = (float(np.sqrt(np.sum(x**2))) / len(shares) for x in (shares - low, high - shares))
  mean = float(shares.mean())
  return _bounded(mean, mean - below, mean + above)


def _bounded(percent, low, high):
  """The interval within 0 and 100 % and around its own share: rounding leaves both by some 1e-14."""
  return max(0.0, min(low, percent)), min(100.0, max(high, percent))
