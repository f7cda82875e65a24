"""The papers' settings as data: one frozen dataclass a model, one registry of presets. No TensorFlow."""

import dataclasses
import json
import math
from typing import Any, Dict, Optional, Sequence, Tuple

from goconv_tf.errors import UsageError

WIDEST = 2048  # channels
TRAINING_CHOICES = {  # what flags of training may be
    "distortion": ("mse", "mix", "ms-ssim"),
    "quantization": ("noise", "mixed"),
    "gradients": ("float32", "bfloat16"),
    "optimizer": ("adam", "soap"),
    "init": ("random", "pca"),
    "strategy": ("none", "mirrored", "multi_worker"),
    "cluster": ("auto", "tf_config", "slurm"),
}


def _make_tuples(config):
    """JSON has lists only; a frozen config shall be hashable."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, list):
            object.__setattr__(config, field.name, tuple(value))


def _check_widths(config):
    """UsageError for widths that no machine has the memory for, as a config.json may ask for."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_width = field.name in ("latents", "hyper_width") or field.name.endswith(("filters", "widths"))
        if is_width and value is not None and not all(0 < n <= WIDEST for n in (value if isinstance(value, tuple) else (value,))):
            raise UsageError(f"{field.name} must be 1 to {WIDEST}, not {value}")


def _check_lambdas(config):
    """UsageError unless all that the config trains for are numbers above 0, which the loss falls with."""
    if not all(0 < lmbda < math.inf for lmbda in config.training_lambdas):
        raise UsageError(f"lambdas must be above 0, not {', '.join(f'{lmbda:g}' for lmbda in config.training_lambdas)}")


def _complete_octave(config):
    """M defaults to N; UsageError unless both can be split in two frequencies."""
    _make_tuples(config)
    _check_widths(config)
    if config.latents is None:
        object.__setattr__(config, "latents", config.filters)
    if len(config.estimation_widths) != 2:
        raise UsageError(f"estimation_widths must be 2 numbers, not {len(config.estimation_widths)}")
    if not 0 < round(config.alpha * config.hyper_width) < config.hyper_width:
        raise UsageError(f"hyper_width {config.hyper_width} cannot be split with alpha {config.alpha:g}")
    for name in ("filters", "latents"):
        low = config.alpha * getattr(config, name)
        if low != int(low) or not 0 < low < getattr(config, name):
            raise UsageError(f"{name} {getattr(config, name)} cannot be split with alpha {config.alpha:g}: both shares must be whole and positive")


def _fewest_octave_weights(config) -> int:
    """No model of this config has fewer numbers among its weights: in 5 x 5 kernels within frequencies, whatever alpha is, and in the estimation."""
    n, m, hyper = config.filters, config.latents, config.hyper_width
    return 6 * n * (n + m + hyper) + 4 * m * hyper + math.prod(config.estimation_widths)


def _widths(num_filters, num_latents):
    """Changes that --num_filters and --num_latents ask for."""
    if num_filters:
        return {"filters": num_filters, "latents": num_latents or num_filters}
    return {"latents": num_latents} if num_latents else {}


