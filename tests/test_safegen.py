"""SafeGen: the loss against its equations, what may change, going on after an interruption, files."""

import dataclasses

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st

from steerclear.errors import InvalidInput, NegationMismatch, SteerclearError, UnsupportedPipeline
from steerclear.finetune import (
    SafeGen,
    Triplets,
    apply,
    as_adapter,
    boxes,
    pixelate,
    save,
    train,
    training,
    whole_object,
)
from steerclear.finetune.network import Network, trainable
from steerclear.finetune.safegen import clean_target, squared_error
from steerclear.negation import NegationSet, encoder_of
from steerclear.noise import NoiseLevel
from steerclear.testing.pipelines import tiny_call, tiny_pipeline

FAST = {"steps": 3, "batch": 2, "accumulate": 2, "learning_rate": 1e-2}


def products(end=0.012):
    """Cumulative products of the schedule of Stable Diffusion 1.x, typed from its definition."""
    betas = np.linspace(0.00085**0.5, end**0.5, 1000) ** 2
    return np.cumprod(1 - betas)


def pictures(n, seed=0, size=16):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def triplets():
    pipe = tiny_pipeline("sd")
    return Triplets.of_pictures(
        pictures(3), pictures(5, 1), pipe, blocks=2, unsafe_captions=["a", "b", "c"], benign_captions=list("vwxyz")
    )


def drawn(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe(**{**tiny_call("sd"), "generator": torch.Generator().manual_seed(0)}).images


def weights(pipe):
    parts = (pipe.unet, pipe.vae, pipe.text_encoder)
    return {f"{i}.{name}": v.clone() for i, part in enumerate(parts) for name, v in part.state_dict().items()}


# -- the loss -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("target", ["published", "consistent"])
@pytest.mark.parametrize("error", ["epsilon", "output", "sample"])
def test_the_loss_is_the_equation(prediction, target, error):
    rng = np.random.default_rng(0)
    z_n, z_m, noise, out = (rng.standard_normal((4, 4, 2, 3)) for _ in range(4))
    abar = products()[[10, 354, 600, 999]].reshape(4, 1, 1, 1)
    a, s = np.sqrt(abar), np.sqrt(1 - abar)
    z_t = a * z_n + s * noise
    k = 1.0 if target == "published" else np.minimum(a / s, 5.0)
    target_eps = noise + k * (z_n - z_m)
    eps = out if prediction == "epsilon" else a * out + s * z_t
    z_0 = (z_t - s * target_eps) / a
    if error == "sample":
        expected = (((z_t - s * eps) / a - z_0) ** 2).mean((1, 2, 3))
    elif error == "epsilon" or prediction == "epsilon":
        expected = ((eps - target_eps) ** 2).mean((1, 2, 3))
    else:
        expected = ((out - (a * target_eps - s * z_0)) ** 2).mean((1, 2, 3))
    method = SafeGen(target=target, error=error)
    t = torch.from_numpy
    level = NoiseLevel(t(a), t(s))
    got = squared_error(method, t(out), clean_target(method, t(z_n), t(z_m), level), t(z_t), level, prediction)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-9)


def test_benign_pictures_keep_their_noise():
    rng = np.random.default_rng(1)
    z, noise, out = (torch.from_numpy(rng.standard_normal((3, 4, 2, 2))) for _ in range(3))
    level = NoiseLevel(torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64))
    got = squared_error(SafeGen(), out, z, level.add(z, noise), level, "epsilon")
    np.testing.assert_allclose(got.numpy(), ((out - noise) ** 2).mean((1, 2, 3)).numpy(), rtol=1e-9)


@pytest.mark.parametrize(("t", "share"), [(10, 0.10), (100, 0.34), (354, 1.0), (600, 2.3), (800, 5.1), (999, 14.6)])
def test_the_published_target_overshoots_where_there_is_much_noise(t, share):
    abar = torch.tensor(products()[t])
    level = NoiseLevel(abar.sqrt(), (1 - abar).sqrt())
    z_n, z_m = torch.zeros(1, 1, 1, 1, dtype=torch.float64), torch.ones(1, 1, 1, 1, dtype=torch.float64)
    moved = clean_target(SafeGen(), z_n, z_m, level).item()
    assert moved == pytest.approx(share, rel=0.03)  # the shares are rounded to two digits
    consistent = clean_target(SafeGen(target="consistent"), z_n, z_m, level).item()
    ratio = float(level.alpha / level.sigma)
    assert consistent == pytest.approx(min(1.0, 5.0 / ratio), rel=1e-9)


