"""Every scheduler × prediction type × variant that can be guarded, with a network known in closed form.

Data with independent coordinates N(m, s²) has the posterior mean m + a s² (x - a m) / (a² s² + σ²). A network of such
data knows only its *training convention*, the map from a timestep to (a, σ), and its output convention. Neither comes
from the readers.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers.schedulers.scheduling_consistency_decoder import ConsistencyDecoderScheduler
from torch import Tensor

Level = tuple[Any, Any]
Convention = Callable[[Any, Any], Level]  # (scheduler, timestep) -> (a, sigma)
Encoding = Callable[[Tensor, Tensor, Any, Any], Tensor]  # (x0, x, a, sigma) -> network output

SHAPE = (2, 4, 3, 3)


@dataclass(frozen=True)
class Gaussian:
    """The exact denoiser of data N(m, s²)."""

    seed: int
    std: float

    def __call__(self, x: Tensor, a: Any, sigma: Any) -> Tensor:
        width = x.shape[-1]
        mean = 0.3 * torch.randn(width, generator=torch.Generator().manual_seed(self.seed), dtype=x.dtype)
        gain = a * self.std**2 / (a * a * self.std**2 + sigma * sigma)
        return mean + gain * (x - a * mean)


FIRST, SECOND = Gaussian(1, 0.5), Gaussian(2, 1.0)


# Training conventions ------------------------------------------------------------------------------------------------


def number(t: Any) -> float:
    return float(t.flatten()[0]) if isinstance(t, Tensor) else float(t)


def vp_of(product: float) -> Level:
    return math.sqrt(product), math.sqrt(1 - product)


def vp(scheduler: Any, t: Any) -> Level:
    return vp_of(float(scheduler.alphas_cumprod[int(number(t))].double()))


def vp_inverse(scheduler: Any, t: Any) -> Level:
    before = int(number(t)) - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
    return vp_of(float(scheduler.alphas_cumprod[max(before, 0)].double()))


def ve(scheduler: Any, t: Any) -> Level:
    product = scheduler.alphas_cumprod.double().numpy()
    log_sigma = 0.5 * np.log((1 - product) / product)
    return 1.0, float(np.exp(np.interp(number(t), np.arange(len(log_sigma)), log_sigma)))


def svd(scheduler: Any, t: Any) -> Level:
    return 1.0, math.exp(4 * number(t))


def edm_cosine(scheduler: Any, t: Any) -> Level:
    return 1.0, math.tan(number(t) * math.pi / 2)


def flow(scheduler: Any, t: Any) -> Level:
    sigma = number(t) / 1000
    return 1 - sigma, sigma


def unit_time(scheduler: Any, t: Any) -> Level:
    return number(t), 1 - number(t)


def mochi(scheduler: Any, t: Any) -> Level:
    return number(t) / 1000, 1 - number(t) / 1000


def tokens(scheduler: Any, t: Any) -> Level:
    sigma = t[..., None] / 1000
    return 1 - sigma, sigma


def consistency(scheduler: Any, t: Any) -> Level:
    return 1.0, math.exp(number(t) / 250)


def decoder(scheduler: Any, t: Any) -> Level:
    betas = diffusers.schedulers.scheduling_consistency_decoder.betas_for_alpha_bar(1024)
    return vp_of(float(torch.cumprod(1 - betas, 0)[int(number(t))].double()))


def angle(scheduler: Any, t: Any) -> Level:
    return math.cos(number(t) * math.pi / 2), math.sin(number(t) * math.pi / 2)


def trig(scheduler: Any, t: Any) -> Level:
    return math.cos(number(t)), math.sin(number(t)) * 0.5


def wuerstchen(scheduler: Any, t: Any) -> Level:
    s = 0.008
    product = (math.cos((number(t) + s) / (1 + s) * math.pi / 2) / math.cos(s / (1 + s) * math.pi / 2)) ** 2
    return vp_of(min(max(product, 0.0001), 0.9999))


def score(scheduler: Any, t: Any) -> Level:
    n = len(scheduler.timesteps)
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    position = int(np.float32(number(t)) * (n - 1)) / (n - 1)
    return 1.0, math.exp(math.log(low) + position * (math.log(high) - math.log(low)))


# Output conventions --------------------------------------------------------------------------------------------------


def _root(a: Any, sigma: Any) -> float:
    return math.sqrt(a * a + sigma * sigma)


ENCODE: dict[str, Encoding] = {
    "epsilon": lambda x0, x, a, s: (x - a * x0) / s,
    "v_prediction": lambda x0, x, a, s: (a * x / _root(a, s) - _root(a, s) * x0) / s,
    "sample": lambda x0, x, a, s: x0,
    "flow_prediction": lambda x0, x, a, s: (x - x0) / s,
    "flow_neg": lambda x0, x, a, s: (x0 - x) / s,
    "trig": lambda x0, x, a, s: (a * x - x0) / (s / 0.5),
    "score": lambda x0, x, a, s: (x0 - x) / s**2,
}


def preconditioned(data: float, sign: float = 1.0) -> Encoding:
    def encode(x0: Tensor, x: Tensor, a: Any, s: Any) -> Tensor:
        return sign * (x0 - data**2 / (s * s + data**2) * x) * math.sqrt(s * s + data**2) / (s * data)

    return encode


def boundary(x0: Tensor, x: Tensor, a: Any, s: Any) -> Tensor:
    low, data = 0.002, 0.5
    c_skip = data**2 / ((s - low) ** 2 + data**2)
    return (x0 - c_skip * x) * math.sqrt(s * s + data**2) / ((s - low) * data)


def decoder_output(x0: Tensor, x: Tensor, a: Any, s: Any) -> Tensor:
    sigma, data = s / a, 0.5
    c_skip, c_out = data**2 / (sigma**2 + data**2) / a, sigma * data / math.sqrt(sigma**2 + data**2)
    return (x0 - c_skip * x) / c_out


# Cases ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    name: str
    scheduler: str
    config: dict[str, Any]
    convention: Convention
    encode: Encoding
    swap: float = 3e-5
    estimate: float = 3e-5
    calls: int = 10
    variance: bool = False
    step: dict[str, Any] = field(default_factory=dict)
    timesteps: dict[str, Any] = field(default_factory=dict)
    steps: int = 10

    def make(self) -> Any:
        if self.scheduler == "ConsistencyDecoderScheduler":
            return ConsistencyDecoderScheduler()
        return getattr(diffusers, self.scheduler)(**self.config)


def _cases(name: str, predictions: str, convention: Convention, **more: Any) -> list[Case]:
    """One case per prediction type, with clipping off so that a Gaussian's estimates stay as they are."""
    cls = getattr(diffusers, name)
    known = inspect.signature(cls.__init__).parameters
    config = more.pop("config", {})
    plain = {"clip_sample": False} if "clip_sample" in known else {}
    typed = "prediction_type" in known
    variant = more.pop("variant", "")
    return [
        Case(
            f"{name} {kind} {variant}".strip(),
            name,
            plain | ({"prediction_type": kind} if typed else {}) | config,
            convention,
            more.get("encode", ENCODE[kind]),
            **{key: value for key, value in more.items() if key != "encode"},
        )
        for kind in predictions.split()
    ]


