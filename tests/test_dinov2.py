"""DINOv2: its networks, masks and whole steps against the official code's, and what it draws and splits."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict
from named_weights import named_images, named_weight
from test_config import by_name, recipe
from trajectories import error, named_variables

from ssl_jax import augment, build, convert, models, optim, parallel
from ssl_jax.augment import View
from ssl_jax.block_masks import most_masked
from ssl_jax.errors import UserError
from ssl_jax.losses import distillation_loss, ibot_loss, koleo_loss
from ssl_jax.methods import dinov2
from ssl_jax.methods.base import Context, constant_momentum
from ssl_jax.models import heads, vit

ONE = jax.random.key(0)
KEYS = jax.random.split(ONE, 8)
TYPES = ("float64", "float32")
NO_DECAY = (r".*/bias", r".*/scale", r".*/gamma")


@pytest.fixture
def precise(dtype):
  """float64 where the test asks for it."""
  with jax.enable_x64(dtype == "float64"):
    yield


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


# ---- the network


def network(variant, g, dtype):
  """(the module, its parameters by name)."""
  registers = 4 if variant.startswith("reg4") else 0
  shape = {name: int(g[f"cfg/{key}"]) for name, key in dict(patch_size="p", dim="dim", depth="depth").items()}
  settings = dict(heads=3, image_size=16, mask_token=True, layer_scale=1e-5, ffn=variant.split("_")[1], dtype=dtype)
  model = vit.ViT(**shape, registers=registers, resize="antialiased" if registers else "offset", **settings)
  wanted = jax.eval_shape(lambda: model.init(ONE, jnp.zeros((1, 16, 16, 3)), train=False))
  shapes = {name: x.shape for name, x in convert.to_torch(jax.tree.map(lambda x: np.empty(x.shape), wanted)).items()}
  given = dict(zip(g[f"{variant}/param_names"], g[f"{variant}/param_shapes"], strict=True))
  assert {name: str(shape) for name, shape in shapes.items()} == given
  return model, named_variables(wanted, f"dinov2_vit/{variant}/", {}, dtype)


ALL = ("larger", "rect", "smaller", "masked_native")


@pytest.mark.parametrize(
  "variant, dtype",
  [
    *(slow(f"{kind}_{ffn}", dtype) for kind in ("plain", "reg4") for ffn in ("mlp", "swiglu") for dtype in TYPES),
  ],
)
def test_the_network_and_its_gradients_are_the_official_ones(golden, variant, dtype, precise):
  g, tolerance = golden("dinov2_vit"), 1e-6 if dtype == "float64" else 1e-4
  model, variables = network(variant, g, jnp.dtype(dtype))
  c = jnp.asarray(named_images("dinov2_vit/cotangent", (1, 36, 48)), dtype)

  def tokens(variables, size):
    name = size.removeprefix("masked_")
    n, height, width = g[f"cfg/size_{name}"]
    images = jnp.asarray(named_images(f"dinov2_vit/images_{name}", (n, height, width, 3)), dtype)
    masked = g[f"{variant}/{size}/mask"] if size.startswith("masked") else None
    return model.apply(variables, images, masked=masked, method="tokens")

  def value(variables):
    x = tokens(variables, "masked_larger")
    return jnp.mean(x[:, -36:] * c) + jnp.mean(x[:, 0] * c[:, 0]), x

  @jax.jit
  def everything(variables):
    last = model.apply(
      variables, jnp.asarray(named_images("dinov2_vit/images_native", (2, 16, 16, 3)), dtype), 2, method="last_blocks"
    )
    (total, masked), grads = jax.value_and_grad(value, has_aux=True)(variables)
    found = {size: tokens(variables, size) for size in ALL} | {"native": last[-1], "masked_larger": masked}
    return found, jnp.stack(last), total, grads

  np.testing.assert_array_equal(g[f"{variant}/grad_larger/mask"], g[f"{variant}/masked_larger/mask"])
  found, last, total, grads = everything(variables)
  patches = slice(1 + model.registers, None)
  for size, x in found.items():
    assert error(x[:, 0], g[f"{variant}/{size}/cls"]) < tolerance, size
    assert error(x[:, patches], g[f"{variant}/{size}/patches"]) < tolerance, size
    if model.registers:
      assert error(x[:, 1:5], g[f"{variant}/{size}/registers"]) < tolerance, size
  assert error(last[:, :, 0], g[f"{variant}/native/last2_cls"]) < tolerance
  assert error(jnp.mean(last[:, :, patches], axis=2), g[f"{variant}/native/last2_patches_mean"]) < tolerance
  # The terms of this sum are about 1, and the official positions are interpolated in float32 in both precisions.
  np.testing.assert_allclose(total, g[f"{variant}/grad_larger/value"], rtol=tolerance, atol=tolerance / 10)
  grads, of = convert.to_torch(grads), f"{variant}/grad_larger/"
  for name in {x.removeprefix(of) for x in g.files if x.startswith(of)} - {"value", "mask"}:
    assert error(grads[name], g[of + name]) < tolerance, name


@pytest.mark.parametrize("variant", ["plain_mlp", "reg4_mlp"])
def test_positions_are_resized_as_in_both_official_models(golden, variant):
  g = golden("dinov2_vit")
  positions = jnp.asarray(named_weight(f"dinov2_vit/{variant}/pos_embed", (1, 17, 48)))
  for size in ("larger", "rect", "smaller"):
    height, width = (int(x) // 4 for x in g[f"cfg/size_{size}"][1:])
    resized = vit.interpolate_positions(positions, height, width, antialias=variant == "reg4_mlp")
    assert error(resized[0, 1:], g[f"{variant}/{size}/position_patches"]) < 1e-6, size


def test_a_masked_patch_is_not_seen_and_the_mean_leaves_registers_out():
  shape = dict(patch_size=4, dim=12, depth=1, heads=3, image_size=8, mask_token=True, registers=2)
  images = np.random.default_rng(0).uniform(size=(2, 8, 8, 3))
  params = jax.eval_shape(lambda: vit.ViT(**shape).init(ONE, images, train=False))
  params = named_variables(params, "", {}, jnp.float32)

  @jax.jit
  def both(x):
    masked = jnp.zeros((2, 4), bool).at[0, 0].set(True)
    mean = vit.ViT(**shape, features="mean").apply(params, x, train=False)
    return mean, *(vit.ViT(**shape).apply(params, x, masked=m, method="tokens") for m in (masked, None))

  changed = images.copy()
  changed[:, :4, :4] = 0.5
  (mean, masked, seen), (_, other, _) = both(images), both(changed)
  np.testing.assert_array_equal(np.any(masked != other, axis=(1, 2)), [False, True])
  np.testing.assert_allclose(mean, seen[:, 3:].mean(1), rtol=1e-5, atol=1e-6)


# ---- whole steps


RENAME = {r"^encoder\.": "backbone.", r"^head\.": "dino_head.", r"^patch_head\.": "ibot_head."}


def trajectory(g, run, dtype):
  """(method, encoder, optimizer, start (params, state), cfg): the official run's, by a recipe's keys."""
  cfg = {name.removeprefix(f"{run}/cfg/"): g[name].item() for name in g.files if name.startswith(f"{run}/cfg/")}
  shared = run == "shared_centering"
  head = dict(hidden=cfg["hid"], bottleneck=cfg["bott"], prototypes=cfg["K"])
  config = ConfigDict(
    dict(
      encoder=dict(name="vit", patch_size=4, dim=cfg["dim"], depth=cfg["depth"], heads=cfg["heads"]),
      method=dict(name="dinov2", head=head, targets="centered" if shared else "sinkhorn"),
      optimizer=dict(name="adamw", weight_decay=0.4, weight_decay_end=4.0, clip_part=cfg["clip"]),
      lr=dict(base=cfg["lr"], scaling="none", warmup_epochs=1.0, end=1e-6, inclusive=True),
    )
  )
  config.encoder.update(registers=cfg["R"], layer_scale=1e-5, ffn="mlp" if shared else "swiglu")
  config.method.patch_head = {} if shared else dict(hidden=cfg["hid"], bottleneck=cfg["bott2"], prototypes=cfg["K2"])
  config.method.update(teacher_temperature=0.07, teacher_temperature_start=0.04)
  config.method.update(teacher_temperature_warmup_epochs=cfg["tw"], teacher_momentum=cfg["m"], student_temperature=0.1)
  config.optimizer.update(layer_decay=cfg["ld"], rates=(("encoder/patch_embed/.*", cfg["pm"]), (".*", 1.0)))
  views = 2 * [View(cfg["G"])] + cfg["V"] * [View(cfg["L"])]
  steps = cfg["ep"] * cfg["epochs"], cfg["ep"]
  encoder = functools.partial(models.make, config.encoder, method="dinov2", image_size=cfg["G"], dtype=dtype)
  context = Context(encoder, True, views, cfg["B"], 3, 0, *steps, dtype, axis_name=None)
  method = dinov2.from_config(config.method, context)
  rules = optim.ParameterRules(NO_DECAY, held=(r".*head/last_layer/.*",), late_epochs=1)
  rate = optim.make_schedule(config.lr, cfg["B"], *steps)
  optimizer = optim.make(config.optimizer, rules, rate, *steps)
  drawn = tuple(jnp.zeros((v, 1, side, side, 3)) for v, side in ((2, cfg["G"]), (cfg["V"], cfg["L"])))
  params, state = jax.eval_shape(method.init, ONE, drawn)
  params = named_variables({"params": params}, cfg["name_prefix"], RENAME, dtype)["params"]
  centers = jax.tree.map(lambda x: jnp.zeros(x.shape, dtype), state.centers)
  return method, encoder(vit={}), optimizer, (params, dinov2.DINOv2State(jax.tree.map(jnp.copy, params), centers)), cfg


def official_name(name):
  for pattern, replacement in RENAME.items():
    name = re.sub(pattern, replacement, name)
  return name


@pytest.mark.parametrize(
  "run, dtype",
  [
    ("separate_sinkhorn", "float64"),
    slow("shared_centering", "float64"),
    slow("separate_sinkhorn", "float32"),
    slow("shared_centering", "float32"),
  ],
)
def test_eight_steps_are_the_official_ones(golden, run, dtype, precise, monkeypatch):
  g, dtype = golden("dinov2_trajectory"), jnp.dtype(dtype)
  losses, probes, weights = (1e-7, 1e-6, 1e-6) if dtype == "float64" else (2e-5, 1e-4, 5e-5)
  method, encoder, optimizer, (params, state), cfg = trajectory(g, run, dtype)
  masks = jnp.asarray(g[f"{run}/masks"].reshape(8, 2, cfg["B"], -1))
  place = {}
  monkeypatch.setattr(dinov2, "draw_masks", lambda keys, grid, **_: masks[place["step"]])
  assert (
    most_masked(2 * cfg["B"], 2 * cfg["B"], masks.shape[-1], share=0.5, ratios=(0.1, 0.5)) == g[f"{run}/upperbound"]
  )

  @jax.jit
  def step(params, state, opt_state, drawn, i):
    place["step"] = i
    (_, aux), grads = jax.value_and_grad(method.loss, has_aux=True)(params, state, drawn, KEYS[: cfg["B"]], i)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, method.update(params, state, aux, i), opt_state, aux

  opt_state = optimizer.init(params)
  for i in range(8):
    shapes = {"global": (2, cfg["G"]), "local": (cfg["V"], cfg["L"])}
    drawn = tuple(
      jnp.asarray(named_images(f"{cfg['name_prefix']}{name}{i}", (v * cfg["B"], side, side, 3)), dtype).reshape(
        v, cfg["B"], side, side, 3
      )
      for name, (v, side) in shapes.items()
    )
    params, state, opt_state, aux = step(params, state, opt_state, drawn, i)
    want = {"loss": g[f"{run}/loss_total"][i], "ibot": g[f"{run}/loss_ibot"][i]}
    want["dino"] = g[f"{run}/loss_dino_local"][i] + g[f"{run}/loss_dino_global"][i]
    want |= {"koleo": 10 * g[f"{run}/loss_koleo"][i], "teacher_temperature": g[f"{run}/teacher_temp"][i]}
    for key, value in want.items():
      # KoLeo is a mean of logarithms of about 0.
      np.testing.assert_allclose(aux.metrics[key], value, rtol=losses, atol=losses, err_msg=f"{key}, step {i}")

  images = jnp.asarray(named_images(f"{cfg['name_prefix']}probe", (4, cfg["G"], cfg["G"], 3)), dtype)
  head = functools.partial(heads.DINOHead, hidden=cfg["hid"], train_gain=True, dtype=dtype)

  @jax.jit
  def probe(params):
    tokens = encoder.apply({"params": params["encoder"]}, images, method="tokens")
    cls, patches = tokens[:, 0], tokens[:, 1 + cfg["R"] : 5 + cfg["R"]]
    found = {"cls": cls, "patches": patches}
    found["dino_head"] = head(bottleneck=cfg["bott"], prototypes=cfg["K"]).apply({"params": params["head"]}, cls)
    if "patch_head" in params:
      of_patches = head(bottleneck=cfg["bott2"], prototypes=cfg["K2"])
      found["ibot_head"] = of_patches.apply({"params": params["patch_head"]}, patches)
    return found

  for network, trained in (("student", params), ("teacher", state.teacher_params)):
    of = f"{run}/{network}/"
    for name, x in probe(trained).items():
      assert error(x, g[of + name]) < probes, (network, name)
    final = {official_name(name): x for name, x in convert.to_torch({"params": trained}).items()}
    for name in final:
      if f"{of}w/{name}" in g.files:
        assert error(final[name], g[f"{of}w/{name}"]) < weights, (network, name)
    norms = [np.linalg.norm(final[name]) for name in g[f"{run}/param_names"]]
    np.testing.assert_allclose(norms, g[f"{of}param_norm"], rtol=1e-3)  # Adam turns rounding into steps of key biases
  if run == "shared_centering":
    assert error(state.centers["cls"], g[f"{run}/dino_center"]) < probes
    assert error(state.centers["patch"], g[f"{run}/ibot_center"]) < probes


# ---- what it draws and splits


TINY = dict(patch_size=2, dim=8, depth=2, heads=2, image_size=8, mask_token=True)


def test_a_fixed_number_of_crops_of_each_resolution_keeps_a_branch():
  encoder = vit.ViT(**TINY, drop_path=0.3)
  keys = augment.example_keys(0, jnp.int32(0), jnp.arange(8))
  large, small = jax.jit(lambda: dinov2.kept_paths(keys, encoder, (2, 5), None))()
  assert large.shape == (2, 8, 2, 2) and small.shape == (5, 8, 2, 2)
  for factors, kept in ((large, 11), (small, 28)):  # int(16 * 0.7), int(40 * 0.7)
    np.testing.assert_array_equal(np.sum(factors > 0, axis=(0, 1)), np.full((2, 2), kept))
    np.testing.assert_allclose(factors[factors > 0], factors[:, :, 0, 0].size / kept, rtol=1e-6)
  patterns = [np.ravel(small[:, :, i, j] > 0) for i in range(2) for j in range(2)]
  assert all(np.any(a != b) for a, b in itertools.combinations(patterns, 2))  # each branch of each block draws apart
  spread = jax.vmap(
    lambda keys: tuple(dinov2.kept_paths(keys, encoder, (2, 5), "batch")), axis_name="batch", out_axes=1
  )
  for got, want in zip(jax.jit(spread)(keys.reshape(4, 2)), (large, small), strict=True):
    np.testing.assert_array_equal(got.reshape(want.shape), want)  # on any number of devices
  assert dinov2.kept_paths(keys, vit.ViT(**TINY), (2, 5), None) == [None, None]


class Pixels(heads.nn.Module):
  """Patches as they are, or the mask token, behind their mean; one branch scales all of them."""

  patch_size: int = 2
  dim: int = 12
  registers: int = 0
  depth: int = 1
  drop_path: float = 0.0

  def setup(self):
    self.mask = self.param("mask_token", heads.nn.initializers.normal(), (1, self.dim))

  def __call__(self, images, *, train):
    return self.tokens(images)

  def tokens(self, images, masked=None, factors=None):
    x = rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=2, q=2)
    x = x if masked is None else jnp.where(masked[..., None], self.mask[None], x)
    x = jnp.concatenate([jnp.mean(x, axis=1, keepdims=True), x], axis=1)
    return x if factors is None else x * (1 + factors[0, 0, :, None, None])


def test_a_step_with_centres_is_its_formulas(x64, monkeypatch):
  b, head, encoder = 4, heads.DINOHead(1, 8, 4, 6, True, jnp.float64), Pixels()
  masked = jnp.zeros((2, b, 16), bool).at[0, 1, 3].set(True).at[1, 0, :5].set(True).at[1, 2, 7:9].set(True)
  monkeypatch.setattr(dinov2, "draw_masks", lambda keys, grid, **_: masked)
  settings = dict(teacher_temperature=optax.constant_schedule(0.07), teacher_momentum=constant_momentum(0.9))
  method = dinov2.dinov2(encoder, head, center_momentum=0.8, patch_weight=2.0, koleo_weight=0.5, **settings)
  rng = np.random.default_rng(0)
  views = tuple(rng.normal(size=(v, b, side, side, 3)) for v, side in ((2, 8), (3, 4)))
  params, state = jax.eval_shape(method.init, ONE, views)
  params, state = jax.tree.map(lambda x: rng.normal(size=x.shape), (params, state))  # teacher and centres apart

  def logits(params, crops, masked=None):
    """All tokens of [v, b, ...] crops, and the head's outputs."""
    masked = None if masked is None else masked.reshape(2 * b, 16)
    x = encoder.apply({"params": params["encoder"]}, crops.reshape(-1, *crops.shape[2:]), masked, method="tokens")
    return x, head.apply({"params": params["head"]}, x.reshape(-1, 12)).reshape(*x.shape[:2], 6)

  @jax.jit
  def got_and_want(params, state):
    (large, student), (_, small) = logits(params, views[0], masked), logits(params, views[1])
    teacher, flat = logits(state.teacher_params, views[0])[1], np.asarray(masked).reshape(2 * b, 16)
    cls, patches = teacher[:, 0], teacher[:, 1:][flat]
    softmax = lambda x, center: jax.nn.softmax((x - center[None]) / 0.07)  # noqa: E731
    weights = jnp.asarray(np.repeat(1 / (2 * b * np.maximum(flat.sum(1), 1)), flat.sum(1)))
    targets = softmax(cls, state.centers["cls"]).reshape(2, b, 6)
    dino = distillation_loss(jnp.concatenate([student[:, 0], small[:, 0]]).reshape(5, b, 6), targets)
    ibot = ibot_loss(student[:, 1:][flat], softmax(patches, state.centers["patch"]), weights)
    koleo = sum(koleo_loss(large[c * b : c * b + b, 0]) for c in range(2))
    means = {"cls": cls.mean(0), "patch": patches.mean(0)}
    centers = {name: 0.8 * state.centers[name] + 0.2 * mean for name, mean in means.items()}
    value, aux = method.loss(params, state, views, KEYS[:b], 0)
    terms = {name: aux.metrics[name] for name in ("dino", "ibot", "koleo")}
    return (value, terms, aux.averages), (dino + 2 * ibot + koleo / 2, dict(dino=dino, ibot=ibot, koleo=koleo), centers)

  got, want = got_and_want(params, state)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10), got, want)


