"""What a traced or compiled program is made of and what it costs, without a line of the compiler's own text."""

import time

import jax
from jax.extend.core import jaxprs_in_params


def equations(jaxpr):
  """All equations of a traced program (`jax.make_jaxpr(f)(*args).jaxpr`), those of inner programs after their own."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in jaxprs_in_params(equation.params):
      yield from equations(inner)


def temporaries(function, *shapes):
  """Bytes that the compiled function takes besides its arguments and results."""
  return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def cpu_seconds(calls, repeats):
  """The least CPU time of each of `calls`, (function, arguments), which take turns: other work hits all alike."""
  calls = [(jax.jit(function), args) for function, args in calls]
  times = [[] for _ in calls]
  for _ in range(1 + repeats):  # the first call compiles
    for (function, args), taken in zip(calls, times, strict=True):
      start = time.process_time()
      jax.block_until_ready(function(*args))
      taken.append(time.process_time() - start)
  return [min(taken[1:]) for taken in times]
