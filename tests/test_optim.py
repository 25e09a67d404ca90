"""Optimizers and schedules against recursions written out in NumPy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from ssl_jax import methods, optim
from ssl_jax.errors import UserError
from ssl_jax.methods.simclr import simclr
from ssl_jax.models import resnet, vit
from ssl_jax.models.heads import SimCLRProjector

NO_DECAY = (".*/bias", ".*/scale")
STEPS = 10


def schedule(step):
  """A warm-up over three steps, then a fall, so that the learning rate changes at every step."""
  return jnp.where(step < 3, 0.1 * (step + 1), 0.3 / (step + 1))


def draw_problem(seed=0):
  """Parameters and the gradients of ten steps, in float64."""
  rng = np.random.default_rng(seed)
  params = {"w": rng.normal(size=(6, 4)), "b": rng.normal(size=4)}
  return params, [{"w": rng.normal(size=(6, 4)), "b": rng.normal(size=4)} for _ in range(STEPS)]


def run(optimizer, params, gradients):
  """The parameters after each step."""
  params = jax.tree.map(jnp.asarray, params)
  state = optimizer.init(params)

  @jax.jit
  def step(params, state, gradient):
    updates, state = optimizer.update(gradient, state, params)
    return optax.apply_updates(params, updates), state

  history = []
  for gradient in gradients:
    params, state = step(params, state, gradient)
    history.append(jax.tree.map(np.asarray, params))
  return history


def without_bias(params):
  return optim.decayed(params, ("b",))


def assert_history(got, want):
  assert len(got) == len(want)
  for step, (a, b) in enumerate(zip(got, want, strict=True)):
    for name in b:
      # float64: another order of summation in the norms
      np.testing.assert_allclose(a[name], b[name], rtol=1e-12, atol=1e-13, err_msg=f"{name} after step {step}")


@pytest.mark.parametrize("lr_inside", [True, False])
def test_lars_gives_the_official_numbers(x64, golden, lr_inside):
  g = golden("lars")  # at a constant rate both forms are one
  settings = {name: float(g[name]) for name in ("weight_decay", "momentum", "trust_coefficient")}
  optimizer = optim.lars(optax.constant_schedule(float(g["lr"])), without_bias, lr_inside=lr_inside, **settings)
  gradients = [{"w": g[f"gw{i}"], "b": g[f"gb{i}"]} for i in range(5)]
  got = run(optimizer, {"w": g["w0"], "b": g["b0"]}, gradients)
  assert_history(got, [{"w": g[f"w{i}"], "b": g[f"b{i}"]} for i in range(1, 6)])


def lars_in_numpy(params, gradients, lr_inside, weight_decay, momentum, trust):
  """`w` decays and adapts, `b` does neither. Written from the two official update rules."""
  p = {name: value.copy() for name, value in params.items()}
  v = {name: np.zeros_like(value) for name, value in params.items()}
  history = []
  for step, gradient in enumerate(gradients):
    lr = float(schedule(step))
    for name in p:
      g, ratio = gradient[name], 1.0
      if name == "w":
        g = g + weight_decay * p[name]
        ratio = trust * np.linalg.norm(p[name]) / np.linalg.norm(g)
      if lr_inside:
        v[name] = momentum * v[name] + lr * ratio * g
        p[name] = p[name] - v[name]
      else:
        v[name] = momentum * v[name] + ratio * g
        p[name] = p[name] - lr * v[name]
    history.append(dict(p))
  return history


@pytest.mark.parametrize("lr_inside", [True, False])
def test_lars_is_its_formula_while_the_learning_rate_changes(x64, lr_inside):
  params, gradients = draw_problem()
  optimizer = optim.lars(
    schedule, without_bias, weight_decay=0.02, momentum=0.8, trust_coefficient=0.01, lr_inside=lr_inside
  )
  want = lars_in_numpy(params, gradients, lr_inside, 0.02, 0.8, 0.01)
  assert_history(run(optimizer, params, gradients), want)
  other = lars_in_numpy(params, gradients, not lr_inside, 0.02, 0.8, 0.01)
  assert np.abs(want[-1]["b"] - other[-1]["b"]).max() > 0.1  # the two forms can be told apart here


@pytest.mark.parametrize("which", ["gradient", "parameter", "both"])
def test_lars_has_ratio_one_where_a_norm_is_zero(x64, which):
  value, gradient = np.full((2, 2), 3.0), np.full((2, 2), 2.0)
  value = np.zeros((2, 2)) if which in ("parameter", "both") else value
  gradient = np.zeros((2, 2)) if which in ("gradient", "both") else gradient
  optimizer = optim.lars(optax.constant_schedule(0.5), {"w": True})
  got = run(optimizer, {"w": value}, 2 * [{"w": gradient}])
  np.testing.assert_allclose(got[0]["w"], value - 0.5 * gradient, rtol=1e-15)
  assert np.isfinite(got[1]["w"]).all()


def test_lars_decays_a_leaf_without_a_gradient_at_its_own_trust_ratio(x64):
  optimizer = optim.lars(optax.constant_schedule(0.5), {"w": True}, weight_decay=0.1)
  got = run(optimizer, {"w": np.full((2, 2), 3.0)}, [{"w": np.zeros((2, 2))}])
  np.testing.assert_allclose(got[0]["w"], 3 - 0.5 * (0.001 * 6 / 0.6) * 0.3, rtol=1e-15)  # |p| = 6, |g'| = 0.6


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_is_pytorchs(x64, nesterov):
  params, gradients = draw_problem()
  optimizer = optim.sgd(schedule, without_bias, weight_decay=0.02, momentum=0.8, nesterov=nesterov)
  p, v, want = dict(params), dict.fromkeys(params, 0.0), []
  for step, gradient in enumerate(gradients):
    for name in p:
      g = gradient[name] + (0.02 * p[name] if name == "w" else 0)
      v[name] = 0.8 * v[name] + g
      p[name] = p[name] - float(schedule(step)) * (g + 0.8 * v[name] if nesterov else v[name])
    want.append(dict(p))
  assert_history(run(optimizer, params, gradients), want)


def test_adamw_is_pytorchs(x64):
  params, gradients = draw_problem()
  optimizer = optax.adamw(schedule, mask=without_bias, weight_decay=0.05, b1=0.8, b2=0.95, eps=1e-6)
  p, m, v, want = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0), []
  for step, gradient in enumerate(gradients):
    lr, t = float(schedule(step)), step + 1
    for name, g in gradient.items():
      p[name] = p[name] * (1 - lr * 0.05 * (name == "w"))
      m[name] = 0.8 * m[name] + 0.2 * g
      v[name] = 0.95 * v[name] + 0.05 * g * g
      p[name] = p[name] - lr * (m[name] / (1 - 0.8**t)) / (np.sqrt(v[name] / (1 - 0.95**t)) + 1e-6)
    want.append(dict(p))
  assert_history(run(optimizer, params, gradients), want)


def test_simclr_decays_and_adapts_kernels_and_nothing_else():
  encoder = resnet.resnet18(project_first=True)
  method = simclr(encoder, SimCLRProjector())
  params, _ = jax.eval_shape(lambda: method.init(jax.random.key(0), (jnp.zeros((2, 1, 32, 32, 3)),)))
  kernels, norms = ["encoder/conv1"], ["encoder/bn1"]
  for layer in range(1, 5):
    for block in range(2):
      base = f"encoder/layer{layer}_{block}"
      kernels += [f"{base}/conv1", f"{base}/conv2"]
      norms += [f"{base}/bn1", f"{base}/bn2"]
      if block == 0:
        kernels.append(f"{base}/downsample_conv")
        norms.append(f"{base}/downsample_bn")
  decaying = {f"{name}/kernel" for name in [*kernels, "projector/linear1", "projector/linear2"]}
  others = {f"{name}/{leaf}" for name in [*norms, "projector/bn1"] for leaf in ("scale", "bias")}
  others.add("projector/bn2/scale")

  marks = jax.tree_util.tree_leaves_with_path(optim.decayed(params, NO_DECAY))
  assert {optim.path_name(path) for path, mark in marks if mark} == decaying
  assert {optim.path_name(path) for path, mark in marks if not mark} == others


def test_a_no_decay_pattern_matches_whole_paths_only():
  params = {"bias_free": {"kernel": 0}, "a": {"bias": 0}}
  assert optim.decayed(params, (".*/bias",)) == {"bias_free": {"kernel": True}, "a": {"bias": False}}
  assert optim.decayed(params, ()) == {"bias_free": {"kernel": True}, "a": {"bias": True}}


def test_a_no_decay_pattern_that_matches_nothing_is_refused():
  params = {"a": {"kernel": 0, "bias": 0}}
  optim.check_rules(optim.ParameterRules(no_decay=(".*/bias",)), params)
  with pytest.raises(UserError, match=r"no_decay: '\.\*/gamma' matches no parameter.*a/kernel"):
    optim.check_rules(optim.ParameterRules(no_decay=(".*/bias", ".*/gamma")), params)


@pytest.mark.parametrize(("warmup", "steps", "end"), [(0, 7, 0.0), (1, 2, 0.1), (5, 20, 0.0), (10, 100, 1e-3)])
def test_warmup_cosine_is_its_closed_form_at_every_step(warmup, steps, end):
  peak = 4.8
  got = jax.jit(jax.vmap(optim.warmup_cosine(peak, warmup, steps, end)))(jnp.arange(steps + 3))
  want = [
    peak * t / warmup
    if t < warmup
    else end + (peak - end) * (1 + math.cos(math.pi * min(1, (t - warmup) / (steps - warmup)))) / 2
    for t in range(steps + 3)
  ]
  np.testing.assert_allclose(got, want, rtol=0, atol=1e-6 * peak)  # float32


def test_a_peak_of_zero_is_zero_everywhere():
  assert float(optim.warmup_cosine(0.0, 0, 10)(3)) == 0.0
  assert float(optim.warmup_cosine(0.0, 2, 10)(3)) == 0.0


@pytest.mark.parametrize(("warmup", "steps"), [(10, 5), (5, 5)])
def test_a_warmup_that_is_not_shorter_than_the_run_is_refused(warmup, steps):
  with pytest.raises(UserError, match=f"{warmup} steps long and the run {steps}"):
    optim.warmup_cosine(1.0, warmup, steps)


@pytest.mark.parametrize(
  ("base", "batch_size", "scaling", "want"),
  [(0.3, 4096, "linear", 4.8), (0.075, 4096, "sqrt", 4.8), (1.5e-4, 4096, "linear", 2.4e-3), (0.3, 4096, "none", 0.3)],
)
def test_learning_rates_scale_as_the_papers_do(base, batch_size, scaling, want):
  assert optim.scaled_learning_rate(base, batch_size, scaling) == pytest.approx(want, rel=1e-12)


def test_an_unknown_scaling_is_refused():
  with pytest.raises(UserError, match="linear, sqrt, none, got 'log'"):
    optim.scaled_learning_rate(0.1, 256, "log")


def make(**optimizer):
  return optim.make(optimizer, optim.ParameterRules(no_decay=("b",)), schedule, STEPS, 1)


@pytest.mark.parametrize("name", sorted(optim.OPTIMIZERS))
def test_a_config_names_the_optimizer_and_what_does_not_decay(x64, name):
  params, gradients = draw_problem()
  got = run(make(name=name, weight_decay=0.02), params, gradients)
  want = run(optim.OPTIMIZERS[name](schedule, mask=without_bias, weight_decay=0.02), params, gradients)
  assert_history(got, want)
  without = run(make(name=name), params, gradients)
  plain = run(optim.OPTIMIZERS[name](schedule, mask=without_bias, weight_decay=0.0), params, gradients)
  assert_history(without, plain)
  np.testing.assert_array_equal(got[-1]["b"], without[-1]["b"])
  assert np.abs(got[-1]["w"] - without[-1]["w"]).max() > 1e-6


def draw_network(seed=0):
  """Parameters named as those of a ViT with two blocks and a head, and the gradients of ten steps, in float64."""
  rng = np.random.default_rng(seed)
  encoder = ("cls_token", "patch_embed/proj/kernel", "blocks_0/mlp/fc1/bias", "blocks_1/ls1/gamma", "norm/scale")
  names = [f"encoder/{name}" for name in encoder] + ["head/last_layer/weight_v", "decoder/blocks_0/cls_token"]
  draw = lambda: unflatten_dict({tuple(name.split("/")): rng.normal(size=3) for name in names})  # noqa: E731
  return draw(), [draw() for _ in range(STEPS)]


def test_a_group_has_a_learning_rate_of_its_own_for_its_decay_too(x64):
  params, gradients = draw_network()
  rates = (("encoder/patch_embed/.*", 0.2), ("head/.*", 10.0), (".*", 1.0))
  settings, rules = dict(name="adamw", weight_decay=0.3), optim.ParameterRules()
  got = run(optim.make(dict(layer_decay=0.9, rates=rates, **settings), rules, schedule, STEPS, 1), params, gradients)
  factors = {  # two blocks are layers 1 and 2 of 3
    "encoder/cls_token": 0.9**3,
    "encoder/patch_embed/proj/kernel": 0.9**3 * 0.2,
    "encoder/blocks_0/mlp/fc1/bias": 0.9**2,
    "encoder/blocks_1/ls1/gamma": 0.9,
    "encoder/norm/scale": 1.0,
    "head/last_layer/weight_v": 10.0,
    "decoder/blocks_0/cls_token": 1.0,  # only the encoder has layers
  }
  got = [flatten_dict(step, sep="/") for step in got]
  for name, factor in factors.items():
    pick = lambda tree: {name: flatten_dict(tree, sep="/")[name]}  # noqa: B023, E731
    alone = optim.make(settings, rules, lambda step: factor * schedule(step), STEPS, 1)  # noqa: B023
    assert_history([{name: step[name]} for step in got], run(alone, pick(params), [pick(g) for g in gradients]))


def test_layer_rates_of_vit_s_are_the_official_ones():
  params = jax.eval_shape(vit.vit_small(patch_size=16).init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)), train=True)
  rates = (("encoder/patch_embed/.*", 0.2), (".*", 1.0))
  factors = flatten_dict(optim.rate_factors({"encoder": params["params"]}, 0.9, rates), sep="/")
  want = {"pos_embed": 0.25419, "patch_embed/proj/bias": 0.050837, "blocks_0/attn/qkv/kernel": 0.28243}
  want |= {"blocks_11/norm2/scale": 0.9, "norm/bias": 1.0}  # RECIPES2 11.8, from `param_groups.py` of DINOv2
  for name, factor in want.items():
    assert factors[f"encoder/{name}"] == pytest.approx(factor, rel=2e-5), name


def test_frozen_and_late_parameters_stay_so_with_a_rate(x64):
  params, gradients = draw_network()
  rules = optim.ParameterRules(frozen=("encoder/patch_embed/.*",), late=("head/.*",), late_epochs=2)
  settings = dict(name="adamw", weight_decay=0.3)
  got = run(optim.make(settings | dict(rates=((".*", 0.5),)), rules, schedule, STEPS, 1), params, gradients)
  want = run(optim.make(settings, rules, lambda step: 0.5 * schedule(step), STEPS, 1), params, gradients)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), got, want)
  patches = got[-1]["encoder"]["patch_embed"]["proj"]["kernel"]
  np.testing.assert_array_equal(patches, params["encoder"]["patch_embed"]["proj"]["kernel"])


def test_held_parameters_stay_while_their_moments_run(x64):
  params, gradients = draw_network()
  rules = optim.ParameterRules(held=("head/.*",), late_epochs=2)  # epochs of two steps
  got = run(optim.make(dict(name="adamw", weight_decay=0.3), rules, schedule, STEPS, 2), params, gradients)
  late = lambda step: jnp.where(step < 4, 0.0, schedule(step))  # noqa: E731
  free, later = (
    run(optim.make(dict(name="adamw", weight_decay=0.3), optim.ParameterRules(), rate, STEPS, 2), params, gradients)
    for rate in (schedule, late)
  )
  for step, (tree, freely, lately) in enumerate(zip(got, free, later, strict=True)):
    np.testing.assert_allclose(
      tree["head"]["last_layer"]["weight_v"], lately["head"]["last_layer"]["weight_v"], rtol=1e-12
    )
    jax.tree.map(np.testing.assert_array_equal, tree["encoder"], freely["encoder"])
    assert np.all(tree["head"]["last_layer"]["weight_v"] == params["head"]["last_layer"]["weight_v"]) == (step < 4)


def test_the_gradients_of_a_part_are_clipped_together():
  gradients = {"encoder": {"a": jnp.full(4, 3.0), "b": jnp.full(4, 4.0)}, "head": {"c": jnp.array([0.6, 0.8])}}
  clipped, _ = optim.clip_by_part_norm(2.0).update(gradients, optax.EmptyState())
  np.testing.assert_allclose(clipped["encoder"]["a"], 0.6 * np.ones(4), rtol=1e-6)  # their norm is 10
  np.testing.assert_allclose(clipped["encoder"]["b"], 0.8 * np.ones(4), rtol=1e-6)
  np.testing.assert_array_equal(clipped["head"]["c"], gradients["head"]["c"])
  clipping = optim.make(dict(name="sgd", momentum=0.0, clip_part=2.0), optim.ParameterRules(), lambda step: 1.0, 1, 1)
  updates, _ = clipping.update(gradients, clipping.init(gradients), gradients)
  jax.tree.map(lambda x, g: np.testing.assert_array_equal(x, -g), updates, clipped)


@pytest.mark.parametrize(
  "settings, told",
  [
    (
      dict(rates=(("encoder/.*", 0.1),)),
      r"no expression of optimizer.rates matches 'decoder/blocks_0/cls_token'.*'\.\*', 1\.0",
    ),
    (dict(rates=((".*gama", 0.1), (".*", 1.0))), r"'\.\*gama' decides no parameter"),
    (dict(rates=((".*", 0.1), ("head/.*", 1.0))), r"'head/\.\*' decides no parameter"),
  ],
)
def test_rates_that_miss_a_parameter_are_refused(settings, told):
  with pytest.raises(UserError, match=told):
    optim.make(dict(name="adamw", **settings), optim.ParameterRules(), schedule, STEPS, 1).init(draw_network()[0])


def test_layer_decay_of_an_encoder_without_blocks_is_refused():
  with pytest.raises(UserError, match=r"layer_decay=0.9 needs an encoder with blocks"):
    optim.rate_factors({"encoder": {"conv1": {"kernel": 0}}}, 0.9)


def test_an_unknown_optimizer_or_argument_is_refused():
  with pytest.raises(UserError, match=r"optimizer.name must be one of .*got 'lamb'"):
    make(name="lamb")
  with pytest.raises(TypeError, match="momentun"):
    make(name="lars", momentun=0.9)


def test_the_methods_module_is_found_by_name_and_a_mistake_is_named():
  assert methods.find("simclr").__name__ == "ssl_jax.methods.simclr"
  with pytest.raises(UserError, match="'simcrl' does not exist; did you mean 'simclr'"):
    methods.find("simcrl")


def test_heads_are_trained_until_the_loss_is_flat_and_then_the_encoder_warms_up():
  params = {"encoder": {"w": jnp.ones(2)}, "head": {"w": jnp.ones(2)}}
  grads = jax.tree.map(jnp.ones_like, params)

  def shares(losses, most_steps=40):
    """What part of plain SGD's update the encoder gets in each step."""
    optimizer = optim.heads_first(optax.sgd(1.0), most_steps, window=4, flat=0.1)
    state, got = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for loss in losses:
      updates, state = update(grads, state, params, value=jnp.float32(loss))
      np.testing.assert_array_equal(updates["head"]["w"], -1)
      got.append(float(-updates["encoder"]["w"][0]))
    return got

  ramp = [0.25, 0.5, 0.75, 1.0]
  falls, flat = [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], [1.5] * 8
  # The third window's mean is 40 % below the second's, the fourth's is the same: from step 16 on.
  assert shares(falls + flat + [0.1] * 6) == [0.0] * 16 + [*ramp, 1.0, 1.0]
  assert shares([8.0] * 14) == [0.0] * 8 + [*ramp, 1.0, 1.0]  # flat from the first
  assert shares([2.0**-i for i in range(30)], most_steps=10) == [0.0] * 10 + ramp + [1.0] * 16  # never flat