def part_of(x, axis_name):
  """A device's part of [v, B, ...]."""
  size = 1 if axis_name is None else jax.lax.axis_size(axis_name)
  first = 0 if axis_name is None else jax.lax.axis_index(axis_name) * (x.shape[1] // size)
  return jax.lax.dynamic_slice_in_dim(x, first, x.shape[1] // size, axis=1)


@pytest.mark.parametrize("sinkhorn, drawn", [(False, False), (True, False), slow(False, True), slow(True, True)])
def test_a_step_is_the_global_batchs_on_any_number_of_devices_and_by_microbatches(x64, sinkhorn, drawn, monkeypatch):
  # Masks, dropped paths, neighbours, centres and balanced prototypes would each be another on each device alone.
  parts = Pixels(drop_path=0.3), heads.DINOHead(1, 8, 4, 6, True, jnp.float64)
  settings = dict(teacher_temperature=optax.constant_schedule(0.5), teacher_momentum=constant_momentum(0.9))
  make = functools.partial(dinov2.dinov2, *parts, sinkhorn=sinkhorn, **settings)
  rng, keys = np.random.default_rng(0), augment.example_keys(0, jnp.int32(0), jnp.arange(8))
  views = tuple(rng.normal(size=(v, 8, side, side, 3)) for v, side in ((2, 12), (3, 4)))
  if not drawn:  # it is random numbers that take long to compile
    masked, kept = np.zeros((2, 8, 36), bool), [jnp.asarray(rng.random((v, 8, 1, 2))) for v in (2, 3)]
    for place, (crop, image) in enumerate([(0, 0), (0, 1), (1, 1), (1, 4), (0, 6)]):
      masked[crop, image, place : 2 * place + 1] = True
    monkeypatch.setattr(dinov2, "draw_masks", lambda *_, axis_name, **__: part_of(jnp.asarray(masked), axis_name))
    monkeypatch.setattr(dinov2, "kept_paths", lambda *args: [part_of(x, args[-1]) for x in kept])
  params, state = jax.eval_shape(make().init, ONE, views)
  params, state = jax.tree.map(lambda x: rng.normal(size=x.shape), (params, state))

  def step(method, axis, views, keys):
    loss = functools.partial(method.loss, state=state, views=views, keys=keys, step=0)
    grads, aux = {}, loss(params)[1]
    if drawn or not sinkhorn:  # gradients of both take longer to compile
      grads, aux = jax.grad(loss, has_aux=True)(params)
    return (grads, aux) if axis is None else (jax.lax.pmean(grads, axis), parallel.combine(aux, axis))

  split = tuple(x.reshape(x.shape[0], 4, 2, *x.shape[2:]) for x in views)
  mapped = functools.partial(step, make(axis_name="batch", microbatch=4), "batch")
  got = jax.jit(jax.vmap(mapped, (1, 0), axis_name="batch"))(split, keys.reshape(4, 2))
  want = jax.jit(functools.partial(step, make(), None))(views, keys)
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, np.broadcast_to(y, x.shape), rtol=1e-9, atol=1e-12), got, want
  )