def test_the_loop_trains_on_the_loss_of_the_equations(triplets):
    """One call, from the network's own output: x_t, shared noise and timestep, empty prompt, weights."""
    pipe = tiny_pipeline("sd")
    method = SafeGen(batch=3)
    network = Network.of(pipe)
    draw = training.draw(method, triplets, 1000, 7)
    with torch.no_grad():
        got = training.losses_of(network, triplets, method, draw)
        empty = pipe.encode_prompt("", "cpu", 1, False)[0]
        abar = products()[draw.timesteps.numpy()].reshape(3, 1, 1, 1)
        a, s = np.sqrt(abar), np.sqrt(1 - abar)
        z_n, z_m = (x[draw.pairs].double().numpy() for x in (triplets.unsafe, triplets.mosaic))
        z_b = triplets.benign[draw.benign].double().numpy()
        e, e_b = draw.epsilon.double().numpy(), draw.epsilon_benign.double().numpy()
        for result, z, noise, wanted in ((got[0], z_n, e, e + z_n - z_m), (got[1], z_b, e_b, e_b)):
            x_t = torch.from_numpy(a * z + s * noise).float()
            out = pipe.unet(x_t, draw.timesteps, encoder_hidden_states=empty.expand(3, -1, -1)).sample.double().numpy()
            expected = ((out - wanted) ** 2).mean((1, 2, 3))
            np.testing.assert_allclose(result.numpy(), expected, rtol=1e-4)


@pytest.mark.parametrize("form", ["lora", "full"])
def test_kept_pictures_are_what_the_untrained_network_makes_of_them(form, triplets):
    """Nothing to learn at the start; after training the error is the distance to another, untrained pipeline."""
    method = SafeGen(form=form, rank=2, keep="network", **{**FAST, "batch": 3})
    pipe, before = tiny_pipeline("sd"), tiny_pipeline("sd")
    network = Network.of(pipe)
    state = training._State.start(network, method)
    draw = training.draw(method, triplets, 1000, 3)
    assert training.losses_of(network, triplets, method, draw, state.untrained)[1].max() < 1e-10
    for step in range(3):
        training._step(network, triplets, method, state, step)
    with torch.no_grad():
        got = training.losses_of(network, triplets, method, draw, state.untrained)[1]
        level = network.level(draw.timesteps, draw.epsilon)
        x_t = level.add(triplets.benign[draw.benign], draw.epsilon_benign)
        empty = pipe.encode_prompt("", "cpu", 1, False)[0].expand(3, -1, -1)
        now, then = (each.unet(x_t, draw.timesteps, encoder_hidden_states=empty).sample for each in (pipe, before))
    assert got.min() > 0
    torch.testing.assert_close(got, (now - then).square().mean((1, 2, 3)), rtol=1e-3, atol=1e-7)


def test_a_begun_mosaic_stays_one(triplets):
    """At ``begun=1`` the noisy picture is the mosaic's, and the noise is all that is wanted of it."""
    pipe = tiny_pipeline("sd")
    method, network = SafeGen(batch=3, begun=1.0), Network.of(pipe)
    draw = training.draw(method, triplets, 1000, 7)
    assert draw.begun.all()
    with torch.no_grad():
        got = training.losses_of(network, triplets, method, draw)[0]
        x_t = network.level(draw.timesteps, draw.epsilon).add(triplets.mosaic[draw.pairs], draw.epsilon)
        empty = pipe.encode_prompt("", "cpu", 1, False)[0].expand(3, -1, -1)
        out = pipe.unet(x_t, draw.timesteps, encoder_hidden_states=empty).sample
    torch.testing.assert_close(got, (out - draw.epsilon).square().mean((1, 2, 3)), rtol=1e-4, atol=1e-6)


def test_some_pairs_are_begun(triplets):
    method = SafeGen(batch=64, begun=0.25)
    share = torch.cat([training.draw(method, triplets, 1000, call).begun for call in range(20)]).float().mean()
    assert 0.2 < share < 0.3


