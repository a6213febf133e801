"""Tiny text encoders and their tokenizers, made in memory: every prompt tokenizes, nothing is downloaded."""

from typing import Any

from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

WIDTH = 32
PRINTABLE = tuple(chr(code) for code in range(33, 127))


def clip_tokenizer() -> CLIPTokenizer:
    """One token per character, with and without the end-of-word mark, as in the base of CLIP's own vocabulary."""
    pieces = [*PRINTABLE, *(letter + "</w>" for letter in PRINTABLE), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """One token per character, with T5's three special tokens first."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((letter, -3.0) for letter in PRINTABLE)]
    return T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=77)


def clip_text(*, projection: bool = False) -> Any:  # noqa: ANN401 - transformers' models are untyped
    """A CLIP text model of width 32, with or without the projection that SDXL and SD3 read."""
    size = 2 * len(PRINTABLE) + 2
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=WIDTH,
        intermediate_size=37,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=77,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
        hidden_act="gelu",
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def t5_text(*, multilingual: bool = False) -> Any:  # noqa: ANN401 - transformers' models are untyped
    """A T5 (or UMT5) encoder of width 32."""
    sizes: dict[str, Any] = {"vocab_size": len(PRINTABLE) + 4, "d_model": WIDTH, "d_kv": 8, "d_ff": 37}
    sizes |= {"num_layers": 1, "num_heads": 4}
    return UMT5EncoderModel(UMT5Config(**sizes)).eval() if multilingual else T5EncoderModel(T5Config(**sizes)).eval()
