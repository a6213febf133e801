r"""EDM-preconditioned schedulers: the network's output is :math:`F`, :math:`\hat x = c_{skip} x_t + c_{out} F`.

:math:`c_{skip} = s_d^2/(\sigma^2+s_d^2)`, :math:`c_{out} = \pm\sigma s_d/\sqrt{\sigma^2+s_d^2}`, minus for v-prediction
(Karras et al. 2022, arXiv:2206.00364, table 1).
"""

from steerclear.attach.readers.base import Arguments, Field, Floats, Reading, Scheduler, reading, root, step_index
from steerclear.attach.readers.ve import churned
from steerclear.noise import NoiseLevel


def _reading(scheduler: Scheduler, arguments: Arguments, floats: Floats, **more: Field) -> Reading:
    sigma = floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])]
    data = float(scheduler.config.sigma_data)
    total = sigma * sigma + data * data
    sign = -1.0 if scheduler.config.prediction_type == "v_prediction" else 1.0
    return reading(NoiseLevel(1.0, sigma), data * data / total, sign * sigma * data / root(total), **more)


def euler(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """EDM Euler. A caller that did the preconditioning and the guidance itself passes the estimate: guard that."""
    if arguments.get("pred_original_sample") is None:
        return _reading(scheduler, arguments, floats, eta=churned(arguments))
    sigma = floats(scheduler.sigmas)[step_index(scheduler, arguments["timestep"])]
    level = NoiseLevel(1.0, sigma)
    return reading(level, 0.0, 1.0, eta=churned(arguments), output="pred_original_sample")


def dpm(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """EDM DPM++ multistep; the SDE variant adds the reverse-time noise in full."""
    eta = 1.0 if str(scheduler.config.algorithm_type).startswith("sde") else 0.0
    projection = scheduler._threshold_sample if scheduler.config.thresholding else None
    return _reading(scheduler, arguments, floats, eta=eta, projection=projection)


def cosine(scheduler: Scheduler, arguments: Arguments, floats: Floats) -> Reading:
    """The cosine DPM++ of Stable Audio: always the SDE."""
    return _reading(scheduler, arguments, floats, eta=1.0)
