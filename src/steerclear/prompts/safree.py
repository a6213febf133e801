r"""SAFREE: Training-Free and Adaptive Guard for Safe Text-to-Image and Video Generation (Yoon et al., ICLR 2025),
arXiv:2410.12761.

A prompt is made safe before it reaches the denoising network, in the space of its own text encoder. Concepts to avoid
are phrases; their embeddings span a subspace with projector :math:`P_C`. Each token :math:`i` of the prompt is masked
in turn, :math:`p_{\setminus i}` is the embedding of what is left, and

.. math:: d_i = \lVert (I - P_C)\, p_{\setminus i} \rVert, \qquad
    m_i = \mathbf 1\Bigl[d_i > (1 + \alpha) \operatorname*{mean}_{j \ne i} d_j\Bigr]

finds the tokens without which the prompt is unusually far from the concepts. Their rows of the prompt's embedding
:math:`e` are replaced, and only theirs:

.. math:: e'_i = m_i\, P_I (I - P_C)\, e_i + (1 - m_i)\, e_i \qquad \text{(paper)}, \qquad
    e'_i = m_i\, (I - P_C) P_I\, e_i + (1 - m_i)\, e_i \qquad \text{(code)}

:math:`P_I` projects on the span of all :math:`p_{\setminus i}`, so that what remains is still about this prompt. The
two orders differ, because the projectors do not commute: the paper's stays in the prompt's span and keeps a rest of the
concepts, the released code's has no rest of them and leaves the span.

The self-validating filter then decides for how long: from how much the projection would change the whole prompt,

.. math:: \beta = 1 - \operatorname{mean}_i \cos(e^{proj}_i, e_i), \qquad
    n = \operatorname{round}\bigl(u\, \sigma(2k(10\beta - t_0))\bigr)

and the safe embedding conditions the steps :math:`0 \dots n` of 50, the prompt's own one the rest.

Latent re-attention, the third part of the paper, is not here: see docs/safree.md.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.nn.functional import cosine_similarity

from steerclear.errors import InvalidInput, UnsoundCombination, UnsupportedPipeline
from steerclear.prompts.encoders import Encoder, check, embeddings, encoders_of, parameters
from steerclear.prompts.negative import NegativeText
from steerclear.prompts.subspace import inside, outside
from steerclear.prompts.switching import Switch, callback_of
from steerclear.prompts.token_test import Concepts, LeaveOneOut, flags, shared

REFERENCE_STEPS = 50
"""Steps of the sampler that the filter's :math:`n` counts; other lengths are scaled to it."""

NUDITY = (
    "Sexual Acts", "Content Meant to Arouse Sexual Excitement", "Nudity", "Pornography", "Erotic Art", "Lustful",
    "Seductive", "Orgasmic", "Libido", "Kinky", "Sexual Orientation", "Sexual Attraction", "Sexual Intercourse",
    "Sexual Pleasure", "Sexual Fantasy", "Carnal Desires", "Sexual Gratification",
)  # fmt: skip
"""The concepts of the published experiments on nudity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfValidatingFilter:
    r"""For how many steps the safe embedding is used.

    .. math:: n = \operatorname{round}\bigl(u\, \sigma(2k(10\beta - t_0))\bigr)

    A step function in all but name: from 0 to :math:`u` while :math:`\beta` grows by a tenth. The constants belong to
    the last hidden states of SD 1.4's text encoder; another encoder has another range of :math:`\beta`, which
    :meth:`SAFREE.examine` shows.

    Args:
        k: Steepness, > 0.
        t0: Ten times the :math:`\beta` at which half of ``up_t`` is reached.
        up_t: Largest :math:`n`, in steps of 50, >= 0.

    Raises:
        InvalidInput: For values outside these ranges.
    """

    k: float = 2.5
    t0: float = 5.333
    up_t: float = 10.0

    def __post_init__(self) -> None:
        if not (0.0 < self.k < math.inf and math.isfinite(self.t0) and 0.0 <= self.up_t < math.inf):
            raise InvalidInput(f"SelfValidatingFilter: expected k > 0, a finite t0 and up_t >= 0, got {self}")

    def steps(self, beta: float) -> int:
        r""":math:`n`; the safe embedding serves ``n + 1`` of 50 steps."""
        logit = 2.0 * self.k * (10.0 * beta - self.t0)
        return round(self.up_t * (1.0 + math.tanh(logit / 2.0)) / 2.0)


FILTERS = {"nudity": SelfValidatingFilter(), "artist": SelfValidatingFilter(k=3.5, t0=5.5)}
"""The published constants by category."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TokenTest:
    r"""What one encoder says about one prompt.

    Args:
        encoder: Name of the component.
        tokens: The prompt's, as the encoder reads them.
        distances: :math:`d_i`, ``(tokens,)``, float64, in the units of the encoder's states.
        flagged: :math:`m_i`; with several encoders also where another one flagged a token of the same word.
        beta: :math:`\beta`, NaN where the encoder has no rows in ``prompt_embeds``.
    """

    encoder: str
    tokens: tuple[str, ...]
    distances: Tensor
    flagged: tuple[bool, ...]
    beta: float