THREE = "epsilon v_prediction sample"


def _vp() -> list[Case]:
    cases: list[Case] = []
    for name in ("DDIM", "DDIMParallel", "CogVideoXDDIM", "CogVideoXDPM", "DDPM", "DDPMParallel", "LCM", "TCD"):
        cases += _cases(f"{name}Scheduler", THREE, vp)
    cases += _cases("DDIMScheduler", "epsilon", vp, variant="eta=0.7", step={"eta": 0.7})
    learned = {"variance_type": "learned_range"}
    cases += _cases("DDPMScheduler", "epsilon", vp, variant="learned", config=learned, variance=True)
    cases += _cases("DDIMInverseScheduler", THREE, vp_inverse, config={"set_alpha_to_one": False})
    for skip, calls, phase in ((True, 11, "PLMS"), (False, 19, "PRK")):
        config = {"skip_prk_steps": skip}
        cases += _cases("PNDMScheduler", "epsilon v_prediction", vp, variant=phase, config=config, calls=calls)
    cases += _cases("RePaintScheduler", "epsilon", vp, calls=18, timesteps={"jump_length": 2, "jump_n_sample": 2})
    # alpha is 1/156 at the first step: float32 cancels there.
    cases += _cases("UnCLIPScheduler", "epsilon sample", vp, estimate=2e-2, swap=6e-5)
    cases += _cases(
        "UnCLIPScheduler", "epsilon", vp, variant="learned", config=learned, variance=True, estimate=2e-2, swap=6e-5
    )
    return cases


