"""The papers' settings as data: one frozen dataclass a model, one registry of presets. No TensorFlow."""

import dataclasses
from typing import Dict, Optional, Tuple

from goconv_tf.errors import UsageError


@dataclasses.dataclass(frozen=True)
class VariableRateConfig:
    """Settings of `goconv_tf.models.VariableRate` (Wang et al., arXiv 2009.13074).

    filters: N, filters of a layer, both frequencies together.
    latents: M, channels of the latent y; None means N, as in the paper.
    alpha: share of low-frequency filters.
    hyper_width: filters of the hyper synthesis' middle layer (288 in the paper).
    estimation_widths: filters of the first two 1x1 layers of the parameter estimation.
    lmbda_min, lmbda_max: range of lambda that the weights are trained for.
    """

    filters: int = 448
    latents: Optional[int] = None
    alpha: float = 0.5
    hyper_width: int = 288
    estimation_widths: Tuple[int, int] = (640, 512)
    lmbda_min: float = 1e-6
    lmbda_max: float = 0.5

    model = "variable_rate"

    def __post_init__(self):
        # JSON has lists only; a frozen config shall be hashable.
        object.__setattr__(self, "estimation_widths", tuple(self.estimation_widths))
        if self.latents is None:
            object.__setattr__(self, "latents", self.filters)
        for name in ("filters", "latents"):
            low = self.alpha * getattr(self, name)
            if low != int(low) or not 0 < low < getattr(self, name):
                raise UsageError(f"{name} {getattr(self, name)} cannot be split with alpha {self.alpha:g}: both shares must be whole and positive")


PRESETS: Dict[str, Dict[str, VariableRateConfig]] = {
    "variable_rate": {
        "paper": VariableRateConfig(),
        "base": VariableRateConfig(filters=192, lmbda_min=3e-4, lmbda_max=0.2),
        "small": VariableRateConfig(filters=64, latents=192, hyper_width=128, estimation_widths=(320, 256), lmbda_min=5e-4, lmbda_max=0.1),
        "tiny": VariableRateConfig(filters=8, hyper_width=8, estimation_widths=(16, 16), lmbda_min=1e-3, lmbda_max=0.1),
    },
}

CONFIGS = {"variable_rate": VariableRateConfig}


def get_preset(model: str, preset: str):
    """The config of a model's preset; UsageError names what there is."""
    if model not in PRESETS:
        raise UsageError(f"unknown model {model!r}: there are {', '.join(PRESETS)}")
    if preset not in PRESETS[model]:
        raise UsageError(f"unknown preset {preset!r} of {model}: there are {', '.join(PRESETS[model])}")
    return PRESETS[model][preset]


def make_config(model: str, fields: dict):
    """The config of a model from its stored fields; UsageError for a model or field that is not known."""
    if model not in CONFIGS:
        raise UsageError(f"unknown model {model!r}: there are {', '.join(CONFIGS)}")
    try:
        return CONFIGS[model](**fields)
    except TypeError as error:
        raise UsageError(f"settings of another version of {model}: {error}") from error