@dataclass(frozen=True, kw_only=True, eq=False)
class SAFREE:
    r"""Takes concepts out of the tokens of a prompt that bring them in; a prompt guard for ``attach(prompts=...)``.

    Args:
        concepts: Phrases to avoid, at least one.
        alpha: How far, relative to the others, a token must move the prompt towards the concepts to be flagged, >= 0;
            at infinity no token is.
        order: Which projector acts last: ``"paper"`` or ``"code"``, as above.
        filter: For how long the safe embedding is used; ``None`` for the whole trajectory.
        negative: Also pass the concepts, joined by commas, as the negative prompt, before the call's own one, as all
            published runs do; or this text, if they are more than the encoder reads. Another method; off by default.
        rcond: Directions of a subspace with less than this share of its largest singular value are left out.

    Call:
        pipe: A classic Stable Diffusion, SDXL, SD3 or FLUX pipeline.
        arguments: Of its call, by name. Any number of prompts, any ``num_images_per_prompt``.

    Returns:
        The arguments with embeddings in place of prompts, and a ``callback_on_step_end`` that calls the one that was
        given and goes back to the original embedding, each sample at its own step; the same arguments if no token of
        any prompt is flagged.

    Raises:
        InvalidInput: For values outside these ranges, prompts given as embeddings, concepts that span the whole space,
            or encoders that return NaN.
        UnsupportedPipeline: For another pipeline, or with a ``filter`` for one whose steps cannot be given another
            embedding or do not start at the beginning (image-to-image): use ``filter=None`` there.
        UnsoundCombination: For ``negative`` without classifier-free guidance, SD3's skipped layers with a ``filter``,
            or a callback that replaces the embedding.

    Cost:
        No network evaluation. Per distinct prompt and text encoder one encoding for each of its tokens, and per call
        one for each concept. The host waits for the device before the first step, and at the steps after which the
        embedding of some sample changes.

    Equal to:
        The unguarded pipeline, bit for bit, at ``alpha=inf`` and where no token is flagged: as in empty prompts, and in
        prompts of one token, which has no others to be compared with.

    Notes:
        With several encoders each is tested in its own space; a word that one of them flags is replaced in all. Pooled
        vectors :math:`v` of a prompt with a flagged token become :math:`(I - P_C) v`. The filter takes the largest
        :math:`\beta` among the encoders. FLUX cannot be given another pooled vector under way: it keeps the safe one.

    Example::

        with steerclear.attach(pipe, prompts=SAFREE(concepts=["a dagger", "a bomb"])):
            image = pipe("a knight with a dagger").images[0]
    """

    concepts: Sequence[str]
    alpha: float = 0.01
    order: Literal["paper", "code"] = "paper"
    filter: SelfValidatingFilter | None = FILTERS["nudity"]
    negative: bool | str = False
    rcond: float = 1e-4

    def __post_init__(self) -> None:
        concepts: Any = self.concepts
        if isinstance(concepts, str) or not all(isinstance(text, str) and text.strip() for text in concepts):
            raise InvalidInput(f"SAFREE: expected a list of phrases as concepts, got {concepts!r}")
        if not concepts:
            raise InvalidInput("SAFREE: expected at least one concept, got none; leave the guard out")
        if not self.alpha >= 0.0:
            raise InvalidInput(f"SAFREE: expected alpha >= 0, got {self.alpha}; inf flags nothing")
        if self.order not in ("paper", "code"):
            raise InvalidInput(f"SAFREE: expected order 'paper' or 'code', got {self.order!r}")
        if not 0.0 < self.rcond < 1.0:
            raise InvalidInput(f"SAFREE: expected 0 < rcond < 1, got {self.rcond}")
        object.__setattr__(self, "concepts", tuple(concepts))

    @classmethod
    def published(
        cls, concepts: Sequence[str] = NUDITY, *, category: Literal["nudity", "artist"] = "nudity", alpha: float = 0.01
    ) -> "SAFREE":
        """What the released runs on SD 1.4 do: the code's order, the filter, and the concepts as negative prompt.

        Args:
            concepts: Phrases to avoid.
            category: Whose constants of the filter.
            alpha: As above.
        """
        if category not in FILTERS:
            raise InvalidInput(f"SAFREE: expected a category of {', '.join(FILTERS)}, got {category!r}")
        return cls(concepts=concepts, alpha=alpha, order="code", filter=FILTERS[category], negative=True)

    def __call__(self, pipe: Any, arguments: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401 - any pipeline
        given = dict(arguments)
        if given.get("prompt_embeds") is not None:
            raise InvalidInput(
                "SAFREE: expected prompts as text, got prompt_embeds: which tokens they are made of cannot be seen. "
                "Pass prompt=, or use a guard that acts on the denoised estimate"
            )
        if given.get("prompt") is None:
            return given  # which the pipeline itself refuses
        if self.negative:
            given = self._with_negative(pipe, given)
        if math.isinf(self.alpha):
            return given
        encoders = encoders_of(pipe, given)
        names = self._switched(pipe, given)
        prompts = self._examined(encoders, given)
        if not any(prompt.flagged for prompt in prompts):
            return given
        return self._rewritten(pipe, given, prompts, names)

    def examine(self, pipe: Any, prompt: str, **arguments: Any) -> tuple[TokenTest, ...]:  # noqa: ANN401
        """What the token test says about ``prompt``, per text encoder, without drawing anything.

        Args:
            pipe: The pipeline.
            prompt: One prompt.
            arguments: Further arguments of the call that matter to encoding, such as ``prompt_2`` or ``clip_skip``.
        """
        given = {"prompt": prompt, **arguments}
        (found,) = self._examined(encoders_of(pipe, given), given)
        return tuple(share.summary() for share in found.shares)

    def _examined(self, encoders: tuple[Encoder, ...], given: Mapping[str, Any]) -> list["_Prompt"]:
        """Every prompt of the call, looked at alone; equal ones once."""
        concepts = [Concepts.of(encoder, self.concepts, self.rcond) for encoder in encoders]
        known: dict[tuple[str, ...], _Prompt] = {}
        rows = list(zip(*(_texts(given, encoder.argument) for encoder in encoders), strict=True))
        for row in dict.fromkeys(rows):
            parts = zip(encoders, row, concepts, strict=True)
            tests = [LeaveOneOut.of(encoder, text, spans, self.rcond) for encoder, text, spans in parts]
            found = shared(tests, [flags(test.distances, self.alpha) for test in tests])
            known[row] = _Prompt(tuple(_Share.of(test, f, self.order) for test, f in zip(tests, found, strict=True)))
        return [known[row] for row in rows]

    def _with_negative(self, pipe: Any, given: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        text = self.negative if isinstance(self.negative, str) else ", ".join(self.concepts)
        changed = NegativeText(text=text)(pipe, given)
        if not isinstance(given["prompt"], str) and isinstance(changed["negative_prompt"], str):
            changed["negative_prompt"] = [changed["negative_prompt"]] * len(given["prompt"])
        return changed

    def _switched(self, pipe: Any, given: Mapping[str, Any]) -> tuple[str, ...]:  # noqa: ANN401
        """Names of the embeddings that the sampling loop can replace between steps; none without a filter."""
        if self.filter is None:
            return ()
        known, taken = getattr(pipe, "_callback_tensor_inputs", ()), parameters(pipe)
        if "prompt_embeds" not in known or "callback_on_step_end" not in taken or "strength" in taken:
            why = "starts in the middle of the trajectory" if "strength" in taken else "cannot change its embedding"
            raise UnsupportedPipeline(
                f"SAFREE: expected a pipeline that draws from noise and takes another prompt_embeds between steps, got "
                f"{type(pipe).__name__}, which {why}; use SAFREE(filter=None), with the safe embedding at all steps"
            )
        if given.get("skip_guidance_layers") is not None:
            raise UnsoundCombination(
                "SAFREE: expected no skip_guidance_layers: they would go on guiding away from the safe embedding after "
                "the filter has gone back to the original one; leave them out, or use SAFREE(filter=None)"
            )
        return tuple(name for name in ("prompt_embeds", *_POOLED) if name in known)

    def _rewritten(
        self,
        pipe: Any,  # noqa: ANN401
        given: dict[str, Any],
        prompts: list["_Prompt"],
        names: tuple[str, ...],
    ) -> dict[str, Any]:
        plain, negative = embeddings(pipe, given)
        copies = len(plain["prompt_embeds"]) // len(prompts)
        safe = {name: tensor.clone() for name, tensor in plain.items()}
        for index, prompt in enumerate(prompts):
            prompt.write({name: rows[index * copies : (index + 1) * copies] for name, rows in safe.items()})
        replaced = {name: value for name, value in given.items() if name not in _TEXTS} | negative | safe
        if "num_images_per_prompt" in replaced:
            replaced["num_images_per_prompt"] = 1  # the embeddings have a row for every picture
        if self.filter is None:
            return replaced
        last = [prompt.last(self.filter) for prompt in prompts for _ in range(copies)]
        user, wanted = callback_of(given)
        switch = Switch(
            first=_in_loop(safe, names),
            then=_in_loop(plain, names),
            uses_first=lambda step, total: [REFERENCE_STEPS * step <= n * total for n in last],
            user=user,
            wanted=wanted,
        )
        return replaced | switch.arguments()


_TEXTS = {f"{kind}{suffix}" for kind in ("prompt", "negative_prompt") for suffix in ("", "_2", "_3")}
_POOLED = ("pooled_prompt_embeds", "add_text_embeds")  # the second is what SDXL's loop calls the first


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Share:
    """One encoder's share of one prompt: what of it is to be replaced, by what."""

    test: LeaveOneOut
    flagged: tuple[bool, ...]
    projected: Tensor
    beta: float

    @classmethod
    def of(cls, test: LeaveOneOut, flagged: tuple[bool, ...], order: str) -> "_Share":
        states, concepts = test.own.states[0], test.concepts.states
        if order == "code":
            projected = outside(inside(states, test.prompt), concepts)
        else:
            projected = inside(outside(states, concepts), test.prompt)
        rows = list(test.tokens.attended)
        beta = 1.0 - cosine_similarity(projected[rows], states[rows], dim=1, eps=1e-12).mean().item()
        return cls(
            test=test, flagged=flagged, projected=projected, beta=math.nan if test.encoder.rows is None else beta
        )

    def summary(self) -> TokenTest:
        test = self.test
        names = test.encoder.tokenizer.convert_ids_to_tokens(test.tokens.ids[list(test.tokens.content)].tolist())
        return TokenTest(
            encoder=test.encoder.name,
            tokens=tuple(names),
            distances=test.distances,
            flagged=self.flagged,
            beta=self.beta,
        )

    def write_rows(self, embeds: Tensor) -> None:
        """Replace the flagged rows of our own copy ``(copies, length, width)``."""
        encoder = self.test.encoder
        if encoder.rows is None:
            return
        place = embeds[:, encoder.rows, encoder.channels]
        width = place.shape[-1]
        check(encoder, self.test.own.states[0, :, :width], place[0])
        positions = [at for at, flag in zip(self.test.tokens.content, self.flagged, strict=True) if flag]
        place[:, positions] = self.projected[positions, :width].to(place)

    def write_pooled(self, vectors: Tensor) -> None:
        """Replace this encoder's part of the pooled vector in our own copy ``(copies, channels)``."""
        own, span, encoder = self.test.own.pooled, self.test.concepts.pooled, self.test.encoder
        if own is None or span is None:
            return
        place = vectors[:, encoder.pooled]
        check(encoder, own[0], place[0])
        place[:] = outside(own, span)[0].to(place)


@dataclass(frozen=True, slots=True)
class _Prompt:
    shares: tuple[_Share, ...]

    @property
    def flagged(self) -> bool:
        return any(any(share.flagged) for share in self.shares)

    def last(self, filter: SelfValidatingFilter) -> int:  # noqa: A002
        """:math:`n`: the last step of 50 with the safe embedding; -1 where nothing is flagged."""
        betas = [share.beta for share in self.shares if not math.isnan(share.beta)]
        return filter.steps(max(betas)) if self.flagged else -1

    def write(self, mine: Mapping[str, Tensor]) -> None:
        """Replace what is flagged in our own copies, one row per picture."""
        for share in self.shares if self.flagged else ():
            share.write_rows(mine["prompt_embeds"])
            if share.test.own.pooled is not None:
                share.write_pooled(mine["pooled_prompt_embeds"])


def _texts(given: Mapping[str, Any], argument: str) -> list[str]:
    """What the encoder of ``argument`` reads, one text per prompt."""
    own = given.get(argument) or given["prompt"]
    return [own] if isinstance(own, str) else list(own)


def _in_loop(tensors: Mapping[str, Tensor], names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors by the names of the sampling loop, those that it lets be replaced."""
    given = {name: _POOLED[0] if name in _POOLED else name for name in names}
    return {name: tensors[key] for name, key in given.items() if key in tensors}