def _ve() -> list[Case]:
    cases = _cases("EulerDiscreteScheduler", THREE, ve)
    cases += _cases(
        "EulerDiscreteScheduler", "epsilon", ve, variant="karras", config={"use_karras_sigmas": True}, estimate=2e-4
    )
    continuous = {
        "timestep_type": "continuous",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "timestep_spacing": "leading",
    }
    cases += _cases("EulerDiscreteScheduler", "v_prediction", svd, variant="SVD", config=continuous, estimate=2e-4)
    cases += _cases("EulerDiscreteScheduler", "epsilon", ve, variant="churn", step={"s_churn": 3.0})
    cases += _cases("EulerAncestralDiscreteScheduler", "epsilon v_prediction", ve)
    cases += _cases("LMSDiscreteScheduler", THREE, ve)
    cases += _cases(
        "LMSDiscreteScheduler", "epsilon", ve, variant="karras", config={"use_karras_sigmas": True}, estimate=2e-4
    )
    cases += _cases("HeunDiscreteScheduler", THREE, ve, calls=19)
    cases += _cases(
        "HeunDiscreteScheduler", "epsilon", ve, variant="karras", config={"use_karras_sigmas": True}, calls=19
    )
    for name in ("KDPM2Discrete", "KDPM2AncestralDiscrete"):
        cases += _cases(f"{name}Scheduler", "epsilon v_prediction", ve, calls=19)
    cases += _cases("DPMSolverSDEScheduler", "epsilon v_prediction", ve, calls=19, config={"noise_sampler_seed": 0})
    return cases


# These store integer timesteps: network and solver disagree about the level by up to 1/1000 (upstream's rounding).
ROUNDED = {"swap": 5e-3, "estimate": 5e-3}


