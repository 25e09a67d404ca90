"""ResNets and batch norm against torchvision's numbers, and over several devices."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import PartitionSpec as P
from named_weights import named_images, named_weight
from programs import equations

from ssl_jax import convert, models
from ssl_jax.errors import UserError
from ssl_jax.models import resnet
from ssl_jax.models.heads import SimCLRProjector
from ssl_jax.models.norm import BatchNorm


def shapes_of(module, image_shape=(1, 32, 32, 3)):
  """(shapes of the variables, shape of the output) with nothing computed."""
  images = jnp.zeros(image_shape)
  output, variables = jax.eval_shape(lambda: module.init_with_output(jax.random.key(0), images, train=True))
  return variables, output.shape


def count(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def named_variables(name, shapes):
  """Every entry by its PyTorch name, as tests/golden/README describes the weights of the official models."""
  torch_shapes = {key: value.shape for key, value in convert.to_torch(zeros_like(shapes)).items()}
  weights = {key: named_weight(f"{name}{key}", shape) for key, shape in torch_shapes.items()}
  return convert.from_torch(weights, shapes)


def zeros_like(shapes):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_torchvisions_outputs_and_running_statistics(golden, name):
  g = golden("official_models")
  module = models.ENCODERS[name]()
  images = named_images(f"{name}/images", (4, 96, 96, 3))
  variables = named_variables("", shapes_of(module)[0])

  @jax.jit
  def both(variables):
    train, changed = module.apply(variables, images, train=True, mutable=["batch_stats"])
    return module.apply(variables, images, train=False), train, changed["batch_stats"]

  evaluated, trained, stats = both(variables)
  last = stats["layer4_1"]["bn2"]["var"]
  for got, key in (
    (evaluated, "eval"),
    (trained, "train"),
    (stats["bn1"]["mean"], "running_mean_after"),
    (stats["bn1"]["var"], "running_var_after"),
    (last, "last_running_var_after"),
  ):
    want = g[f"{name}/{key}"]
    assert got.dtype == jnp.float32
    # float32 through up to 50 layers, summed in another order than PyTorch's
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=key)


# torchvision's numel() of resnet*() without fc.
@pytest.mark.parametrize(
  ("name", "parameters"),
  [
    ("resnet18", 11_176_512),
    ("resnet34", 21_284_672),
    ("resnet50", 23_508_032),
    ("resnet101", 42_500_160),
    ("resnet152", 58_143_808),
  ],
)
def test_number_of_parameters_is_torchvisions(name, parameters):
  variables, _ = shapes_of(models.ENCODERS[name]())
  assert count(variables["params"]) == parameters


@pytest.mark.parametrize(("bottleneck", "expansion"), [(False, 1), (True, 4)])
@pytest.mark.parametrize("width", [0.5, 2])
def test_width_multiplies_every_channel(width, bottleneck, expansion):
  module = resnet.ResNet(stages=(1, 1), bottleneck=bottleneck, width=width)
  variables, output = shapes_of(module)
  plain, _ = shapes_of(resnet.ResNet(stages=(1, 1), bottleneck=bottleneck))
  assert output == (1, 128 * width * expansion)
  wide_stats, stats = (traverse_util.flatten_dict(v["batch_stats"]) for v in (variables, plain))
  assert {p: leaf.shape[0] / width for p, leaf in wide_stats.items()} == {p: leaf.shape[0] for p, leaf in stats.items()}


@pytest.mark.parametrize(
  ("stem", "size", "side"),
  [("imagenet", 64, 16), ("imagenet", 96, 24), ("small", 32, 32), ("patch", 32, 8), ("patch", 28, 7)],
)
def test_the_stems_maps_have_the_documented_side_and_are_kept_by_flat_features(stem, size, side):
  module = resnet.ResNet(stages=(1,), stem=stem, features="flat")
  assert shapes_of(module, (2, size, size, 3))[1] == (2, side * side * 64)


def test_stages_halve_the_maps_and_double_the_channels():
  module = resnet.ResNet(stages=(1, 1, 1), width=0.25, stem="small", features="flat")
  assert shapes_of(module, (1, 32, 32, 3))[1] == (1, 8 * 8 * 64)


def test_pooled_features_are_the_mean_of_the_flat_ones():
  settings = dict(stages=(1,), width=0.125, stem="small")
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  flat, pooled = resnet.ResNet(features="flat", **settings), resnet.ResNet(**settings)
  variables = jax.jit(functools.partial(flat.init, train=True))(jax.random.key(0), images)
  maps, means = jax.jit(lambda v: (flat.apply(v, images, train=False), pooled.apply(v, images, train=False)))(variables)
  np.testing.assert_allclose(means, maps.reshape(2, 64, 8).mean(axis=1), rtol=1e-5, atol=1e-6)  # float32 sums


@pytest.mark.parametrize(("bottleneck", "added"), [(False, {("layer1_0", "downsample_conv")}), (True, set())])
def test_project_first_adds_one_projection_to_basic_blocks_only(bottleneck, added):
  def projections(**kwargs):
    variables, _ = shapes_of(resnet.ResNet(stages=(2, 2), bottleneck=bottleneck, **kwargs))
    return {path[:-1] for path in traverse_util.flatten_dict(variables["params"]) if "downsample_conv" in path}

  assert projections(project_first=True) - projections() == added


def test_zero_scales_make_every_block_start_as_its_shortcut():
  module = resnet.ResNet(stages=(2,), width=0.125, stem="small", last_scale_init=nn.initializers.zeros, features="flat")
  images = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
  none = resnet.ResNet(stages=(), width=0.125, stem="small", features="flat")
  variables = jax.jit(functools.partial(module.init, train=True))(jax.random.key(0), images)
  stem = {kind: {k: v for k, v in tree.items() if k in ("conv1", "bn1")} for kind, tree in variables.items()}
  got, want = jax.jit(lambda v, s: (module.apply(v, images, train=False), none.apply(s, images, train=False)))(
    variables, stem
  )
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("field", "value"), [("stem", "tiny"), ("features", "max")])
def test_an_unknown_choice_is_named(field, value):
  with pytest.raises(ValueError, match=f"encoder.{field} .*{value}"):
    shapes_of(resnet.ResNet(stages=(1,), **{field: value}))


def make(**encoder):
  context = dict(method="simclr", image_size=32, dtype=jnp.bfloat16, axis_name="batch")
  return models.make(encoder, **context, resnet=dict(width=2))


def test_an_encoder_is_made_by_name_and_its_recipe_is_over_the_methods_settings():
  made = make(name="resnet18", stem="small")
  assert (made.width, made.stem, made.axis_name, made.dtype) == (2, "small", "batch", jnp.bfloat16)
  assert make(name="resnet18", width=3).width == 3


def test_an_unknown_encoder_is_named_with_the_nearest():
  with pytest.raises(UserError, match=r"resnet81.*did you mean 'resnet"):
    make(name="resnet81")


def test_bfloat16_computes_narrow_and_keeps_parameters_statistics_and_features_wide():
  module = resnet.ResNet(stages=(1,), width=0.125, stem="small", dtype=jnp.bfloat16)
  images = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
  variables = jax.jit(functools.partial(module.init, train=True))(jax.random.key(0), images)
  output, changed = jax.jit(lambda v: module.apply(v, images, train=True, mutable=["batch_stats"]))(variables)
  assert {leaf.dtype for leaf in jax.tree.leaves((variables, changed, output))} == {jnp.dtype(jnp.float32)}
  wide = resnet.ResNet(stages=(1,), width=0.125, stem="small")
  want = jax.jit(lambda v: wide.apply(v, images, train=True, mutable=["batch_stats"]))(variables)[0]
  assert 0 < np.abs(output - want).max() < 0.05  # rounded to 8 bits in three layers, and really rounded
  assert np.mean(output != output.astype(jnp.bfloat16).astype(jnp.float32)) > 0.5  # the mean over places is not


def test_the_projector_is_the_official_one():
  projector = SimCLRProjector(layers=3, features=16)
  variables = jax.eval_shape(lambda: projector.init(jax.random.key(0), jnp.zeros((2, 8)), train=True))
  names = {"/".join(path): leaf.shape for path, leaf in traverse_util.flatten_dict(variables["params"]).items()}
  assert names == {
    "linear1/kernel": (8, 8),
    "bn1/scale": (8,),
    "bn1/bias": (8,),
    "linear2/kernel": (8, 8),
    "bn2/scale": (8,),
    "bn2/bias": (8,),
    "linear3/kernel": (8, 16),
    "bn3/scale": (16,),  # and no offset
  }


# Batch norm.


def apply_norm(norm, variables, x):
  """Training: (output, new running statistics)."""
  y, changed = norm.apply(variables, x, True, mutable=["batch_stats"])
  return y, changed["batch_stats"]


def norm_variables(channels, seed=1):
  rng = np.random.default_rng(seed)
  mean, bias = rng.normal(size=(2, channels)).astype(np.float32)
  var, scale = rng.uniform(0.5, 2, size=(2, channels)).astype(np.float32)
  return {"params": {"scale": scale, "bias": bias}, "batch_stats": {"mean": mean, "var": var}}


def test_training_normalises_by_the_biased_variance_and_keeps_the_unbiased_one():
  x = np.random.default_rng(0).normal(2, 3, size=(4, 5, 6, 3)).astype(np.float32)
  v = norm_variables(3)
  y, stats = jax.jit(functools.partial(apply_norm, BatchNorm()))(v, x)
  wide = x.astype(np.float64)
  mean, var = wide.mean(axis=(0, 1, 2)), wide.var(axis=(0, 1, 2))
  want = (wide - mean) / np.sqrt(var + 1e-5) * v["params"]["scale"] + v["params"]["bias"]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)  # float32
  unbiased = wide.var(axis=(0, 1, 2), ddof=1)
  assert np.abs(unbiased / var - 1).min() > 1e-3  # more than the tolerance below
  np.testing.assert_allclose(stats["mean"], 0.9 * v["batch_stats"]["mean"] + 0.1 * mean, rtol=1e-5)
  np.testing.assert_allclose(stats["var"], 0.9 * v["batch_stats"]["var"] + 0.1 * unbiased, rtol=1e-5)


def test_evaluation_uses_the_running_statistics_and_leaves_them():
  x = np.random.default_rng(0).normal(2, 3, size=(4, 3)).astype(np.float32)
  v = norm_variables(3)
  y, changed = jax.jit(lambda v: BatchNorm().apply(v, x, False, mutable=["batch_stats"]))(v)
  stats, params = v["batch_stats"], v["params"]
  want = (x - stats["mean"]) / np.sqrt(stats["var"] + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5)  # float32
  jax.tree.map(np.testing.assert_array_equal, changed.get("batch_stats", stats), stats)


def test_groups_are_normalised_apart_and_their_statistics_averaged():
  x = np.random.default_rng(0).normal(2, 3, size=(6, 4, 3)).astype(np.float32)
  v = norm_variables(3)
  y, stats = jax.jit(functools.partial(apply_norm, BatchNorm(group_size=2)))(v, x)
  parts = [jax.jit(functools.partial(apply_norm, BatchNorm()))(v, x[i : i + 2]) for i in (0, 2, 4)]
  np.testing.assert_allclose(y, np.concatenate([part for part, _ in parts]), rtol=1e-5, atol=1e-5)  # float32
  for name, value in stats.items():
    np.testing.assert_allclose(value, np.mean([part[name] for _, part in parts], axis=0), rtol=1e-5)
  with pytest.raises(ValueError, match="bn_group_size=4 does not divide the 6"):
    apply_norm(BatchNorm(group_size=4), v, x)


def test_one_group_has_no_axis_of_its_own():
  def loss(v, x, **settings):
    return jnp.sum(jnp.sin(apply_norm(BatchNorm(**settings), v, x)[0]))

  v, x = norm_variables(3), jnp.ones((6, 4, 3))

  def shapes(**settings):
    program = jax.make_jaxpr(jax.grad(functools.partial(loss, **settings)))(v, x)
    return {y.aval.shape for equation in equations(program.jaxpr) for y in equation.outvars}

  assert (1, 24, 3) not in shapes() | shapes(group_size=6)
  assert (2, 12, 3) in shapes(group_size=3)


def test_synchronised_variance_is_of_the_whole_batch_not_a_mean_of_variances():
  x = np.array([[[0.0], [0.0]], [[2.0], [2.0]]], np.float32)  # two devices, each constant
  one, zero = np.ones(1, np.float32), np.zeros(1, np.float32)
  v = {"params": {"scale": one, "bias": zero}, "batch_stats": {"mean": zero, "var": zero}}
  norm = BatchNorm("batch", momentum=0.0)
  y, stats = jax.jit(jax.vmap(functools.partial(apply_norm, norm, v), axis_name="batch"))(x)
  np.testing.assert_allclose(y.ravel(), np.array([-1, -1, 1, 1]) / np.sqrt(1 + 1e-5), rtol=1e-6)
  np.testing.assert_allclose(stats["var"].ravel(), 2 * [4 / 3], rtol=1e-6)  # the variance 1.0, unbiased over n = 4


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_output_gradient_and_statistics_are_the_same_over_any_number_of_devices(mesh, devices):
  rng = np.random.default_rng(0)
  x, weights = rng.normal(1, 2, size=(2, 8, 2, 3)).astype(np.float32)
  v = norm_variables(3)

  def loss(params, x, weights, axis_name):
    """Sum over the devices, so that each shard's gradient is its part of the whole one."""
    y, stats = apply_norm(BatchNorm(axis_name), {**v, "params": params}, x)
    return jnp.sum(jnp.sin(y) * weights), (y, stats)

  def run(params, x, weights, axis_name=None):
    (_, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x, weights, axis_name)
    return grads, aux

  (want_params, want_x), (want_y, want_stats) = jax.jit(run)(v["params"], x, weights)

  def one_device(params, x, weights):
    (grad_params, grad_x), (y, stats) = run(params, x, weights, "batch")
    return jax.lax.psum(grad_params, "batch"), grad_x, y, jax.tree.map(lambda s: s[None], stats)

  specs = dict(in_specs=(P(), P("batch"), P("batch")), out_specs=(P(), P("batch"), P("batch"), P("batch")))
  grad_params, grad_x, y, stats = jax.jit(jax.shard_map(one_device, mesh=mesh(devices), check_vma=False, **specs))(
    v["params"], x, weights
  )
  close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)  # float32, another order of summation
  close(y, want_y)
  close(grad_x, want_x)
  jax.tree.map(close, grad_params, want_params)
  for name, value in stats.items():
    for row in value:  # every device keeps the same
      close(row, want_stats[name])


