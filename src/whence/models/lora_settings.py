"""What peft was told in training of a LoRA: adapter_config.json, or the header of a file of diffusers.

    alpha, r    of a module: the first entry of alpha_pattern or rank_pattern that fits its name, else lora_alpha and r
    scale       alpha / r (alpha / sqrt(r) with use_rslora)

Settings that contradict the file, that would change more than this scale, or that cannot be understood are refused.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from whence.data.layout import some
from whence.models.families.family import Config
from whence.models.lora_keys import part_of_key
from whence.models.others import refusing
from whence.storage.files import read_object
from whence.types import WhenceError

DIFFUSERS, PEFT = "pytorch_lora_weights.safetensors", "adapter_model.safetensors"
ACCEPTED = (
    f"accepted: a folder with {DIFFUSERS} (diffusers), with {PEFT} and adapter_config.json (peft) or with one file of "
    "kohya's, or such a file"
)
PLAIN: tuple[tuple[str, tuple[object, ...]], ...] = (
    ("peft_type", ("LORA",)),
    ("use_dora", (False,)),
    ("bias", ("none",)),
    ("lora_bias", (False,)),
    # All others begin by changing the weights of the base (PiSSA, OLoRA, LoftQ ...), or may.
    ("init_lora_weights", (True, False, "gaussian", "orthogonal", "eva")),
    *((name, (False, [], {})) for name in ("use_qalora", "use_bdlora", "layer_replication", "trainable_token_indices")),
    *((name, (False, [], {})) for name in ("target_parameters", "alora_invocation_tokens", "modules_to_save")),
    *((name, (False, [], {})) for name in ("kasa_config", "monteclora_config", "velora_config", "arrow_config")),
)
"""What peft may be told of a plain LoRA, or nothing; first what is accepted."""
READ = ("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora")
TARGETS = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
KNOWN = frozenset(field.name for field in fields(LoraConfig))


@dataclass(frozen=True)
class Settings:
    """What was told of one part of a pipeline. where: it was; config: its entries, empty where nothing was told."""

    where: str
    config: Config

    def scale(self, module: str, rank: int, own: float | None) -> float:
        """What the product of a module is multiplied by.

        Args:
            module: its name in the file.
            rank: of its A and B.
            own: the alpha that the file has for it, None for none.
        """
        if not self.config:
            return (rank if own is None else own) / rank  # as diffusers and kohya take it
        told = self._of("rank_pattern", module, self.config.get("r", LoraConfig.r))
        if told != rank:
            raise WhenceError(f"it tells rank {told} of {module}, which has rank {rank}", self.where, "its own file")
        self._check_target(module)
        alpha = self._of("alpha_pattern", module, self.config.get("lora_alpha", LoraConfig.lora_alpha))
        return float(alpha) / (rank**0.5 if self.config.get("use_rslora") else rank)

    def _of(self, name: str, module: str, otherwise: float) -> float:
        for pattern, value in (self.config.get(name) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):  # peft's rule
                return value
        return otherwise

    def _check_target(self, module: str) -> None:
        targets = {name: self.config[name] for name in TARGETS if self.config.get(name) is not None}
        if targets.get("target_modules", "all-linear") == "all-linear":
            return
        with refusing(f"peft cannot tell whether {module} is meant", self.where):
            meant = bool(check_target_module_exists(LoraConfig(**targets), module))
        if not meant:
            raise WhenceError(f"it does not tell of {module}, which peft would leave out", self.where, "its own file")


@dataclass(frozen=True)
class Told:
    """What was told of each part of a pipeline. each: by part; every: of all parts."""

    each: Mapping[str, Settings]
    every: Settings

    def __call__(self, part: str) -> Settings:
        return self.each.get(part, self.every)

    def check(self, parts: Collection[str]) -> None:
        """Name parts that are told of, and that a file does not have."""
        absent = sorted({*self.each} - {*parts})
        if absent:
            where = self.each[absent[0]].where
            warnings.warn(f"{where} tells of {some(absent)}, of which the file has nothing", stacklevel=2)


def settings_of(file: Path, header: Mapping[str, str], keys: Collection[str]) -> Told:
    """What was told of a LoRA; nothing where its trainer tells nothing.

    Args:
        file: of its weights.
        header: of the file.
        keys: names of its entries.
    """
    beside = file.with_name("adapter_config.json")
    by_peft = file.name == PEFT or any("base_model.model." in key for key in keys)
    alphas = any(key.endswith(".alpha") for key in keys)
    others = not by_peft and file.with_name(PEFT).is_file()  # whose configuration it is then
    in_header = "lora_adapter_metadata" in header
    if alphas and (in_header or (by_peft and beside.is_file())):
        told = "its header" if in_header else beside.name
        raise WhenceError(f"its alphas and {told} both tell the scale", str(file), "one of them")
    each: dict[str, dict[str, object]] = {}
    every: Config = {}
    if in_header:
        for name, value in _object(header["lora_adapter_metadata"], f"the header of {file}").items():
            part, rest = part_of_key(name)
            each.setdefault(part, {})[rest] = value
    elif beside.is_file() and not alphas and not others:
        every = read_object(beside)
    elif by_peft and not alphas:
        raise WhenceError(f"{file.parent} has no adapter_config.json, which tells the scale of its LoRA; {ACCEPTED}")
    where = f"the header of {file}"
    return Told({part: _checked(config, where) for part, config in each.items()}, _checked(every, str(beside)))


def _object(text: str, where: str) -> dict[str, object]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WhenceError(f"{where} is no JSON ({error}); save the LoRA again") from None
    if not isinstance(value, dict):
        raise WhenceError(f"{where} holds a {type(value).__name__}, not a JSON object; save the LoRA again")
    return value


def _checked(config: Config, where: str) -> Settings:
    """The settings, of types that can be counted with; entries that peft does not know are named."""
    unknown = sorted(name for name in config if name not in KNOWN)
    if unknown:
        told = f"{len(unknown)} entries are unknown to peft's LoraConfig, and not read"
        warnings.warn(f"{where}: {told}: {some(unknown, 5)}", stacklevel=2)
    for name, plain in PLAIN:
        if config.get(name) is not None and config[name] not in plain:
            raise WhenceError(f"{name} is {config[name]!r}, which is not supported", where, repr(plain[0]))
    for name in READ:
        if name in config and not _understood(name, config[name]):
            raise WhenceError(f"{name} is {config[name]!r}, which does not tell a scale", where, "what peft wrote")
    return Settings(where, config)


def _understood(name: str, value: object) -> bool:
    if name == "use_rslora":
        return isinstance(value, bool)
    if name.endswith("_pattern"):
        return value is None or (
            isinstance(value, dict) and all(_is_pattern(key) and _is_number(one) for key, one in value.items())
        )
    return _is_number(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(rf"(.*\.)?({text})$")
    except re.error:
        return False
    return True