def test_captions_are_another_condition(triplets):
    pipe = tiny_pipeline("sd")
    network = Network.of(pipe, ("", "a", "v"))
    x, t = torch.zeros(2, 4, 8, 8), torch.tensor([5, 5])
    with torch.no_grad():
        both = network(x, t, ["", "a"])
        own = pipe.unet(x[:1], t[:1], encoder_hidden_states=pipe.encode_prompt("a", "cpu", 1, False)[0]).sample
    torch.testing.assert_close(both[1:], own)
    assert not torch.equal(both[0], both[1])


def test_sdxl_has_all_its_conditions():
    pipe = tiny_pipeline("sdxl")
    made = Triplets.of_pictures(pictures(2), pictures(2, 1), pipe, blocks=2)
    trained = train(pipe, made, SafeGen(form="full", **FAST), progress=False)
    assert len(trained.losses) == 3


# -- the loop -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["lora", "full"])
def test_zero_steps_change_nothing(form, triplets):
    pipe = tiny_pipeline("sd")
    before = drawn(pipe)
    assert train(pipe, triplets, SafeGen(form=form, steps=0), progress=False).losses == ()
    np.testing.assert_array_equal(drawn(pipe), before)


def test_only_self_attention_changes(triplets):
    pipe = tiny_pipeline("sd")
    before = weights(pipe)
    train(pipe, triplets, SafeGen(form="full", **FAST), progress=False)
    changed = {name for name, value in weights(pipe).items() if not torch.equal(value, before[name])}
    expected = {name for name in before if ".attn1." in name and name.startswith("0.")}
    assert expected
    assert changed == expected


def test_an_adapter_leaves_every_weight_alone(triplets):
    pipe = tiny_pipeline("sd")
    before, picture = weights(pipe), drawn(pipe)
    train(pipe, triplets, SafeGen(form="lora", rank=2, **FAST), progress=False)
    after = weights(pipe)
    adapters = {name for name in after if "lora_" in name}
    assert all(".attn1." in name for name in adapters)
    kept = {name.replace(".base_layer", ""): value for name, value in after.items() if name not in adapters}
    assert kept.keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in kept.items())
    assert not np.array_equal(drawn(pipe), picture)
    pipe.unload_lora_weights()
    np.testing.assert_array_equal(drawn(pipe), picture)


@pytest.mark.parametrize("form", ["lora", "full"])
def test_going_on_equals_never_having_stopped(form, triplets, tmp_path):
    method = SafeGen(form=form, captions=0.5, **FAST)
    whole, parts = tiny_pipeline("sd"), tiny_pipeline("sd")
    once = train(whole, triplets, method, progress=False)
    file = tmp_path / "checkpoint.safetensors"
    train(parts, triplets, dataclasses.replace(method, steps=2), checkpoint=file, progress=False)
    parts = tiny_pipeline("sd")
    state = torch.get_rng_state()
    again = train(parts, triplets, method, checkpoint=file, every=1, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert again.losses == once.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True))


def test_a_training_can_be_cut_in_the_middle_of_its_schedule(triplets, tmp_path):
    """With a cooling learning rate, which fewer steps would change."""
    method = SafeGen(form="full", **{**FAST, "cool": 0.5})
    whole, parts = tiny_pipeline("sd"), tiny_pipeline("sd")
    once = train(whole, triplets, method, progress=False)
    file = tmp_path / "checkpoint.safetensors"
    cut = train(parts, triplets, method, checkpoint=file, until=2, progress=False)
    assert cut.losses == once.losses[:2]
    parts = tiny_pipeline("sd")
    assert train(parts, triplets, method, checkpoint=file, progress=False).losses == once.losses
    assert all(torch.equal(a, b) for a, b in zip(weights(whole).values(), weights(parts).values(), strict=True))
    with pytest.raises(InvalidInput, match="until"):
        train(parts, triplets, method, until=-1)


def test_seeds_matter(triplets):
    runs = [train(tiny_pipeline("sd"), triplets, SafeGen(seed=seed, **FAST), progress=False) for seed in (0, 0, 1)]
    assert runs[0].losses == runs[1].losses
    assert runs[0].losses != runs[2].losses


