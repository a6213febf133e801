r"""Which tokens bring a prompt nearer to unwanted concepts: the leave-one-out test, per text encoder.

.. math:: d_i = \lVert (I - P_C)\, p_{\setminus i} \rVert, \qquad
    m_i = \mathbf 1\Bigl[d_i > (1 + \alpha) \operatorname*{mean}_{j \ne i} d_j\Bigr]
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerclear.errors import InvalidInput
from steerclear.prompts.encoders import Encoded, Encoder, Tokens
from steerclear.prompts.subspace import basis, outside


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Concepts:
    """The subspaces of unwanted concepts in one encoder's spaces.

    Args:
        states: Basis in the space of its states, ``(width, rank)``.
        pooled: Likewise in the space of its pooled vector, or ``None``.
    """

    states: Tensor
    pooled: Tensor | None

    @classmethod
    def of(cls, encoder: Encoder, texts: Sequence[str], rcond: float) -> "Concepts":
        """The spans of the encodings of ``texts``.

        Raises:
            InvalidInput: If they are not finite.
        """
        tokens = [encoder.tokens(text) for text in texts]
        made = encoder.encode(torch.stack([each.ids for each in tokens]))
        states = torch.cat([encoder.summary(made.states[i : i + 1], each) for i, each in enumerate(tokens)])
        pooled = None if made.pooled is None else _span(encoder, made.pooled, rcond)
        return cls(states=_span(encoder, states, rcond), pooled=pooled)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LeaveOneOut:
    r"""One prompt before one encoder.

    Args:
        encoder: Who reads.
        text: What.
        tokens: As it reads it.
        own: What it makes of the text.
        distances: :math:`d_i` per content token, float64.
        prompt: Basis of the span of all :math:`p_{\setminus i}`, ``(width, rank)``.
        concepts: The unwanted subspaces.
    """

    encoder: Encoder
    text: str
    tokens: Tokens
    own: Encoded
    distances: Tensor
    prompt: Tensor
    concepts: Concepts

    @classmethod
    def of(cls, encoder: Encoder, text: str, concepts: Concepts, rcond: float) -> "LeaveOneOut":
        """Encodes the text, and once more for every token of it.

        Raises:
            InvalidInput: If the encoder returns NaN or infinity, or the concepts leave nothing.
        """
        tokens = encoder.tokens(text)
        masked = torch.zeros(0, len(concepts.states), dtype=torch.float64)
        if tokens.content:
            masked = encoder.summary(encoder.encode(encoder.without(tokens)).states, tokens, masked=True)
        _check_finite(encoder, masked)
        distances = outside(masked, concepts.states).norm(dim=1)
        if len(masked) > 1 and bool((distances <= rcond * masked.norm(dim=1)).all()):
            raise InvalidInput(
                f"SAFREE: expected concepts that leave room for other things, but in {encoder.name} they span all that "
                f"a prompt can say ({concepts.states.shape[1]} of {len(concepts.states)} dimensions); use fewer, or a "
                "larger rcond"
            )
        return cls(
            encoder=encoder,
            text=text,
            tokens=tokens,
            own=encoder.encode(tokens.ids[None]),
            distances=distances,
            prompt=basis(masked, rcond),
            concepts=concepts,
        )


def flags(distances: Tensor, alpha: float) -> tuple[bool, ...]:
    r""":math:`m_i`; a token that is alone has no others to be compared with, and is not flagged."""
    count = len(distances)
    if count < 2:
        return (False,) * count
    others = (distances.sum() - distances) / (count - 1)
    return tuple((distances > (1.0 + alpha) * others).tolist())


def shared(tests: Sequence[LeaveOneOut], flagged: Sequence[tuple[bool, ...]]) -> list[tuple[bool, ...]]:
    """The flags of several encoders joined: a word of which one flags a token is flagged in all of them.

    Encoders that read different texts keep their own. Where words cannot be told apart, the whole prompt is one.
    """
    if len(tests) < 2 or len({test.text for test in tests}) > 1:
        return list(flagged)
    words = [test.encoder.words(test.text, test.tokens) for test in tests]
    if any(its is None for its in words):
        words = [(0,) * len(test.tokens.content) for test in tests]
    pairs = [pair for its, flag in zip(words, flagged, strict=True) for pair in zip(its or (), flag, strict=True)]
    hit = {word for word, on in pairs if on}
    return [tuple(word in hit for word in its or ()) for its in words]


def _span(encoder: Encoder, vectors: Tensor, rcond: float) -> Tensor:
    _check_finite(encoder, vectors)
    return basis(vectors, rcond)


def _check_finite(encoder: Encoder, vectors: Tensor) -> None:
    if not bool(vectors.isfinite().all()):
        raise InvalidInput(
            f"SAFREE: expected finite states of {encoder.name}, got NaN or infinity; load it in bfloat16 or float32"
        )