def _solvers() -> list[Case]:
    cases: list[Case] = []
    names = ("DPMSolverMultistep", "DPMSolverSinglestep", "DEISMultistep", "UniPCMultistep", "SASolver")
    for name in (*names, "DPMSolverMultistepInverse"):
        cases += _cases(f"{name}Scheduler", THREE, vp, **ROUNDED)
        cases += _cases(
            f"{name}Scheduler", "flow_prediction", flow, variant="flow", config={"use_flow_sigmas": True}, **ROUNDED
        )
    variants = {
        "order1": {"solver_order": 1},
        "order3": {"solver_order": 3},
        "sde++": {"algorithm_type": "sde-dpmsolver++"},
        "dpmsolver": {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"},
        "karras": {"use_karras_sigmas": True},
    }
    for variant, config in variants.items():
        cases += _cases("DPMSolverMultistepScheduler", "epsilon", vp, variant=variant, config=config, **ROUNDED)
    order3 = {"solver_order": 3}
    cases += _cases("DPMSolverSinglestepScheduler", "epsilon", vp, variant="order3", config=order3, **ROUNDED)
    bh2 = {"solver_order": 3, "solver_type": "bh2"}
    cases += _cases("UniPCMultistepScheduler", "epsilon", vp, variant="order3 bh2", config=bh2, **ROUNDED)
    # At sigma 0 upstream takes the logarithm of 0 when it works on the noise.
    noise = {"predict_x0": False, "final_sigmas_type": "sigma_min"}
    cases += _cases("UniPCMultistepScheduler", "epsilon", vp, variant="predict_x0=False", config=noise, **ROUNDED)
    return cases


def _edm() -> list[Case]:
    plus, minus = preconditioned(0.5), preconditioned(0.5, -1.0)
    cases: list[Case] = []
    for name, variant, extra in (
        ("EDMEulerScheduler", "churn", {"step": {"s_churn": 3.0}}),
        ("EDMDPMSolverMultistepScheduler", "sde++", {"config": {"algorithm_type": "sde-dpmsolver++"}}),
    ):
        cases += _cases(name, "epsilon", svd, encode=plus)
        cases += _cases(name, "v_prediction", svd, encode=minus)
        cases += _cases(name, "epsilon", svd, encode=plus, variant=variant, **extra)
    cases += _cases("CosineDPMSolverMultistepScheduler", "v_prediction", edm_cosine, encode=preconditioned(1.0, -1.0))
    cases += _cases("CosineDPMSolverMultistepScheduler", "epsilon", edm_cosine, encode=preconditioned(1.0))
    # EDM's exponent map to timesteps and back is in float32: exp(4 t) carries 1e-6 relative.
    return cases


def _flow() -> list[Case]:
    name, kind = "FlowMatchEulerDiscreteScheduler", "flow_prediction"
    cases = _cases(name, kind, flow)
    cases += _cases(name, kind, flow, variant="stochastic", config={"stochastic_sampling": True})
    cases += _cases(name, kind, flow, variant="dynamic", config={"use_dynamic_shifting": True}, timesteps={"mu": 0.8})
    cases += _cases(name, "flow_neg", mochi, variant="inverted", config={"invert_sigmas": True})
    cases += _cases(name, "flow_neg", tokens, variant="per token")
    cases += _cases("FlowMatchHeunDiscreteScheduler", kind, flow, calls=19)
    cases += _cases("FlowMatchLCMScheduler", kind, flow)
    cases += _cases("LTXEulerAncestralRFScheduler", kind, flow)
    cases += _cases("MiniMaxH3Scheduler", "flow_neg", unit_time, calls=9)
    for solver in ("euler", "unipc"):
        config = {"stages": 1, "scheduler_type": solver, "stage_range": [0, 1]}
        cases += _cases("HeliosScheduler", kind, flow, variant=solver, config=config)
    cases += _cases("HeliosDMDScheduler", kind, flow, config={"stages": 1, "stage_range": [0, 1]}, **ROUNDED)
    cases += _cases("FlowMapEulerDiscreteScheduler", kind, flow)
    cases += _cases("PiflowScheduler", kind, flow, config={"n_grid": 4, "num_policy_substeps": 8})
    return cases


def _others() -> list[Case]:
    cases = _cases(
        "CMStochasticIterativeScheduler", "epsilon", consistency, encode=boundary, config={"clip_denoised": False}
    )
    cases += [
        Case(
            "ConsistencyDecoderScheduler", "ConsistencyDecoderScheduler", {}, decoder, decoder_output, calls=2, steps=2
        )
    ]
    cases += _cases("IPNDMScheduler", "v_prediction", angle)
    cases += _cases(
        "SCMScheduler",
        "trig",
        trig,
        config={"prediction_type": "trigflow"},
        timesteps={"max_timesteps": 1.5, "intermediate_timesteps": None},
    )
    cases += _cases("DDPMWuerstchenScheduler", "epsilon", wuerstchen, estimate=1e-4)
    cases += _cases("ScoreSdeVeScheduler", "score", score, estimate=2e-2)
    protein = {"schedule_mode": "log", "noise_mode": "1/t", "tsr_k": 1.0, "tsr_sigma": 1.0, "tail_steps": 2}
    cases += _cases("RFD4ProteinaScheduler", "flow_neg", unit_time, config=protein)
    return cases


CASES: list[Case] = [*_vp(), *_ve(), *_solvers(), *_edm(), *_flow(), *_others()]


# The loop -------------------------------------------------------------------------------------------------------------


class Loop:
    """A pipeline reduced to its sampling loop, with an analytic network."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.scheduler = case.make()
        self.parameters = inspect.signature(self._method).parameters

    @property
    def components(self) -> dict[str, Any]:
        return {"scheduler": self.scheduler}

    @property
    def _method(self) -> Callable[..., Any]:
        return getattr(self.scheduler, "step_pred" if self.case.scheduler == "ScoreSdeVeScheduler" else "step")

    def __call__(self, network: Gaussian) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        self.generators = [torch.Generator().manual_seed(row) for row in range(2)]
        timesteps = self._timesteps()
        x = self._start(timesteps)
        self.original, self.old = x + 1.0, None
        for index, t in enumerate(timesteps):
            if self.case.scheduler == "RePaintScheduler" and index and t > timesteps[index - 1]:
                x = self.scheduler.undo_step(x, int(timesteps[index - 1]), generator)
                continue
            self.scheduler_input(x, t)
            output = self._output(network, x, t, index)
            result = self._method(**self._arguments(output, x, t, index, generator))
            x, self.old = result[0], result[1] if len(result) > 1 else None
        return x

    def scheduler_input(self, x: Tensor, t: Any) -> None:
        if hasattr(self.scheduler, "scale_model_input") and self.case.scheduler != "ConsistencyDecoderScheduler":
            self.scheduler.scale_model_input(x, t)

    def _timesteps(self) -> Any:
        case, scheduler = self.case, self.scheduler
        if case.scheduler == "ScoreSdeVeScheduler":
            scheduler.set_timesteps(case.steps)
            scheduler.set_sigmas(case.steps)
            return scheduler.timesteps
        scheduler.set_timesteps(case.steps, **case.timesteps)
        if case.scheduler == "UnCLIPScheduler":
            # Its last alpha is 5e-5: no estimate there (tested on its own). Three timesteps earlier it is 1/156.
            scheduler.timesteps = (scheduler.timesteps - 3).clamp(min=0)
        trailing = case.scheduler in {"SCMScheduler", "DDPMWuerstchenScheduler"}
        return scheduler.timesteps[:-1] if trailing else scheduler.timesteps

    def _start(self, timesteps: Any) -> Tensor:
        shape = self.shape
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        clean = 0.5 * torch.randn(shape, generator=torch.Generator().manual_seed(4))
        a, sigma = self.case.convention(self.scheduler, self._network_time(timesteps[0], 0))
        return (a * clean + sigma * noise).float()

    @property
    def shape(self) -> tuple[int, ...]:
        name = self.case.scheduler
        if "Helios" in name:
            return (2, 4, 1, 3, 3)
        if name in {"RFD4ProteinaScheduler", "PiflowScheduler"} or "per token" in self.case.name:
            return (2, 5, 4)
        return SHAPE

    def _network_time(self, t: Any, index: int) -> Any:
        if "per token" in self.case.name:
            return t * torch.tensor([1.0, 1.0, 0.5, 0.25, 1.0]).expand(2, 5)
        return t

    def _output(self, network: Gaussian, x: Tensor, t: Any, index: int) -> Tensor:
        a, sigma = self.case.convention(self.scheduler, self._network_time(t, index))
        wide = x.double()
        output = self.case.encode(network(wide, a, sigma), wide, a, sigma).float()
        if self.case.variance:
            return torch.cat([output, 0.1 * x], 1)
        if self.case.scheduler == "PiflowScheduler":
            return output.repeat(1, 1, 4)
        return output

    def _arguments(self, output: Tensor, x: Tensor, t: Any, index: int, generator: Any) -> dict[str, Any]:
        scheduler, name = self.scheduler, self.case.scheduler
        arguments = {"model_output": output, "timestep": t, "sample": x, "return_dict": False, **self.case.step}
        if "generator" in self.parameters:
            arguments["generator"] = generator
        if name == "CogVideoXDPMScheduler":
            back = scheduler.timesteps[index - 1] if index else None
            arguments |= {"old_pred_original_sample": self.old, "timestep_back": back}
        if name == "RePaintScheduler":
            arguments |= {"original_image": self.original, "mask": torch.zeros_like(x)}
        if name == "UnCLIPScheduler" and index + 1 < len(scheduler.timesteps):
            arguments["prev_timestep"] = scheduler.timesteps[index + 1]
        if name == "RFD4ProteinaScheduler":
            arguments |= {"emit_mask": torch.ones(x.shape[:2]), "generator": self.generators}
        if name == "DDPMWuerstchenScheduler":
            arguments["timestep"] = t.expand(len(x))
        if name == "HeliosDMDScheduler":
            noise = torch.randn(x.shape, generator=generator)
            arguments |= {
                "cur_sampling_step": index,
                "dmd_noisy_tensor": noise,
                "dmd_sigmas": scheduler.sigmas,
                "dmd_timesteps": scheduler.timesteps,
                "all_timesteps": scheduler.timesteps,
            }
        if "per token" in self.case.name:
            arguments["per_token_timesteps"] = self._network_time(t, index)
        return arguments
