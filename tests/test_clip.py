"""CLIP as evidence: preparation against transformers' own, scores against NumPy, decoders, and the shipped one."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import steerclear
from steerclear import zoo
from steerclear.attach import Clip, ClipScore, Preparation, decoder_of, encoder_of, sfw
from steerclear.errors import InvalidInput
from steerclear.testing.pipelines import tiny_call, tiny_pipeline
from steerclear.zoo.clip import SETTINGS, load_clip

SHIPPED = pytest.mark.skipif(not (zoo.models.ROOT / "emoji-clip").is_dir(), reason="emoji-clip is not there")


def tiny_clip(tokenizer: Any, size: int = 16) -> Clip:
    """A CLIPModel with random weights on pictures of 16×16."""
    width = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {**width, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**width, "image_size": size, "patch_size": 4}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    return Clip(
        model=model, tokenizer=tokenizer, prepare=Preparation(size=size, crop=None, mean=(0.5,) * 3, std=(0.5,) * 3)
    )


def photograph(h: int, w: int, seed: int = 0) -> np.ndarray:
    """Smooth colours and some grain, as bytes."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((w, h), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(coarse, dtype=int) + rng.integers(-20, 20, (h, w, 3)), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("resample", [2, 3])
@pytest.mark.parametrize(("h", "w"), [(64, 64), (224, 224), (300, 240), (240, 333), (512, 512)])
def test_the_preparation_is_that_of_transformers(h: int, w: int, resample: int) -> None:
    """transformers resizes bytes, rounded and clipped after the rows and again after the columns: a few steps of 1/255
    where the filter overshoots, half a step on average."""
    processor = CLIPImageProcessorPil(resample=resample)
    picture = photograph(h, w)
    theirs = processor(images=[picture], return_tensors="pt")["pixel_values"]
    ours = Preparation.of(processor)(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    assert ours.shape == theirs.shape
    step = 1 / 255 / min(processor.image_std)
    assert float((ours - theirs).abs().max()) <= 4 * step
    assert float((ours - theirs).abs().mean()) <= 0.5 * step


@pytest.mark.parametrize(
    "settings",
    [
        {"size": {"height": 48, "width": 48}, "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        {"do_resize": False, "crop_size": {"height": 32, "width": 40}},
        {"do_resize": False, "crop_size": {"height": 90, "width": 80}},
    ],
    ids=["stretched", "cropped", "padded"],
)
def test_other_preparations(settings: dict[str, Any]) -> None:
    processor = CLIPImageProcessorPil(**settings)
    picture = photograph(64, 64)
    theirs = processor(images=[picture], return_tensors="pt")["pixel_values"]
    ours = Preparation.of(processor.to_dict())(torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255)
    step = 1 / 255 / min(processor.image_std)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=4 * step)


def test_a_processor_that_does_something_else_is_refused() -> None:
    with pytest.raises(InvalidInput, match="resample=0"):
        Preparation.of(CLIPImageProcessorPil(resample=0))


def test_cosines_are_those_of_the_model_itself() -> None:
    pipe = tiny_pipeline("sd")
    clip = tiny_clip(pipe.tokenizer)
    pictures = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    tokens = pipe.tokenizer(["a cat", "a very red dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = clip.model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=(pictures - 0.5) / 0.5
        )
    score = ClipScore(clip=clip, concepts=("a cat", "a very red dog"))
    with torch.no_grad():
        got = score(pictures)
    wanted = out.logits_per_image / clip.model.logit_scale.exp()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert score.columns == 2


@pytest.mark.parametrize("k", [1, 3, 8])
def test_matching_against_numpy(k: int) -> None:
    """The softmax with the model's logit scale, summed over the concepts, in float64."""
    pipe = tiny_pipeline("sd")
    clip = tiny_clip(pipe.tokenizer)
    concepts = tuple(f"{word} thing" for word in ["red", "big", "old", "new", "wet", "dry", "odd", "raw"][:k])
    pictures = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        v = clip.pictures(pictures).double().numpy()
        t = clip.texts([*concepts, "A safe picture"]).double().numpy()
        scale = np.exp(float(clip.model.logit_scale.detach()))
        e = np.exp(scale * (v @ t.T) - (scale * (v @ t.T)).max(1, keepdims=True))
        wanted = e[:, :-1].sum(1) / e.sum(1)
        score = ClipScore(clip=clip, concepts=concepts, mode="matching")
        assert score.columns == 1
        np.testing.assert_allclose(score(pictures)[:, 0].numpy(), wanted, rtol=1e-4, atol=1e-6)


def test_scores_of_one_picture_do_not_depend_on_the_others() -> None:
    clip = tiny_clip(tiny_pipeline("sd").tokenizer)
    score = ClipScore(clip=clip, concepts=("a cat",))
    x = torch.rand(3, 3, 16, 16)
    y = x.clone()
    y[1] = 0
    with torch.no_grad():
        assert torch.equal(score(x)[[0, 2]], score(y)[[0, 2]])


def test_gradients_reach_the_pixels_and_pass_the_clipping() -> None:
    clip = tiny_clip(tiny_pipeline("sd").tokenizer)
    pictures = torch.rand(2, 3, 24, 24).requires_grad_()
    (slope,) = torch.autograd.grad(ClipScore(clip=clip, concepts=("a cat",))(pictures).sum(), pictures)
    assert slope.isfinite().all()
    assert (slope != 0).flatten(1).any(1).all()
    pipe = tiny_pipeline("ddpm")
    x = torch.full((1, *decoder_of(pipe).shape), 3.0).requires_grad_()
    y = decoder_of(pipe)(x)
    assert float(y.detach().max()) == 1.0
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(slope, torch.full_like(x, 0.5))


def test_what_scores_and_clips_refuse() -> None:
    clip = tiny_clip(tiny_pipeline("sd").tokenizer)
    for concepts in ((), ("",), ("a cat", " ")):
        with pytest.raises(InvalidInput, match="at least one concept"):
            ClipScore(clip=clip, concepts=concepts)
    with pytest.raises(InvalidInput, match="cosine, matching"):
        ClipScore(clip=clip, concepts=("a cat",), mode="align")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="expected pictures"):
        clip.pictures(torch.zeros(2, 1, 16, 16))


# -- decoders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux", "dit", "ddpm"])
def test_the_decoder_is_the_encoders_and_has_a_slope(kind: str) -> None:
    pipe = tiny_pipeline(kind)
    call = tiny_call(kind)
    size = {name: call[name] for name in ("height", "width") if name in call}
    decode, encoder = decoder_of(pipe, **size), encoder_of(pipe, **size)
    x = torch.randn(2, *encoder.space.shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = decode(x)
    torch.testing.assert_close(y.detach(), encoder.decode(x.detach()), rtol=0, atol=1e-6)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert (slope != 0).flatten(1).any(1).all()
    with pytest.raises(InvalidInput, match="height="):
        decode(torch.zeros(1, *encoder.space.shape, 2))


def tiny_autoencoder(channels: int = 4) -> AutoencoderTiny:
    """Halves height and width, as the tiny pipelines' autoencoder does."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoencoderTiny(
            latent_channels=channels, encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
        ).eval()  # fmt: skip


def test_a_tiny_decoder_takes_the_scaled_latents() -> None:
    pipe, tiny = tiny_pipeline("sd"), tiny_autoencoder()
    decode = decoder_of(pipe, tiny=tiny)
    x = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        wanted = (tiny.decode(x).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(decode(x).detach(), wanted)
    guard = sfw(pipe, tiny_clip(pipe.tokenizer), "a cat", tiny=tiny, threshold=-1.0)
    with steerclear.attach(pipe, guard, coupling="sample") as trace:
        pipe(**tiny_call("sd"))
    assert len(trace.calls[0].steps) == 3


def test_a_tiny_decoder_of_other_latents_is_refused() -> None:
    with pytest.raises(InvalidInput, match="16 channels"):
        decoder_of(tiny_pipeline("sd"), tiny=tiny_autoencoder(16))
    with pytest.raises(InvalidInput, match="no autoencoder"):
        decoder_of(tiny_pipeline("ddpm"), tiny=tiny_autoencoder())


def test_a_half_precision_autoencoder_that_overflows_is_copied_in_float32() -> None:
    pipe = tiny_pipeline("sdxl")
    decode = decoder_of(pipe)
    x = torch.randn(1, 4, 8, 8)
    wanted = decode(x).detach()
    pipe.vae.to(torch.float16)
    half = decoder_of(pipe)
    assert half.vae.dtype == torch.float32
    assert pipe.vae.dtype == torch.float16
    torch.testing.assert_close(half(x).detach(), wanted, rtol=0, atol=0.02)


# -- whole ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cosine", "matching"])
def test_the_guard_lowers_the_score_of_a_tiny_pipeline(mode: str) -> None:
    pipe = tiny_pipeline("sd")
    clip = tiny_clip(pipe.tokenizer)
    call = {**tiny_call("sd"), "output_type": "pt"}
    score = ClipScore(clip=clip, concepts=("a cat", "a dog"), mode=mode)  # type: ignore[arg-type]
    plain = pipe(**call).images
    with torch.no_grad():
        if mode == "cosine" and float(score(plain).max()) <= 0:
            clip = flipped(clip)
            score = ClipScore(clip=clip, concepts=("a cat", "a dog"))
    guard = sfw(pipe, clip, ("a cat", "a dog"), mode=mode, threshold=0.0, strength=2.0)  # type: ignore[arg-type]
    call["generator"] = torch.Generator().manual_seed(0)
    with steerclear.attach(pipe, guard, coupling="sample"):
        guarded = pipe(**call).images
    with torch.no_grad():
        assert float(score(guarded).max()) < float(score(plain).max())


def flipped(clip: Clip) -> Clip:
    """The same with the sign of all cosines changed."""
    with torch.no_grad():
        clip.model.visual_projection.weight.neg_()
    return clip


def test_a_saved_clip_comes_back(tmp_path: Path) -> None:
    pipe = tiny_pipeline("sd")
    clip = tiny_clip(pipe.tokenizer)
    clip.model.save_pretrained(tmp_path)
    with pytest.raises(InvalidInput, match=r"preprocessor_config\.json"):
        load_clip(tmp_path)
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": 16}, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=pipe.tokenizer,
    )
    processor.save_pretrained(tmp_path)
    again = load_clip(tmp_path)
    x = torch.rand(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again.pictures(x), clip.pictures(x))
        torch.testing.assert_close(again.texts(["a cat"]), clip.texts(["a cat"]))
        same = Clip.of(again.model, processor)
        assert torch.equal(same.pictures(x), clip.pictures(x))


def test_what_load_clip_refuses(tmp_path: Path) -> None:
    for setting in ("trust_remote_code", "use_safetensors"):
        with pytest.raises(InvalidInput, match="foreign code"):
            load_clip("emoji-clip", **{setting: True})
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InvalidInput, match="'bert'"):
        load_clip(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(InvalidInput):
        load_clip(tmp_path)


@SHIPPED
def test_the_shipped_clip_is_small_and_knows_emoji() -> None:
    folder = zoo.models.ROOT / "emoji-clip"
    assert sum(file.stat().st_size for file in folder.rglob("*")) <= 7 * 2**20
    clip = load_clip()
    policy = zoo.joined(zoo.policies())
    pictures = encoder_of(zoo.load("emoji-sd")).decode(policy.safe.latents[::8])
    labels = policy.safe.labels[::8]
    names = sorted(set(policy.safe.labels))
    with torch.no_grad():
        ranks = (clip.pictures(pictures) @ clip.texts(names).T).argsort(1, descending=True)[:, :5]
    right = [label in [names[k] for k in row] for label, row in zip(labels, ranks.tolist(), strict=True)]
    assert np.mean(right) > 0.6


@SHIPPED
@pytest.mark.skipif(not SETTINGS.is_file(), reason="not calibrated")
def test_the_shipped_guard_end_to_end() -> None:
    pipe = zoo.load("emoji-sd")
    pipe.set_progress_bar_config(disable=True)
    guard = zoo.sfw(pipe, ["weapons", "alcohol"])
    assert guard.score.columns == 16
    call = {"num_inference_steps": 8, "guidance_scale": 3.0, "output_type": "np"}
    prompts = ["a bomb", "a cat face"]
    with steerclear.attach(pipe, guard, coupling="sample") as trace:
        guarded = pipe(prompts, generator=[torch.Generator().manual_seed(s) for s in (1, 2)], **call).images
    fired = torch.stack([record.fired for record in trace.calls[0].steps])
    assert np.isfinite(guarded).all()
    assert fired[:, 0].any()
    with pytest.raises(InvalidInput, match="at least one policy"):
        zoo.sfw(pipe, [])