@dataclasses.dataclass(frozen=True)
class VariableRateConfig:
    """Settings of `goconv_tf.models.VariableRate` (Wang et al., arXiv 2009.13074).

    Widths are the paper's by default. Its three ranges of lambda, a model each, and its distortion are those of `experiments/variable_rate.py`.

    filters: N, filters of a layer, both frequencies together.
    latents: M, channels of the latent y; None means N, as in the paper, and becomes it here: change N by `adapt`, or both.
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
    has_lambda = True  # lambda is chosen when coding
    layers = (("z_low", "z_high", "y_low", "y_high"),)

    def __post_init__(self):
        _complete_octave(self)
        if not 0 < self.lmbda_min <= self.lmbda_max < 1:
            raise UsageError(f"lambdas must be between 0 and 1, not {self.lmbda_min:g} to {self.lmbda_max:g}")

    fewest_weights = property(_fewest_octave_weights)

    @property
    def rates_text(self) -> str:
        """What can be chosen when coding, in words."""
        return f"lambda {self.lmbda_min:g} to {self.lmbda_max:g}"

    @property
    def lmbda_middle(self) -> float:
        """The middle of the logarithm of the range, which is taken where no lambda is given."""
        return math.sqrt(self.lmbda_min * self.lmbda_max)

    @property
    def training_lambdas(self) -> Tuple[float, ...]:
        """Nine lambdas, spread evenly over the logarithm of the range."""
        return tuple(self.lmbda_min * (self.lmbda_max / self.lmbda_min) ** (k / 8) for k in range(9))

    def adapt(self, num_filters: int = 0, num_latents: int = 0, lambdas: Sequence[float] = ()):
        """The same with other widths (0: unchanged; without num_latents, M becomes N) and the range of the lambdas."""
        changes: Dict[str, Any] = {}
        if lambdas:
            changes.update(lmbda_min=min(lambdas), lmbda_max=max(lambdas))
        return dataclasses.replace(self, **changes, **_widths(num_filters, num_latents))


@dataclasses.dataclass(frozen=True)
class CRPEConfig:
    """Settings of `goconv_tf.models.CRPE` (Fu et al., arXiv 2209.03353).

    filters: N, filters of a layer, both resolutions together.
    latents: M, channels of the latent y; None means N, as in the paper, and becomes it here: change N by `adapt`, or both.
    alpha: share of low-resolution filters.
    hyper_width: filters of the hyper syntheses' middle layers (288 in the paper).
    estimation_widths: filters of the first two 1x1 layers of the parameter estimations.
    second_hyper, crpe_z, crpe_y: the paper's ablations. crpe_z is a part of the second hyper layer.
    separate_fusion: one convolution for means and one for scales where y_L's parameters are fused; the original has one for both.
    if_weight: weight of the information-fidelity loss in the first `if_steps` steps; 0 leaves it out.
    lmbda: the Lagrangian that the weights are trained for.
    """

    filters: int = 448
    latents: Optional[int] = None
    alpha: float = 0.5
    hyper_width: int = 288
    estimation_widths: Tuple[int, int] = (640, 512)
    second_hyper: bool = True
    crpe_z: bool = True
    crpe_y: bool = True
    separate_fusion: bool = False
    if_weight: float = 1.0
    if_steps: int = 200_000
    lmbda: float = 0.01

    model = "crpe"
    has_lambda = False

    def __post_init__(self):
        _complete_octave(self)
        if not self.second_hyper and (self.crpe_z or self.separate_fusion):
            raise UsageError("without second_hyper there is neither crpe_z nor separate_fusion")
        if not 0 <= self.if_weight < math.inf:
            raise UsageError(f"if_weight must be 0 or more, not {self.if_weight}")
        _check_lambdas(self)

    @property
    def layers(self) -> Tuple[Tuple[str, ...], ...]:
        """Names of the latents in coding order."""
        return ((*(("z2_high", "z2_low") if self.second_hyper else ()), "z1_low", "z1_high", "y_low", "y_high"),)

    fewest_weights = property(_fewest_octave_weights)

    @property
    def rates_text(self) -> str:
        return f"trained for lambda {self.lmbda:g}"

    @property
    def training_lambdas(self) -> Tuple[float, ...]:
        return (self.lmbda,)

    def adapt(self, num_filters: int = 0, num_latents: int = 0, lambdas: Sequence[float] = ()):
        """The same with other widths (0: unchanged; without num_latents, M becomes N) and another lambda."""
        if len(lambdas) > 1:
            raise UsageError(f"crpe is trained for one lambda, not {len(lambdas)}")
        changes: Dict[str, Any] = {"lmbda": lambdas[0]} if lambdas else {}
        return dataclasses.replace(self, **changes, **_widths(num_filters, num_latents))


@dataclasses.dataclass(frozen=True)
class ScalableRNNConfig:
    """Settings of `goconv_tf.models.ScalableRNN` (Su et al., ICIP 2020).

    filters: channels of y and z, and of the hyper networks (the original's --num_filters).
    input_filters: of the encoder's first convolution.
    encoder_filters: of the encoder's three ConvLSTM cells.
    decoder_filters: of the decoder's four; divisible by 4, as each is followed by depth-to-space.
    iterations: layers of the stream.
    hyperprior: whether y is coded with the RNN-based hyperprior, or with a factorized prior.
    lambdas: Lagrangian of each layer; empty doubles them from 0.01 on.
    grid_bits: 10 to 14, bits after the point of what the cells of the hyper synthesis compute with when coding (`goconv_tf.layers.exact`).
    """

    filters: int = 128
    input_filters: int = 64
    encoder_filters: Tuple[int, ...] = (256, 512, 512)
    decoder_filters: Tuple[int, ...] = (512, 512, 256, 128)
    iterations: int = 4
    hyperprior: bool = True
    lambdas: Tuple[float, ...] = ()
    grid_bits: int = 14

    model = "scalable_rnn"
    has_lambda = False
    before = {"grid_bits": 10}  # in folders of earlier versions, which do not say

    def __post_init__(self):
        if not 1 <= self.iterations <= 32:
            raise UsageError(f"iterations must be 1 to 32, not {self.iterations}")
        if not self.lambdas:
            object.__setattr__(self, "lambdas", [0.01 * 2**k for k in range(self.iterations)])
        _make_tuples(self)
        _check_widths(self)
        if len(self.lambdas) != self.iterations:
            raise UsageError(f"{len(self.lambdas)} lambdas for {self.iterations} iterations: one is needed for each")
        _check_lambdas(self)
        for name, count in (("encoder_filters", 3), ("decoder_filters", 4)):
            if len(getattr(self, name)) != count:
                raise UsageError(f"{name} must be {count} numbers, not {len(getattr(self, name))}")
        if any(n % 4 for n in self.decoder_filters) or (self.hyperprior and self.filters % 4):
            raise UsageError("filters before a depth-to-space must be multiples of 4")
        if not 10 <= self.grid_bits <= 14:
            raise UsageError(f"grid_bits must be 10 to 14, not {self.grid_bits}")

    @property
    def layers(self) -> Tuple[Tuple[str, ...], ...]:
        """Names of the latents, layer by layer, in coding order."""
        kinds = ("z", "y") if self.hyperprior else ("y",)
        return tuple(tuple(f"{kind}_{k}" for kind in kinds) for k in range(self.iterations))

    @property
    def fewest_weights(self) -> int:
        """No model of this config has fewer numbers among its weights: in the kernels, 2 x 2 at least, of the cells' states of n channels."""
        cells = [*self.encoder_filters, *self.decoder_filters, *(4 * [self.filters] if self.hyperprior else [])]
        return sum(16 * n * n for n in cells)

    @property
    def rates_text(self) -> str:
        return f"{self.iterations} layers"

    @property
    def training_lambdas(self) -> Tuple[float, ...]:
        return self.lambdas

    def adapt(self, num_filters: int = 0, num_latents: int = 0, lambdas: Sequence[float] = ()):
        """The same with another --num_filters and one lambda for each iteration; as many iterations as lambdas."""
        if num_latents:
            raise UsageError("scalable_rnn has no --num_latents: --num_filters is the number of its latents' channels")
        changes: Dict[str, Any] = {}
        if num_filters:
            changes["filters"] = num_filters
        if lambdas:
            changes.update(lambdas=tuple(lambdas), iterations=len(lambdas))
        return dataclasses.replace(self, **changes)


PRESETS: Dict[str, Dict[str, Any]] = {
    "variable_rate": {
        "paper": VariableRateConfig(),
        "base": VariableRateConfig(filters=192, latents=384, lmbda_min=3e-4, lmbda_max=0.2),
        "medium": VariableRateConfig(filters=128, latents=448, hyper_width=128, estimation_widths=(320, 256), lmbda_min=5e-4, lmbda_max=0.1),
        "small": VariableRateConfig(filters=64, latents=256, hyper_width=128, estimation_widths=(320, 256), lmbda_min=5e-4, lmbda_max=0.1),
        "tiny": VariableRateConfig(filters=8, hyper_width=8, estimation_widths=(16, 16), lmbda_min=1e-3, lmbda_max=0.1),
    },
    "crpe": {
        "paper-high": CRPEConfig(),
        "paper-low": CRPEConfig(filters=256),
        "base": CRPEConfig(filters=192, latents=384),
        "medium": CRPEConfig(filters=128, latents=448, hyper_width=128, estimation_widths=(320, 256)),
        "small": CRPEConfig(filters=64, latents=256, hyper_width=128, estimation_widths=(320, 256)),
        "tiny": CRPEConfig(filters=8, hyper_width=8, estimation_widths=(16, 16)),
    },
    "scalable_rnn": {
        "paper": ScalableRNNConfig(),
        "base": ScalableRNNConfig(input_filters=32, encoder_filters=(128, 256, 256), decoder_filters=(256, 256, 128, 64)),
        "small": ScalableRNNConfig(filters=64, input_filters=16, encoder_filters=(32, 64, 208), decoder_filters=(208, 80, 48, 24)),
        "tiny": ScalableRNNConfig(filters=8, input_filters=4, encoder_filters=(8, 8, 8), decoder_filters=(8, 8, 8, 8), iterations=3),
    },
}

CONFIGS = {"variable_rate": VariableRateConfig, "crpe": CRPEConfig, "scalable_rnn": ScalableRNNConfig}


def _fits(now, value) -> bool:
    """Whether a setting that is `now` may be `value`, as JSON has it."""
    if isinstance(now, tuple):
        return isinstance(value, (list, tuple)) and all(_fits(now[0], item) for item in value)
    if isinstance(now, bool) or isinstance(value, bool):
        return isinstance(now, bool) and isinstance(value, bool)
    return isinstance(value, (int, float)) and abs(value) < 2**31 and (isinstance(now, float) or value == int(value))


def _like(now, value):
    """A value that fits, of the same type as `now`."""
    return tuple(_like(now[0], item) for item in value) if isinstance(now, tuple) else type(now)(value)


def change_settings(config, settings: Sequence[str]):
    """The config with fields changed as "name=value" says, values as in JSON; UsageError for what is not a field or not of its type."""
    changes: Dict[str, Any] = {}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in {field.name for field in dataclasses.fields(config)}:
            raise UsageError(f"{config.model} has no setting {name!r}: there are {', '.join(field.name for field in dataclasses.fields(config))}")
        try:
            value = json.loads(text)
        except ValueError:
            raise UsageError(f"the value of {setting!r} is not one as in JSON, such as 3, 0.5, true or [64, 96]") from None
        now = getattr(config, name)
        if not _fits(now, value):
            raise UsageError(f"{setting!r}: {name} is {json.dumps(now)}, of another type")
        changes[name] = _like(now, value)
    if "iterations" in changes:  # their lambdas are those of --lambdas, or double
        changes.setdefault("lambdas", ())
    if "filters" in changes and getattr(config, "latents", None) == config.filters:  # M is N, unless it is said
        changes.setdefault("latents", changes["filters"])
    return dataclasses.replace(config, **changes)


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
        now, changes = CONFIGS[model](), {}
        for name, value in fields.items():
            if not _fits(getattr(now, name, value), value):
                raise UsageError(f"{name} of {model} cannot be {json.dumps(value)}")
            changes[name] = _like(getattr(now, name, value), value)
        return CONFIGS[model](**{**getattr(now, "before", {}), **changes})
    except TypeError as error:
        raise UsageError(f"settings of another version of {model}: {error}") from error
