"""The pipeline's network as training needs it: its parameters, its arguments, its noise levels, its prompts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from steerclear.attach import calls, conditions
from steerclear.errors import InvalidInput, MissingExtra, UnsupportedPipeline
from steerclear.finetune.safegen import SafeGen
from steerclear.noise import NoiseLevel, Prediction, per_sample

PART = "attn1"
TARGETS = [f"{PART}.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
ADAPTER = "safegen"
NEEDS_PEFT = "a LoRA adapter needs peft: pip install 'steerclear[finetune]'"


class _Recorded(Exception):
    pass


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A pipeline's denoising network, its schedule and its prompts.

    Args:
        module: The network.
        alphas_cumprod: Of the schedule that it was trained on, ``(timesteps,)``, float64.
        prediction: What it predicts.
        call: Keyword arguments of a call for one row; what stands for the prompt is exchanged.
        prompts: Every known prompt's row in ``table``.
        table: Keyword arguments that stand for the prompts, one row each.
    """

    module: Any
    alphas_cumprod: Tensor
    prediction: Prediction
    call: Mapping[str, Any]
    prompts: Mapping[str, int]
    table: Mapping[str, Any]

    @classmethod
    def of(cls, pipe: Any, prompts: Sequence[str] = ("",)) -> "Network":  # noqa: ANN401  (some diffusers pipeline)
        """Reads a pipeline.

        Args:
            pipe: Text-to-image with self-attention layers of its own, and a variance-preserving schedule.
            prompts: All that will be asked for.

        Raises:
            UnsupportedPipeline: If there is no self-attention apart from the text's, no such schedule, or no text.
        """
        module = calls.network(pipe)
        if module is None or not any(PART in name.split(".") for name, _ in module.named_parameters()):
            raise UnsupportedPipeline(
                f"SafeGen: expected a network with self-attention layers {PART}, as in Stable Diffusion 1.x, 2.x, XL; "
                f"{type(module).__name__} has none: transformers with joint attention mix text and picture there"
            )
        products = getattr(pipe.scheduler, "alphas_cumprod", None)
        prediction = pipe.scheduler.config.get("prediction_type", "epsilon")
        if not isinstance(products, Tensor) or prediction not in ("epsilon", "v_prediction", "sample"):
            raise UnsupportedPipeline(
                "SafeGen: expected a scheduler with alphas_cumprod and a prediction of noise, velocity or sample, got "
                f"{type(pipe.scheduler).__name__} ({prediction}); take the DDIMScheduler or DDPMScheduler of the model"
            )
        call = _one_row(_record(pipe, module))
        known = tuple(dict.fromkeys(prompts))
        return cls(
            module=module,
            alphas_cumprod=products.detach().cpu().double(),
            prediction=prediction,
            call=call,
            prompts={prompt: row for row, prompt in enumerate(known)},
            table=conditions.encode(pipe, known, call),
        )

    def level(self, timesteps: Tensor, like: Tensor) -> NoiseLevel:
        """The noise level of every sample, shaped to broadcast against ``like``."""
        products = self.alphas_cumprod[timesteps.cpu()]
        alpha, sigma = (per_sample(each.sqrt().to(like), like) for each in (products, 1 - products))
        return NoiseLevel(alpha, sigma)

    def __call__(
        self, x_t: Tensor, timesteps: Tensor, prompts: Sequence[str], weights: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The network's output for every row, also with some other ``weights``; a learned variance is cut off."""
        rows = torch.tensor([self.prompts[prompt] for prompt in prompts])
        condition = _rows(self.table, rows)
        arguments = conditions.replace(_rows(self.call, torch.zeros(len(rows), dtype=torch.long)), condition, len(rows))
        arguments = {**arguments, "return_dict": False}
        output = functional_call(self.module, dict(weights or {}), (x_t, timesteps.to(x_t.device)), arguments)[0]
        return output[:, : x_t.shape[1]]

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device


def trainable(network: Any, method: SafeGen) -> dict[str, torch.nn.Parameter]:  # noqa: ANN401  (a diffusers model)
    """Freezes the network but for what SafeGen trains, and returns that by name: self-attention or its adapter.

    Raises:
        MissingExtra: If an adapter is wanted and PEFT is not installed.
        InvalidInput: If the network carries adapters already, or is not in float32.
    """
    if getattr(network, "peft_config", None):
        raise InvalidInput(
            f"SafeGen: expected a network without adapters, got {', '.join(network.peft_config)}; "
            "fuse or unload them first"
        )
    if network.dtype != torch.float32:
        raise InvalidInput(
            f"SafeGen: expected a network in float32 to train, got {network.dtype}; load it with float32"
        )
    network.requires_grad_(False)
    if method.form == "full":
        chosen = {name: value for name, value in network.named_parameters() if PART in name.split(".")}
        for value in chosen.values():
            value.requires_grad_(True)
        return chosen
    add_adapter(network, method.rank, method.seed)
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def add_adapter(network: Any, rank: int, seed: int) -> None:  # noqa: ANN401  (a diffusers model)
    """Puts a low-rank adapter beside every self-attention projection; at first it changes nothing.

    Raises:
        MissingExtra: If PEFT is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise MissingExtra(f"{NEEDS_PEFT}, or take form='full'") from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=TARGETS)
        network.add_adapter(config, adapter_name=ADAPTER)


def _record(pipe: Any, module: Any) -> dict[str, Any]:  # noqa: ANN401
    """Keyword arguments of the network in the pipeline's own first step."""
    names = calls.parameters(pipe)
    if "prompt" not in names:
        raise UnsupportedPipeline(f"SafeGen: expected a text-to-image pipeline, got {type(pipe).__name__}: no prompt")
    seen: dict[str, Any] = {}

    def note(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:  # noqa: ANN401
        seen.update(kwargs, rows=len(args[0] if args else kwargs["sample"]))
        raise _Recorded

    wishes: dict[str, Any] = {"prompt": "", "num_inference_steps": 1, "output_type": "latent"}
    wishes["generator"] = torch.Generator().manual_seed(0)
    hook = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        pipe(**{name: value for name, value in wishes.items() if name in names})
    except _Recorded:
        return seen
    finally:
        hook.remove()
    raise UnsupportedPipeline(f"{type(pipe).__name__}: expected a call of its network in the first step, saw none")


def _one_row(recorded: dict[str, Any]) -> dict[str, Any]:
    rows = recorded.pop("rows")
    kept = {key: value for key, value in recorded.items() if key not in ("sample", "timestep", "return_dict")}
    return conditions.take_rows(kept, slice(0, 1), rows)


def _rows(value: Any, rows: Tensor) -> Any:  # noqa: ANN401
    """``rows`` of every tensor, also inside mappings."""
    if isinstance(value, Tensor):
        return value[rows.to(value.device)] if value.ndim else value
    if isinstance(value, Mapping):
        return {key: _rows(item, rows) for key, item in value.items()}
    return value
