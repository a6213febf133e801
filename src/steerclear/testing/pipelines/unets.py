"""Tiny pipelines whose denoiser is a UNet: Stable Diffusion 1.x, SDXL (classic and modular), and pixel-space DDPM."""

from typing import Any

from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.modular_pipelines import StableDiffusionXLAutoBlocks

from steerclear.testing.pipelines.text import WIDTH, clip_text, clip_tokenizer

# As dictionaries, because diffusers annotates tuples of any length as tuples of one.
_AUTOENCODER: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}
_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
_SDXL_UNET: dict[str, Any] = {
    **_UNET,
    "cross_attention_dim": 2 * WIDTH,
    "attention_head_dim": (2, 4),
    "transformer_layers_per_block": (1, 1),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + WIDTH,
}
_BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def autoencoder(channels: int = 4, **config: Any) -> AutoencoderKL:  # noqa: ANN401 - passed on to diffusers
    """A KL autoencoder that halves height and width; ``config`` sets the normalisation of its latents."""
    return AutoencoderKL(latent_channels=channels, **_AUTOENCODER, **config).eval()


def sd() -> StableDiffusionPipeline:
    """Stable Diffusion 1.x: DDIM, batched classifier-free guidance with the unconditional half first."""
    parts: dict[str, Any] = {
        "vae": autoencoder(),
        "text_encoder": clip_text(),
        "tokenizer": clip_tokenizer(),
        "unet": UNet2DConditionModel(cross_attention_dim=WIDTH, attention_head_dim=2, **_UNET).eval(),
        "scheduler": DDIMScheduler(clip_sample=False, **_BETAS),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(**parts, requires_safety_checker=False)


def sdxl_parts() -> dict[str, Any]:
    """The components that classic and modular SDXL share."""
    return {
        "vae": autoencoder(scaling_factor=0.13025),
        "text_encoder": clip_text(),
        "text_encoder_2": clip_text(projection=True),
        "tokenizer": clip_tokenizer(),
        "tokenizer_2": clip_tokenizer(),
        "unet": UNet2DConditionModel(**_SDXL_UNET).eval(),
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", **_BETAS),
    }


def sdxl() -> StableDiffusionXLPipeline:
    """SDXL: Euler, two text encoders, batched guidance."""
    return StableDiffusionXLPipeline(**sdxl_parts(), add_watermarker=False)


def modular_sdxl() -> Any:  # noqa: ANN401 - diffusers' modular pipelines are untyped
    """SDXL as a modular pipeline: a guider combines the branches, one network call each."""
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(**sdxl_parts())
    return pipe


def pixels() -> UNet2DModel:
    """A UNet on 8×8 colour images."""
    return UNet2DModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    ).eval()


def ddpm() -> DDPMPipeline:
    """Pixel-space DDPM: no autoencoder, clipping on, stochastic."""
    return DDPMPipeline(unet=pixels(), scheduler=DDPMScheduler())


def ddim() -> DDIMPipeline:
    """Pixel-space DDIM, which builds its own scheduler when constructed."""
    return DDIMPipeline(unet=pixels(), scheduler=DDIMScheduler())
