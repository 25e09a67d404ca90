"""What is in the program of every method's step: no way back to the host, no gradient of a slow copy, wide state."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest
from programs import equations
from test_all_methods import SLOW, few_images, slow, small  # noqa: F401

from ssl_jax import build, flops, parallel
from ssl_jax.errors import UserError
from ssl_jax.methods.base import AXIS, Monitored, check_update

# How many images of each example the slow copy encodes.
SLOW_COPIES = {"moco_quickstart": 1, "byol_quickstart": 2, "moco_imagenet:v3": 2, "dino_quickstart": 2}


@pytest.mark.parametrize("name", ["dino_quickstart", "moco_quickstart", *slow("quickstart", "mae_quickstart"), *SLOW])
def test_a_narrow_step_keeps_its_state_wide_and_never_asks_the_host(name, mesh, monkeypatch):
  config = small(name)
  config.dtype = "bfloat16"
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(2))
  run = build.run(config)
  batch = {"image": run.train_set.images[:8]}
  program = run.train_step.trace(run.state, parallel.put_batch(run.mesh, batch))
  inside = list(equations(program.jaxpr.jaxpr))
  assert not [e for e in inside if re.search("callback|debug|feed", e.primitive.name)]
  products = [e for e in inside if e.primitive.name in ("dot_general", "conv_general_dilated")]
  assert any(e.outvars[0].aval.dtype == jnp.bfloat16 for e in products)
  state, row = program.out_info
  types = jax.tree.map(lambda x: x.dtype, state)
  assert types == jax.tree.map(lambda x: x.dtype, run.state)
  assert set(jax.tree.leaves(types)) <= {jnp.dtype("float32"), jnp.dtype("int32")}
  assert {x.dtype for x in row.values()} == {jnp.dtype("float32")}


@pytest.mark.parametrize("name", ["dino_quickstart", "moco_quickstart", *slow("quickstart", "mae_quickstart"), *SLOW])
def test_a_step_costs_three_passes_of_what_is_trained_and_one_of_the_slow_copy(name):
  config = small(name)
  method, encoder = build.method_of(config, 8, 4)
  sizes = [view["size"] for view in config.views]
  views = tuple(jnp.zeros((sizes.count(size), 8, size, size, 1)) for size in dict.fromkeys(sizes))
  keys = jax.random.split(jax.random.key(0), 8)
  params, state = jax.eval_shape(method.init, jax.random.key(0), views)

  def count(function, *args):
    return flops.count(jax.make_jaxpr(function, axis_env=[(AXIS, 1)])(*args))

  forward = count(method.loss, params, state, views, keys, 0)
  step = count(jax.value_and_grad(method.loss, has_aux=True), params, state, views, keys, 0)
  encode = functools.partial(encoder.apply, train=True, mutable=["batch_stats"])
  variables = {"params": params["encoder"], "batch_stats": getattr(state, "batch_stats", {})}
  if "encoder" in variables["batch_stats"]:
    variables["batch_stats"] = variables["batch_stats"]["encoder"]
  copies = SLOW_COPIES.get(name, 0) * count(encode, variables, views[0][0])
  assert 0 < step <= 3 * forward - 2 * copies


def without_loss(value, aux):
  return value, aux._replace(metrics={"paper": aux.metrics["loss"]})


def with_a_vector(value, aux):
  return value, aux._replace(metrics=aux.metrics | {"per_view": jnp.zeros(2)})


def with_views_first(value, aux):
  return value, aux._replace(monitored=Monitored(jnp.swapaxes(aux.monitored.embedding, 0, 1)))


@pytest.mark.parametrize(
  "change, text",
  [
    (lambda value, aux: (value, aux.metrics), r"must return \(scalar, Aux\), got dict"),
    (without_loss, '"loss" among them'),
    (with_a_vector, r"must be scalars .*'per_view': \(2,\)"),
    (with_views_first, r"must be \[b, v, d\] with b = 4 examples, got \(2, 4, 128\)"),
  ],
)
def test_a_loss_that_breaks_the_contract_is_told_in_its_words(change, text, mesh, monkeypatch):
  monkeypatch.setattr(parallel, "make_mesh", lambda: mesh(2))
  method_of = build.method_of

  def broken(*args):
    method, encoder = method_of(*args)
    return method._replace(loss=lambda *given: change(*method.loss(*given))), encoder

  monkeypatch.setattr(build, "method_of", broken)
  with pytest.raises(TypeError, match=text) as error:
    build.run(small("quickstart"))
  assert not isinstance(error.value, UserError)


def test_an_update_that_forgets_a_part_of_the_state_is_told():
  state = {"queue": jnp.zeros((2, 3)), "pointer": jnp.int32(0)}
  check_update(state, state)
  for wrong in (None, {"queue": state["queue"]}, state | {"pointer": jnp.float32(0)}):
    with pytest.raises(TypeError, match="update must return a state like the one it was given"):
      check_update(wrong, state)