def test_without_an_axis_it_runs_outside_any_axis_and_a_wrong_axis_is_named():
  x = np.ones((4, 3), np.float32)
  v = jax.jit(lambda: BatchNorm().init(jax.random.key(0), x, True))()
  apply_norm(BatchNorm(), v, x)
  with_axis = BatchNorm("batch")
  v = jax.jit(lambda: with_axis.init(jax.random.key(0), x, True))()  # creation needs no axis
  np.testing.assert_array_equal(v["batch_stats"]["mean"], np.zeros(3))
  with pytest.raises(NameError, match="bacth"):
    jax.vmap(functools.partial(apply_norm, BatchNorm("bacth"), v), axis_name="batch")(x[None])


def test_bfloat16_input_keeps_float32_statistics():
  x = jnp.asarray(np.random.default_rng(0).normal(50, 1, size=(64, 3)), jnp.bfloat16)
  v = norm_variables(3)
  y, stats = jax.jit(functools.partial(apply_norm, BatchNorm(momentum=0.0, dtype=jnp.bfloat16)))(v, x)
  assert y.dtype == jnp.bfloat16
  assert {leaf.dtype for leaf in stats.values()} == {jnp.dtype(jnp.float32)}
  wide = np.asarray(x, np.float64)
  # bfloat16 sums would be off by 1e-2; E[x^2] - E[x]^2 at a mean of 50 loses 2500 roundings of float32.
  np.testing.assert_allclose(stats["mean"], wide.mean(axis=0), rtol=1e-6)
  np.testing.assert_allclose(stats["var"], wide.var(axis=0, ddof=1), rtol=2e-3)


