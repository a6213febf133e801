"""Tiny pipelines whose denoiser is a transformer: SD3, Flux, DiT, PixArt, and Wan for video."""

from diffusers import (
    AutoencoderKLWan,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)

from steerclear.testing.pipelines.text import WIDTH, clip_text, clip_tokenizer, t5_text, t5_tokenizer
from steerclear.testing.pipelines.unets import autoencoder


def sd3() -> StableDiffusion3Pipeline:
    """SD3: rectified flow, shifted and scaled latents, batched guidance."""
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * WIDTH,
        out_channels=4,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip_text(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5_text(),
        tokenizer_3=t5_tokenizer(),  # pyright: ignore[reportArgumentType] - the fast class is an alias at run time
    )


def flux() -> FluxPipeline:
    """Flux: packed latents, a schedule shifted by image size, separate calls for true guidance."""
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    return FluxPipeline(
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=autoencoder(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=clip_text(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5_text(),
        tokenizer_2=t5_tokenizer(),  # pyright: ignore[reportArgumentType] - the fast class is an alias at run time
    )


def dit() -> DiTPipeline:
    """DiT: class labels, learned variance, guidance batched with the conditional half first and kept doubled."""
    transformer = DiTTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        attention_bias=True,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
        norm_elementwise_affine=False,
    )
    scheduler = DDIMScheduler(clip_sample=False)
    return DiTPipeline(transformer=transformer.eval(), vae=autoencoder(), scheduler=scheduler)  # pyright: ignore[reportArgumentType] - any scheduler of the Karras family


def pixart() -> PixArtAlphaPipeline:
    """PixArt-alpha: DPM-Solver++ 2M, learned variance dropped by the pipeline, batched guidance."""
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=WIDTH,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        norm_type="ada_norm_single",
        use_additional_conditions=False,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5_text(),
        vae=autoencoder(),
        transformer=transformer.eval(),
        scheduler=DPMSolverMultistepScheduler(),
    )


def video() -> WanPipeline:
    """Wan: latents with a frame axis and per-channel mean and deviation, separate calls for guidance."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=1,
        cross_attn_norm=True,
        rope_max_seq_len=32,
    )
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[-0.76, -0.71, 0.15, 0.11],
        latents_std=[2.82, 1.45, 2.33, 2.61],
    )
    return WanPipeline(
        tokenizer=t5_tokenizer(),  # pyright: ignore[reportArgumentType] - annotated as the factory class
        text_encoder=t5_text(multilingual=True),
        vae=vae.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        transformer=transformer.eval(),
    )