def test_evaluation_takes_the_teachers_encoder_without_the_mask_token():
  method = dinov2.dinov2(
    Pixels(),
    heads.DINOHead(hidden=8, bottleneck=4, prototypes=6),
    teacher_temperature=optax.constant_schedule(0.07),
    teacher_momentum=constant_momentum(0.9),
  )
  params, state = jax.eval_shape(method.init, ONE, (jnp.zeros((2, 1, 8, 8, 3)),))
  variables = method.encoder(params, state)["params"]
  assert set(params["encoder"]) - set(variables) == {"mask_token"}
  assert all(variables[name] is x for name, x in state.teacher_params["encoder"].items() if name != "mask_token")


def test_pictures_colour_the_teachers_patches_by_their_principal_components():
  constant = optax.constant_schedule(0.07)
  settings = dict(teacher_temperature=constant, teacher_momentum=constant_momentum(0.9))
  method = dinov2.dinov2(Pixels(), heads.DINOHead(1, 8, 4, 6), **settings)
  x = np.random.default_rng(0).normal(size=(3, 4, 6, 3)).astype(np.float32)  # not square
  state = dinov2.DINOv2State({"encoder": {"mask_token": jnp.zeros((1, 12))}}, {})
  original, colors = jax.jit(method.pictures)({}, state, x, None)
  np.testing.assert_array_equal(original, x)
  assert colors.shape == x.shape and colors.dtype == jnp.uint8
  patches = rearrange(x, "b (h p) (w q) c -> (b h w) (p q c)", p=2, q=2)
  left, values, _ = np.linalg.svd(patches - patches.mean(0), full_matrices=False)
  shown = rearrange(np.asarray(colors, float), "b (h p) (w q) c -> (b h w) (p q) c", p=2, q=2)
  assert np.all(shown == shown[:, :1])
  for i in range(3):
    scores, got = left[:, i] * values[i], shown[:, 0, i]
    assert got.min() == 0 and got.max() == 255
    assert abs(np.corrcoef(scores, got)[0, 1]) > 0.9999