def test_float64_input_keeps_float64_precision(x64):
  x = jnp.asarray(np.random.default_rng(0).normal(3, 1, size=(64, 3)))
  v = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), norm_variables(3))
  y, stats = jax.jit(functools.partial(apply_norm, BatchNorm(momentum=0.0, dtype=jnp.float64)))(v, x)
  wide, params = np.asarray(x), jax.tree.map(np.asarray, v["params"])
  np.testing.assert_allclose(stats["var"], wide.var(axis=0, ddof=1), rtol=1e-12)
  want = (wide - wide.mean(axis=0)) / np.sqrt(wide.var(axis=0) + 1e-5) * params["scale"] + params["bias"]
  np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)


def test_a_batch_of_one_stays_finite_in_value_gradient_and_statistics():
  x = np.random.default_rng(0).normal(size=(1, 3)).astype(np.float32)
  v = norm_variables(3)

  def loss(x):
    y, stats = apply_norm(BatchNorm(), v, x)
    return jnp.sum(y * y), (y, stats)

  grad, (y, stats) = jax.jit(jax.grad(loss, has_aux=True))(x)
  np.testing.assert_allclose(y[0], v["params"]["bias"], atol=1e-3)  # one example is its own mean
  assert all(np.isfinite(leaf).all() for leaf in (grad, y, stats["mean"], stats["var"]))


@pytest.mark.parametrize("constant", [0.0, 7.3, -1e4])
def test_a_constant_channel_is_its_offset(constant):
  v = norm_variables(3)
  y, stats = jax.jit(functools.partial(apply_norm, BatchNorm()))(v, np.full((8, 3), constant, np.float32))
  assert np.isfinite(y).all()
  assert (stats["var"] >= 0).all()