def test_the_average_is_that_of_diffusers():
    rng = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(5, generator=rng))
    state = training._State({"w": weight}, SafeGen(decay=0.5, learning_rate=0.1))
    reference = EMAModel([weight], decay=0.5)
    for step in range(15):
        weight.grad = torch.randn(5, generator=rng)
        state.update(step)
        reference.step([weight])
    torch.testing.assert_close(state.average["w"], reference.shadow_params[0])


def test_the_learning_rate_falls_to_zero_after_its_plateau():
    method = SafeGen(steps=10, cool=0.6, learning_rate=2.0)
    assert [method.rate(step) for step in range(10)] == pytest.approx([2.0] * 7 + [1.5, 1.0, 0.5])
    assert {SafeGen(learning_rate=2.0, steps=3).rate(step) for step in range(3)} == {2.0}


@given(st.integers(1, 7), st.integers(1, 5), st.integers(0, 40))
def test_every_row_comes_once_a_pass(rows, batch, start):
    first = -(-start // rows) * rows  # the next pass begins here
    seen = torch.cat(
        [training._shuffled(3, 1, rows, range(k, k + batch)) for k in range(first, first + rows * batch, batch)]
    )
    for each in seen.reshape(-1, rows):
        assert sorted(each.tolist()) == list(range(rows))


def test_timesteps_stay_in_their_window(triplets):
    method = SafeGen(batch=64, start=0.25, stop=0.75)
    steps = torch.cat([training.draw(method, triplets, 1000, call).timesteps for call in range(20)])
    assert (steps.min() >= 250) & (steps.max() < 750)
    assert (steps.min() < 260) & (steps.max() >= 740)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_learns_the_mosaic(prediction):
    """One picture and its mosaic: the loss of a draw that training has not seen goes down."""
    pipe = tiny_pipeline("sd")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=prediction)
    made = Triplets.of_pictures(pictures(1), pictures(1, 1), pipe, blocks=1, mirror=False)
    method = SafeGen(target="consistent", mosaic=1.0, benign=0.0, batch=4, accumulate=1, learning_rate=1e-2, steps=15)
    network = Network.of(pipe)
    unseen = training.draw(method, made, 1000, 1000)
    with torch.no_grad():
        before = training.losses_of(network, made, method, unseen)[0].mean()
    train(pipe, made, method, progress=False)
    with torch.no_grad():
        after = training.losses_of(network, made, method, unseen)[0].mean()
    assert after < before


# -- files ----------------------------------------------------------------------------------------------------------


def test_an_adapter_comes_back_through_diffusers(triplets, tmp_path):
    pipe = tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="lora", rank=2, **FAST), progress=False)
    save(pipe, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["pytorch_lora_weights.safetensors"]
    fresh = tiny_pipeline("sd")
    plain = drawn(fresh)
    fresh.load_lora_weights(str(tmp_path))
    np.testing.assert_array_equal(drawn(fresh), drawn(pipe))
    assert not np.array_equal(plain, drawn(fresh))
    other = apply(tiny_pipeline("sd"), tmp_path)
    np.testing.assert_array_equal(drawn(other), drawn(pipe))
    other.unload_lora_weights()
    np.testing.assert_array_equal(drawn(other), plain)


def test_a_half_precision_adapter_is_nearly_the_same(triplets, tmp_path):
    pipe = tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="lora", rank=2, **FAST), progress=False)
    save(pipe, tmp_path / "half", dtype=torch.float16)
    save(pipe, tmp_path / "full")
    sizes = [(tmp_path / name / "pytorch_lora_weights.safetensors").stat().st_size for name in ("half", "full")]
    assert sizes[0] < sizes[1]
    np.testing.assert_allclose(drawn(apply(tiny_pipeline("sd"), tmp_path / "half")), drawn(pipe), atol=2e-2)


