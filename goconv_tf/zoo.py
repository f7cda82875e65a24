"""Model folders: where pretrained weights are, what they are called, how they are read and written.

A folder holds config.json, model.safetensors (weights and coding tables) and README.md (the card), as repositories on Hugging Face's hub do.
Only `load_pretrained`, `save_pretrained`, `shared` and `new_model` import TensorFlow.
"""

import atexit
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import threading
import zlib
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Tuple, Union

from goconv_tf import cards, hub, memory
from goconv_tf.errors import CheckpointError, UsageError
from goconv_tf.files import atomic_write, remove_leftovers, staged, taking_turns
from goconv_tf.presets import TRAINING_CHOICES, make_config

if TYPE_CHECKING:
    from goconv_tf.models import Codec

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
PREVIOUS_FILE = "previous.safetensors"  # there only while a folder is written
FORMAT = 1
MAX_SHARED = 4  # models that `shared` keeps
NameOrPath = Union[str, "os.PathLike[str]"]


class ModelInfo(NamedTuple):
    """What a model folder says of itself.

    name: in the zoo, and in messages. path: the folder. model: "variable_rate", ...
    config: its settings, a frozen dataclass. fingerprint: 8 hexadecimal digits that every
    stream carries. card: free-form facts (training, results). sha256: of the weights file. integers: hash of
    the integers that entropy parameters are computed with; empty in folders of earlier versions. identity: what
    the fingerprint of this name, these settings and weights is.
    """

    name: str
    path: str
    model: str
    config: Any
    fingerprint: str
    card: Dict[str, Any]
    sha256: str
    integers: str = ""
    identity: str = ""

    @property
    def model_id(self) -> int:
        return model_id(self.name)

    @property
    def distortion(self) -> Optional[str]:
        """What it was trained for, as `losses.distortion` calls it; None where its card does not say."""
        training = self.card.get("training")
        found = training.get("distortion", "mse") if isinstance(training, dict) else None
        return found if isinstance(found, str) and found in TRAINING_CHOICES["distortion"] else None


def model_id(name: str) -> int:
    """The 32-bit form of a model's name that streams carry."""
    return zlib.crc32(name.encode())


def zoo_folders() -> List[str]:
    """Folders that are searched for models: $GOCONV_TF_ZOO (colon-separated), the package's own, a checkout's."""
    here = os.path.dirname(os.path.abspath(__file__))
    extra = [folder for folder in os.environ.get("GOCONV_TF_ZOO", "").split(os.pathsep) if folder]
    return [*extra, os.path.join(here, "pretrained"), os.path.join(os.path.dirname(here), "checkpoints")]


def check_name(name):
    """UsageError unless a model may have this name: files are named after models."""
    if not (isinstance(name, str) and 0 < len(name) <= 128 and name.isprintable() and not name.startswith(".") and not set(name) & set("/\\")):
        raise UsageError(f"{name!r} is no name for a model: 1 to 128 printable characters, without slashes, not beginning with a dot")


