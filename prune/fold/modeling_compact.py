"""A compact model of mergekit-plus in transformers: what blocks share is one parameter, the voices of blocks are low-rank layers beside it.

    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

This file lies in the folder of every compact checkpoint and needs transformers alone. The model is the one that the checkpoint is a compact form of
(Llama, ...), a module for every block, with a key-value cache for every block; only parameters are shared. config.json says under `compact` which.
Without this code transformers does not know the model_type, and finds no file of weights where config.json says that it is.
"""

import json
import re
from collections.abc import Collection, Sequence
from functools import cache
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel

KEY, MODEL_TYPE = "compact", "mergekit_plus_compact"
DISK = {"model_type": MODEL_TYPE, "transformers_weights": "compact-needs-trust_remote_code-or-expanding.safetensors"}  # in the file, not in a config here


class CompactConfig(PreTrainedConfig):  # type: ignore[misc]
    """Reads a compact config.json, as a config of the model that it is a compact form of."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return _config_class(config_dict[KEY]["expanded"]["model_type"]).from_dict(config_dict, **kwargs)


@cache
def _config_class(model_type: str) -> Any:
    """The config of an architecture, written as that of a compact model."""
    base: Any = CONFIG_MAPPING[model_type]

    class Config(base):  # type: ignore[misc]
        _auto_class = "AutoConfig"

        @classmethod
        def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
            return super().from_dict({key: value for key, value in config_dict.items() if key not in DISK}, **kwargs)

        def to_json_file(self, json_file_path: str, use_diff: bool = True) -> None:
            table = {**json.loads(self.to_json_string(use_diff)), **DISK}
            with open(json_file_path, "w", encoding="utf-8") as file:
                file.write(json.dumps(table, indent=2, sort_keys=True) + "\n")

    Config.__name__ = Config.__qualname__ = CompactConfig.__name__
    return Config


class VoicedLinear(nn.Linear):
    """A linear layer whose weight others share, plus a product of low rank of its own: W x + B A x."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None, layer.weight.device, layer.weight.dtype)
        how: dict[str, Any] = {"bias": False, "device": layer.weight.device, "dtype": layer.weight.dtype}
        self.lora_A, self.lora_B = nn.Linear(layer.in_features, rank, **how), nn.Linear(rank, layer.out_features, **how)

    def forward(self, input: Tensor) -> Tensor:
        own: Tensor = self.lora_B(self.lora_A(input))
        return super().forward(input) + own


class CompactModelForCausalLM(PreTrainedModel):  # type: ignore[misc]
    """Opens compact checkpoints, each as the model of its own architecture."""

    config_class = CompactConfig

    @classmethod
    def from_pretrained(cls, name: str, *args: Any, config: Any = None, output_loading_info: bool = False, **kwargs: Any) -> Any:
        if config is None:
            raise ValueError(f"load {name} with AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)")
        model, info = _model_class(_architecture(config), config.__class__).from_pretrained(name, *args, config=config, output_loading_info=True, **kwargs)
        if wrong := {kind: sorted(map(str, keys)) for kind, keys in info.items() if kind in ("missing_keys", "unexpected_keys", "mismatched_keys") and keys}:
            raise ValueError(f"{name}: the weights are not those that config.json describes: {wrong}")
        return (model, info) if output_loading_info else model

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        return _model_class(_architecture(config), config.__class__)._from_config(config, **kwargs)


def _architecture(config: Any) -> Any:
    """The class that the model is of when it is expanded."""
    for name in getattr(config, KEY)["expanded"].get("architectures") or []:
        known = getattr(transformers, name, None)
        if isinstance(known, type) and issubclass(known, PreTrainedModel):
            return known
    return MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[type(config).model_type]]


@cache
def _model_class(base: Any, config_class: Any) -> Any:
    """An architecture whose blocks share parameters."""

    class Sharing(base):  # type: ignore[misc]
        _auto_class = "AutoModelForCausalLM"

        def post_init(self) -> None:
            said = getattr(self.config, KEY)
            stack, blocks = _stack(self, len(said["groups"]))
            for local, ranks in said.get("ranks", {}).items():
                for block, rank in zip(blocks, ranks, strict=True):
                    if rank:
                        layer: Any = block.get_submodule(local)
                        block.set_submodule(local, VoicedLinear(layer, rank))
            self._shared = _shared(stack, blocks, said["groups"], said["private"])
            super().post_init()
            tied = {f"^{re.escape(name)}$": first for name, first in self._shared.items()}
            self._tied_weights_keys = {**(base._tied_weights_keys or {}), **tied}  # for save_pretrained, which takes the names for patterns

        def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
            patterns = self.__dict__.pop("_tied_weights_keys", None)
            try:
                return {**super().get_expanded_tied_weights_keys(all_submodels), **self._shared}
            finally:
                if patterns is not None:
                    self._tied_weights_keys = patterns

        def _adjust_bias(self, module: Any, source: Any) -> None:  # of a head that is tied to embeddings; the biases of blocks are whole
            if module is self.get_output_embeddings():
                super()._adjust_bias(module, source)

    Sharing.__name__ = Sharing.__qualname__ = CompactModelForCausalLM.__name__
    Sharing.config_class = config_class
    return Sharing


def _stack(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The name and the blocks of the largest list of so many modules."""
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no stack of {count} blocks")
    return max(lists, key=lambda found: sum(parameter.numel() for parameter in found[1].parameters()))


def _shared(stack: str, blocks: nn.ModuleList, groups: Sequence[int], private: Collection[str]) -> dict[str, str]:
    """For each parameter of a block that is the one of the first block of its group, that one."""
    found = {}
    for place, block in enumerate(blocks):
        first = groups.index(groups[place])
        if unknown := set(private) - set(block.state_dict()):
            raise ValueError(f"block {place} has no parameter {min(unknown)}")
        if place != first:
            names = [name for name, _ in block.named_parameters() if name not in private and not name.endswith((".lora_A.weight", ".lora_B.weight"))]
            found.update({f"{stack}.{place}.{name}": f"{stack}.{first}.{name}" for name in names})
    return found