def test_full_weights_become_the_nearest_adapter(triplets):
    pipe, base = tiny_pipeline("sd"), tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="full", **FAST), progress=False)
    for name, value in base.unet.state_dict().items():  # an adapter has no biases
        if ".attn1." in name and name.endswith("bias"):
            pipe.unet.state_dict()[name].copy_(value)
    as_adapter(pipe, base, 64)
    np.testing.assert_allclose(drawn(base), drawn(pipe), atol=1e-4)
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    before, coarse = tiny_pipeline("sd"), tiny_pipeline("sd")
    as_adapter(pipe, coarse, 2)
    layer = coarse.unet.get_submodule(name)
    got = (layer.lora_B["safegen"].weight @ layer.lora_A["safegen"].weight).detach().numpy()
    wanted = (pipe.unet.get_submodule(name).weight - before.unet.get_submodule(name).weight).detach().numpy()
    left, values, right = np.linalg.svd(wanted)
    np.testing.assert_allclose(got, left[:, :2] * values[:2] @ right[:2], atol=1e-6)


def test_full_weights_come_back_as_a_pipeline(triplets, tmp_path):
    import steerclear

    pipe = tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="full", **FAST), progress=False)
    save(pipe, tmp_path / "model")
    assert not list((tmp_path / "model").rglob("*.bin"))
    for fresh in (steerclear.load(tmp_path / "model"), DiffusionPipeline.from_pretrained(tmp_path / "model")):
        np.testing.assert_array_equal(drawn(fresh), drawn(pipe))


def test_adapters_of_nothing_and_of_another_model_are_refused(triplets, tmp_path):
    with pytest.raises(InvalidInput, match=r"found no pytorch_lora_weights"):
        apply(tiny_pipeline("sd"), tmp_path)
    pipe = tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="lora", steps=1), progress=False)
    save(pipe, tmp_path)
    other = tiny_pipeline("sd")
    other.unet = type(other.unet).from_config({**other.unet.config, "layers_per_block": 2})
    with pytest.raises(InvalidInput, match="expected an adapter of this"):
        apply(other, tmp_path)


def test_a_checkpoint_of_another_training_is_refused(triplets, tmp_path):
    file = tmp_path / "checkpoint.safetensors"
    train(tiny_pipeline("sd"), triplets, SafeGen(**FAST), checkpoint=file, progress=False)
    with pytest.raises(InvalidInput, match="other target"):
        train(tiny_pipeline("sd"), triplets, SafeGen(target="consistent", **FAST), checkpoint=file, progress=False)
    other = dataclasses.replace(triplets, benign=triplets.benign + 1)
    with pytest.raises(InvalidInput, match="other triplets"):
        train(tiny_pipeline("sd"), other, SafeGen(**FAST), checkpoint=file, progress=False)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(InvalidInput, match="damaged"):
        train(tiny_pipeline("sd"), triplets, SafeGen(**FAST), checkpoint=file, progress=False)


# -- data -----------------------------------------------------------------------------------------------------------