def read_info(path: str) -> ModelInfo:
    """Reads a model folder's config.json; CheckpointError if it is not one."""
    config_path = os.path.join(path, CONFIG_FILE)
    try:
        with open(config_path, encoding="utf-8") as f:
            data = json.load(f)
        if data["format"] != FORMAT:
            raise CheckpointError(f"{config_path}: format {data['format']} is not supported by this version (it reads {FORMAT})")
        config = make_config(data["model"], data["config"])
        info = ModelInfo(
            data["name"], path, data["model"], config, data["fingerprint"], data.get("card", {}), data["sha256"], data.get("integers", "")
        )
        typed = {field: getattr(config, field) for field in data["config"]}  # other writers of JSON have 1 for 1.0
        identities = [_fingerprint(info.name, json.loads(json.dumps(fields)), info.sha256) for fields in (data["config"], typed)]
        info = info._replace(identity=info.fingerprint if info.fingerprint in identities else identities[0])
        check_name(info.name)
        for value, digits in ((info.fingerprint, 8), (info.sha256, 64), (info.integers or 16 * "0", 16)):
            if not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
                raise ValueError(f"{value!r} is not {digits} hexadecimal digits")
        _check_card(info.card)
        return info
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not a model folder: it has no {CONFIG_FILE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        raise CheckpointError(f"{config_path} cannot be read: {type(error).__name__}: {error}") from error


def _check_card(card):
    """TypeError, KeyError or AttributeError unless what is read of it can be: rows of "kodak", whose bits and measures are numbers."""
    if not isinstance(card, dict):
        raise TypeError(f"card is {type(card).__name__}")
    for row in card.get("kodak", ()):
        values = [row["bpp"], *(row[name] for name in ("psnr-rgb", "ms-ssim-rgb") if row.get(name) is not None)]
        if not all(isinstance(value, (int, float)) and abs(value) < 1e9 for value in values):  # JSON has integers that no float can be
            raise TypeError("a measure in the card's kodak is no number")


def all_models() -> List[ModelInfo]:
    """Every readable model folder in the zoo's folders, in the order of search."""
    return [info for folder in zoo_folders() for info in _models_in(folder)]


def _models_in(folder):
    # A broken folder, or one that may not be read, must not hide the others; asking for a model by name says what is wrong.
    found, entries = [], []
    with contextlib.suppress(OSError):
        entries = sorted(os.listdir(folder))
    for entry in entries:
        with contextlib.suppress(CheckpointError):
            found.append(read_info(_model_folder(os.path.join(folder, entry))))
    return found


def _model_folder(path):
    """The folder itself, or what was exported into a training folder."""
    export = os.path.join(path, "export")
    return export if not os.path.exists(os.path.join(path, CONFIG_FILE)) and os.path.exists(os.path.join(export, CONFIG_FILE)) else path


def list_models() -> List[ModelInfo]:
    """The zoo's models by name, sorted; the first folder that has a name wins."""
    found = {info.name: info for info in reversed(all_models())}
    return [found[name] for name in sorted(found)]


def find_model(name_or_path: NameOrPath) -> ModelInfo:
    """The model with a zoo name, in a folder, exported into a training folder, or on Hugging Face's hub (hf://ORGANISATION/NAME[@REVISION]).

    Raises:
      CheckpointError: if there is none, or if it is damaged.
    """
    name_or_path = os.fspath(name_or_path)
    if name_or_path.startswith(hub.PREFIX):
        path = hub.fetch(name_or_path, (CONFIG_FILE, WEIGHTS_FILE))
        if not os.path.exists(os.path.join(path, CONFIG_FILE)):
            raise CheckpointError(f"{name_or_path} is not a model folder: it has no {CONFIG_FILE}")
        return read_info(path)
    for folder in [""] + zoo_folders():
        path = _model_folder(os.path.join(folder, name_or_path))
        if os.path.exists(os.path.join(path, CONFIG_FILE)):
            return read_info(path)
        if folder:  # or in one that is called otherwise
            for info in _models_in(folder):
                if info.name == name_or_path:
                    return info
    if os.path.isdir(name_or_path):
        raise CheckpointError(f"{name_or_path} is not a model folder: it has no {CONFIG_FILE}")
    names = ", ".join(info.name for info in list_models()) or "no models"
    raise CheckpointError(f"no model {name_or_path!r}: the zoo has {names}; a folder's path works too")


def _fingerprint(name: str, fields: dict, sha256: str) -> str:
    identity = json.dumps([FORMAT, name, fields, sha256], sort_keys=True)
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def save_pretrained(model: "Codec", path: str, name: str, card: Optional[Dict[str, Any]] = None, dtype: str = "float32") -> ModelInfo:
    """Writes a model's weights and coding tables as a model folder, and a card (README.md) unless somebody else wrote one.

    Args:
      model: a Codec with weights; its tables are built first if they are not there, as after `fit`, or if its weights or tables are no longer those
        of its folder. Whoever else changed its weights calls its `build_tables` before.
      path: folder to write, made if missing.
      name: what streams call it, 1 to 128 characters without slashes.
      card: facts for config.json; "license" (as Hugging Face names it), "notes" and "kodak" (results) also show in README.md.
      dtype: "float32" or "float16", of the weights in the file.

    Returns:
      ModelInfo of what was written.

    Raises:
      UsageError: if streams cannot call a model that, or if the card's "kodak" is not rows of numbers.
      CheckpointError: if its entropy parameters cannot be computed with integers.
    """
    import numpy as np
    from safetensors.numpy import save

    from goconv_tf.models import named_weights

    check_name(name)
    try:
        _check_card(card or {})
    except (TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"card cannot be read: {type(error).__name__}: {error}") from error
    if not model.has_tables or model.has_changed:
        model.build_tables()
    weights = named_weights(model)
    exactly = {key: v.numpy() for key, v in weights.items()}
    with np.errstate(over="ignore"):
        arrays = {key: np.ascontiguousarray(value.astype(dtype)) for key, value in exactly.items()}
    if odd := [key for key, array in arrays.items() if not np.isfinite(array).all()]:
        raise CheckpointError(f"{name} has weights that are not finite, or not in {dtype}, such as {odd[0]}")
    had_integers, integers = model.has_exact, ""
    for key, entropy_model in model.entropy_models().items():
        arrays[f"tables/{key}/cdf"] = entropy_model.table.cdf
        arrays[f"tables/{key}/offset"] = entropy_model.table.offset
    try:
        # The integers are those of the weights as they will be read.
        for key, variable in weights.items():
            variable.assign(arrays[key].astype(exactly[key].dtype))
        model.build_exact()
        integers = integers_hash(model)
    except ValueError as error:
        raise CheckpointError(f"{name} has no integer form: {error}") from error
    finally:
        for key, variable in weights.items():
            variable.assign(exactly[key])
        if dtype != "float32" and (had_integers or integers):
            model.build_exact()  # the model goes on with its own
    data = save(arrays)
    sha256 = hashlib.sha256(data).hexdigest()
    fields = dataclasses.asdict(model.config)
    contents = {
        "format": FORMAT,
        "name": name,
        "model": model.config.model,
        "config": fields,
        "fingerprint": _fingerprint(name, json.loads(json.dumps(fields)), sha256),
        "sha256": sha256,
        "integers": integers,
        "card": {"training": {"distortion": model.distortion}, **(card or {})},
    }
    os.makedirs(path, exist_ok=True)
    card_path = os.path.join(path, cards.CARD_FILE)
    own_card = not os.path.exists(card_path) or _is_own_card(card_path)
    with taking_turns(path):
        remove_leftovers(path, (CONFIG_FILE, WEIGHTS_FILE, PREVIOUS_FILE, cards.CARD_FILE))
        _replace(path, data, (json.dumps(contents, indent=1) + "\n").encode())
        info = read_info(path)
        if own_card:
            atomic_write(card_path, cards.default_card(info).encode())
    return info


def _is_own_card(path) -> bool:
    """Whether a card is word for word what `save_pretrained` wrote."""
    try:
        with open(path, encoding="utf-8") as f:
            return cards.is_default(f.read())
    except (OSError, ValueError):
        return False


def _sha256_of(path):
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as f:
        return hashlib.sha256(f.read()).hexdigest()


def _named_sha256(config_path):
    """What a config.json says of its weights; "" if it says nothing."""
    try:
        with open(config_path, encoding="utf-8") as f:
            return json.load(f)["sha256"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def _replace(path, weights, config):
    """Writes both files of a folder so that at any moment it holds either the old model or the new one."""
    weights_path, config_path, previous = (os.path.join(path, name) for name in (WEIGHTS_FILE, CONFIG_FILE, PREVIOUS_FILE))
    with staged(weights_path, weights) as new_weights, staged(config_path, config) as new_config:
        # Between the two renames the old config.json finds the old weights under another name.
        # After an earlier kill there it has them already, and the weights are another model's.
        if _sha256_of(weights_path) == _named_sha256(config_path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(previous)
            try:
                os.link(os.path.realpath(weights_path), previous)  # not a link to what is replaced
            except OSError:  # a filesystem without hard links
                with open(weights_path, "rb") as f:
                    atomic_write(previous, f.read())
        os.replace(new_weights, os.path.realpath(weights_path))
        os.replace(new_config, os.path.realpath(config_path))
    with contextlib.suppress(FileNotFoundError):
        os.unlink(previous)


def _read_weights(info: ModelInfo) -> bytes:
    """The bytes of a folder's weights; CheckpointError if they are not those that its config.json names."""
    path = os.path.join(info.path, WEIGHTS_FILE)
    try:
        with open(path, "rb") as f:
            data = f.read()
        if hashlib.sha256(data).hexdigest() == info.sha256:
            return data
        with open(os.path.join(info.path, PREVIOUS_FILE), "rb") as f:
            data = f.read()
        if hashlib.sha256(data).hexdigest() == info.sha256:
            return data
    except FileNotFoundError:
        if not os.path.exists(path):
            raise CheckpointError(f"{path} cannot be read: no such file") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one in {CONFIG_FILE}")


def _read_model(info: ModelInfo) -> Tuple[ModelInfo, bytes]:
    """A folder's info and the bytes of its weights, of the same model: another one may be written while they are read."""
    while True:
        try:
            return info, _read_weights(info)
        except CheckpointError:
            now = read_info(info.path)
            if now.sha256 == info.sha256:
                raise
            info = now


def load_pretrained(name_or_path: NameOrPath, fold: bool = True) -> "Codec":
    """A model from the zoo or a folder, ready to code.

    Args:
      name_or_path: a zoo name, a model folder, a training folder with an export, or hf://ORGANISATION/NAME[@REVISION].
      fold: fix convolution kernels, which codes faster; False to train on.

    Returns:
      The model; its `info` is the ModelInfo.

    Raises:
      CheckpointError: if there is no such model, or its files are missing or damaged.
    """
    import numpy as np
    from safetensors import SafetensorError
    from safetensors.numpy import load

    from goconv_tf.entropy import CodingTable
    from goconv_tf.models import named_weights

    info, data = _read_model(find_model(name_or_path))
    weights_path = os.path.join(info.path, WEIGHTS_FILE)
    try:
        arrays = load(data)
    except (SafetensorError, KeyError, ValueError) as error:  # of NumPy: types of numbers and sizes of arrays that it lacks
        raise CheckpointError(f"{weights_path} cannot be read: {error}") from error
    if sum(array.size for array in arrays.values()) < info.config.fewest_weights:  # before memory is taken for what the config claims
        raise CheckpointError(f"{weights_path} does not fit its config: it has too few weights")
    with memory.guarded():
        model = new_model(info.config)
    weights = named_weights(model)
    entropy_models = model.entropy_models()
    wanted = {*weights, *(f"tables/{key}/{part}" for key in entropy_models for part in ("cdf", "offset"))}
    if wanted != set(arrays):
        odd = sorted(wanted ^ set(arrays))
        raise CheckpointError(f"{weights_path} does not fit {info.model}: {len(odd)} arrays too many or missing, such as {odd[0]}")
    for key, variable in weights.items():
        if tuple(variable.shape) != arrays[key].shape:
            raise CheckpointError(f"{weights_path} does not fit its config: {key} has shape {arrays[key].shape}, not {tuple(variable.shape)}")
        if arrays[key].dtype not in (np.float32, np.float16):
            raise CheckpointError(f"{weights_path}: {key} has numbers of type {arrays[key].dtype}, not float32 or float16")
        if not np.isfinite(arrays[key]).all():
            raise CheckpointError(f"{weights_path} is damaged: {key} has values that are not finite")
        variable.assign(arrays[key].astype(variable.dtype.as_numpy_dtype))
    for key, entropy_model in entropy_models.items():
        if kinds := {str(arrays[f"tables/{key}/{part}"].dtype) for part in ("cdf", "offset")} - {"int32"}:
            raise CheckpointError(f"{weights_path}: tables/{key} has numbers of type {kinds.pop()}, not int32")
        entropy_model.table = CodingTable(arrays[f"tables/{key}/cdf"], arrays[f"tables/{key}/offset"])
        try:
            entropy_model.table.check(entropy_model.table_rows)
        except ValueError as error:
            raise CheckpointError(f"{weights_path} does not fit its config: tables/{key}: {error}") from error
    if info.integers:
        try:
            model.build_exact()
        except ValueError as error:
            raise CheckpointError(f"{weights_path}: {error}") from error
        if integers_hash(model) != info.integers:
            raise CheckpointError(
                f"{weights_path} gives other integers on this machine than on the one that wrote it: neither would decode what the other coded"
            )
    if info.fingerprint != info.identity:
        raise CheckpointError(
            f"{info.path}: its fingerprint is not that of its name, settings and weights, but of others ({info.fingerprint}, not {info.identity})"
        )
    model.info = info
    if fold:
        model.fold()
    return model


_sharing = threading.Lock()


@functools.lru_cache(maxsize=MAX_SHARED)
def _shared(path, fingerprint):
    model = load_pretrained(path)
    if model.info.fingerprint != fingerprint:
        raise CheckpointError(f"{path}: its weights changed from {fingerprint} to {model.info.fingerprint} while they were read")
    return model


atexit.register(_shared.cache_clear)  # while TensorFlow is still whole


def shared(name_or_path: NameOrPath, fingerprint: Optional[str] = None):
    """`load_pretrained`, once a process: the last `MAX_SHARED` models are kept, and loaded again where their weights have changed.

    fingerprint: of the weights that it must be; CheckpointError if it has others by now.
    """
    info = find_model(name_or_path)
    if fingerprint not in (None, info.fingerprint):
        raise CheckpointError(f"{info.path}: has weights {info.fingerprint} by now, not {fingerprint}")
    with _sharing:
        return _shared(info.path, info.fingerprint)


def integers_hash(model) -> str:
    """16 hexadecimal digits of all integers that a model computes entropy parameters with."""
    digest = hashlib.sha256()
    for key, layer in sorted(model.exact_layers().items()):
        digest.update(key.encode())
        for part in layer.quantized:
            digest.update(part.astype("<i8").tobytes())
    return digest.hexdigest()[:16]


def new_model(config) -> "Codec":
    """A freshly initialised model of a config, such as `presets.get_preset("variable_rate", "small")`; UsageError where Keras is set to float64."""
    import tensorflow as tf

    from goconv_tf.models import MODELS

    if tf.keras.mixed_precision.global_policy().variable_dtype == "float64":  # in which the exact forms have their integers
        raise UsageError("models compute in float32, or in less by Keras' mixed precision: not in float64")
    return MODELS[config.model](config).build_weights()
