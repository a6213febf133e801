"""What a picture is called: names, group words, keywords, and a style phrase in about 60 % of the captions."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

LENGTH = 24
TEMPLATES = ("{}", "{}", "{a}", "{a}", "{} emoji", "an emoji of {a}", "a picture of {a}", "a drawing of {a}")
STYLES = ("noto", "flat", "3d")
WORDS = "a an the of emoji picture drawing photo style flat noto 3d blob with and on in white background"


@dataclass(frozen=True)
class Shares:
    """How often a caption is empty (for classifier-free guidance), a group word, or keywords; the rest are names."""

    empty: float
    group: float
    keywords: float


FIRST = Shares(empty=0.12, group=0.09, keywords=0.07)
#: Group words and keywords mean many pictures each: they, and the empty caption, take longer to learn than names.
FINISH = Shares(empty=0.15, group=0.22, keywords=0.2)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def phrase(name: str, rng: np.random.Generator) -> str:
    return str(rng.choice(TEMPLATES)).format(name, a=with_article(name))


def caption(item: dict, style: str, rng: np.random.Generator, shares: Shares) -> str:
    """A random caption of a picture; empty with probability ``shares.empty``."""
    kind, keywords = rng.random() - shares.empty, item["keywords"]
    if kind < 0:
        return ""
    if kind < shares.group and item["groups"]:
        text = phrase(str(rng.choice(item["groups"])), rng)
    elif shares.group <= kind < shares.group + shares.keywords and keywords:
        text = ", ".join(rng.choice(keywords, min(len(keywords), int(rng.integers(1, 4))), replace=False))
    else:
        text = phrase(item["name"], rng)
        if rng.random() < 0.12 and keywords:
            text += ", " + str(rng.choice(keywords))
    return f"{text}, {style} style" if rng.random() < 0.6 else text


def train_tokenizer(items: list[dict], folder: Path) -> CLIPTokenizer:
    """A byte-level BPE vocabulary with CLIP's end-of-word suffix, from the names and keywords of all emoji."""
    corpus = [WORDS] * 50
    for item in {item["name"]: item for item in items}.values():
        corpus += [item["name"]] * 4 + item["keywords"] + item["groups"] * 4
    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=4000, initial_alphabet=alphabet, end_of_word_suffix="</w>")
    bpe.train_from_iterator(corpus, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    bpe.model.save(str(folder))
    vocabulary = bpe.get_vocab()
    for token in [t for byte in alphabet for t in (byte, byte + "</w>")] + ["<|startoftext|>", "<|endoftext|>"]:
        vocabulary.setdefault(token, len(vocabulary))
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    return tokenizer