@given(st.integers(1, 20), st.integers(0, 9), st.integers(0, 9), st.integers(1, 12), st.integers(1, 12))
def test_pixelation_keeps_means_and_the_outside(blocks, left, top, width, height):
    image = pictures(1, size=24)[0].double()
    box = (left, top, left + width, top + height)
    hidden = pixelate(image, [box], blocks)
    inside = torch.zeros(24, 24, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    assert torch.equal(hidden[:, ~inside], image[:, ~inside])
    side = -(-max(width, height) // blocks)
    for y in range(top, top + height, side):
        for x in range(left, left + width, side):
            rows, columns = slice(y, min(y + side, top + height)), slice(x, min(x + side, left + width))
            part, expected = hidden[:, rows, columns], image[:, rows, columns].mean((1, 2))
            torch.testing.assert_close(part, expected.reshape(3, 1, 1).expand_as(part))


def test_the_object_is_what_differs_from_the_background():
    image = torch.full((3, 20, 30), 0.97)
    image[1, 4:9, 11:13] = 0.2
    assert whole_object(image) == [(11, 4, 13, 9)]
    assert whole_object(torch.ones(3, 4, 6)) == [(0, 0, 6, 4)]


def test_a_pair_is_mirrored_together():
    pipe = tiny_pipeline("sd")
    image = torch.ones(1, 3, 16, 16)
    image[:, :, 2:6, 1:5] = pictures(1, size=4)
    made = Triplets.of_pictures(image, image, pipe, blocks=2)
    decoded = encoder_of(pipe)
    hidden = pixelate(image[0], [(1, 2, 5, 6)], 2)
    torch.testing.assert_close(made.unsafe, decoded.encode(torch.cat([image, image.flip(3)])))
    torch.testing.assert_close(made.mosaic, decoded.encode(torch.stack([hidden, hidden.flip(2)])))


def test_sets_and_folders_become_triplets(tmp_path):
    from PIL import Image

    pipe = tiny_pipeline("sd")
    for name, seed in (("unsafe/knife", 0), ("benign/cat", 1)):
        (tmp_path / name).mkdir(parents=True)
        for i, image in enumerate(pictures(2, seed)):
            array = (image.permute(1, 2, 0).numpy() * 255).astype(np.uint8)
            Image.fromarray(array).save(tmp_path / name / f"{i}.png")
    made = Triplets.of_folder(tmp_path, pipe, blocks=2, mirror=False)
    assert (made.unsafe_captions, made.benign_captions) == (("knife",) * 2, ("cat",) * 2)
    sets = [NegationSet.encode(tmp_path / name, pipe, progress=False) for name in ("unsafe", "benign")]
    torch.testing.assert_close(made.benign, sets[1].latents)
    again = Triplets.of_sets(*sets, pipe, blocks=2)
    assert (len(again), len(again.benign), again.unsafe_captions) == (4, 2, ("knife",) * 4)
    torch.testing.assert_close(again.benign, sets[1].latents)
    encoder = encoder_of(pipe)
    torch.testing.assert_close(again.unsafe[:2], encoder.encode(encoder.decode(sets[0].latents)))


# -- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"target": "other"},
        {"form": "dora"},
        {"clip": 0.0},
        {"mosaic": -1.0},
        {"learning_rate": float("nan")},
        {"batch": 0},
        {"steps": 1.5},
        {"start": 0.5, "stop": 0.5},
        {"decay": 1.0},
        {"cool": 1.5},
        {"captions": -0.1},
    ],
)
def test_settings_are_valid_or_refused(wrong):
    with pytest.raises(InvalidInput, match="SafeGen: expected"):
        SafeGen(**wrong)


def test_what_cannot_be_trained_is_refused(triplets):
    for kind in ("sd3", "dit"):
        with pytest.raises(UnsupportedPipeline):
            Network.of(tiny_pipeline(kind))
    with pytest.raises(InvalidInput, match="float32"):
        trainable(tiny_pipeline("sd").unet.half(), SafeGen())
    pipe = tiny_pipeline("sd")
    train(pipe, triplets, SafeGen(form="lora", steps=0), progress=False)
    with pytest.raises(InvalidInput, match="without adapters"):
        train(pipe, triplets, SafeGen(form="lora", steps=0), progress=False)
    other = tiny_pipeline("sd")
    other.vae.encoder.conv_out.bias.data += 1.0
    with pytest.raises(NegationMismatch):
        train(other, triplets, SafeGen(**FAST), progress=False)


def test_other_samplers_of_the_same_schedule_train_the_same(triplets):
    """The schedule is what counts: Euler scales its samples, but the network was trained on the same x_t."""
    pipe = tiny_pipeline("sd")
    euler = tiny_pipeline("sd")
    euler.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config)
    losses = [train(each, triplets, SafeGen(**FAST), progress=False).losses for each in (pipe, euler)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def test_broken_boxes_and_empty_ones_are_errors():
    pipe = tiny_pipeline("sd")
    with pytest.raises(InvalidInput, match="expected a box in every unsafe picture"):
        Triplets.of_pictures(pictures(1), pictures(1), pipe, boxes=lambda image: [])
    with pytest.raises(SteerclearError, match="left < right"):
        Triplets.of_pictures(pictures(1), pictures(1), pipe, boxes=lambda image: [(5, 5, 5, 9)])
    with pytest.raises(InvalidInput, match="boxes: expected one of object, picture"):
        boxes.load("nothing-like-that")


def test_losses_that_blow_up_are_an_error(triplets):
    bad = dataclasses.replace(triplets, unsafe=triplets.unsafe * 1e30)
    with pytest.raises(InvalidInput, match="finite losses"):
        train(tiny_pipeline("sd"), bad, SafeGen(**FAST), progress=False)