def test_the_official_recipe_starts_as_the_official_network():
  config = recipe(by_name("dinov2_imagenet"))
  config.encoder = dict(name="vit", dim=48, depth=1, heads=3, patch_size=4, registers=4, layer_scale=1e-5)
  config.method.head.update(hidden=32, bottleneck=16, prototypes=24)
  config.views = ({**config.views[0], "size": 16}, {**config.views[1], "size": 16})
  method, _ = build.method_of(config, 8, 4, axis_name=None)
  params, state = jax.jit(method.init)(ONE, (jnp.zeros((2, 1, 16, 16, 3)),))
  assert config.dtype == "bfloat16"
  _, aux = jax.eval_shape(method.loss, params, state, (jnp.zeros((2, 8, 16, 16, 3)),), KEYS, 0)
  assert aux.monitored.embedding.dtype == jnp.float32  # what KoLeo takes
  jax.tree.map(np.testing.assert_array_equal, params, state.teacher_params)
  assert sorted(state.centers) == ["cls", "patch"] and not any(map(np.any, state.centers.values()))
  flat = flatten_dict(params, sep="/")
  for name, std in {
    "cls_token": 1e-6,
    "register_tokens": 1e-6,
    "pos_embed": 0.02,
    "blocks_0/mlp/fc1/kernel": 0.02,
  }.items():
    x = flat.pop(f"encoder/{name}")
    assert np.std(x) == pytest.approx(std, rel=5 / (2 * x.size) ** 0.5), name
  for name, value in {"mask_token": 0, "blocks_0/ls1/gamma": 1e-5, "blocks_0/ls2/gamma": 1e-5}.items():
    np.testing.assert_array_equal(flat.pop(f"encoder/{name}"), np.float32(value), err_msg=name)
  np.testing.assert_array_equal(flat["head/last_layer/weight_g"], 1)
  bound = 1 / np.sqrt(48)  # PyTorch's default for 4 x 4 pixels of 3 channels
  for name in ("kernel", "bias"):
    assert 0.9 * bound < np.max(np.abs(flat[f"encoder/patch_embed/proj/{name}"])) <= bound, name


@pytest.mark.parametrize("sizes", [(16,), (16, 8), (16, 16, 16), (16, 16, 8, 4)])
def test_views_that_are_not_two_global_and_local_ones_are_refused(sizes):
  config = recipe(by_name("dinov2_quickstart"))
  config.views = tuple(dict(size=size) for size in sizes)
  with pytest.raises(UserError, match=r"dinov2 takes two global views of one size and local views of another"):
    build.method_of(config, 8, 4)
