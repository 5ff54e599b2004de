"""Variants on a model: counted before anything is read, put on, and merged; the zeros of a weight outlive it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mergekit_plus.errors import OptionError, nearest

from .variant import VARIANTS, Adapter, Site, Variant


@dataclass(frozen=True)
class Share:
    """How many parameters a variant trains, on how many tensors, and their share of the model's in percent."""

    variant: str
    tensors: int
    parameters: int
    percent: float


def check_variants(variants: Sequence[str], options: Mapping[str, object]) -> list[str]:
    """Everything wrong with these variants and their options, a sentence each."""
    found = [] if variants else [f"say what is to train: {', '.join(VARIANTS)}, or several of them"]
    found += [f"unknown retraining variant '{name}'.{nearest(name, VARIANTS)}" for name in variants if name not in VARIANTS]
    found += [f"'{name}' is named twice" for name in dict.fromkeys(variants) if variants.count(name) > 1]
    known = [VARIANTS[name] for name in dict.fromkeys(variants) if name in VARIANTS]
    if "full" in variants and len(known) > 1:
        found.append(f"full trains everything; leave out {', '.join(variant.name for variant in known if variant.name != 'full')}, or full")
    tables = [variant.options.table for variant in known]
    for name in options:
        if known and not any(name in table for table in tables):
            names = list(dict.fromkeys(option for table in tables for option in table))
            found.append(f"{', '.join(variant.name for variant in known)}: no option '{name}'.{nearest(name, names)}")
    for variant in known:
        found += variant.options.problems({name: value for name, value in options.items() if name in variant.options.table})
    return found


def chosen_sites(sites: Sequence[Site], variants: Sequence[str]) -> list[Site]:
    """The sites that these variants change, each once. Errors: OptionError where a variant finds nothing to train."""
    for name in variants:
        if not any(VARIANTS[name].trains(site) for site in sites):
            raise OptionError(f"{name}: the model has nothing of the kind to train; leave it out")
    untied = "head" in variants
    return [site for site in sites if any(VARIANTS[name].trains(site) for name in variants) and (untied or not site.tied)]


def report(sites: Sequence[Site], variants: Sequence[str], options: Mapping[str, Any], total: int) -> list[Share]:
    """What each variant trains of a model of `total` parameters, and all together ("total"), each parameter once; reads nothing."""
    rows, seen, everything = [], set[str](), 0
    for name in variants:
        variant = VARIANTS[name]
        counts = {site.name: _count(variant, site, options) for site in sites if variant.trains(site) and (name != "full" or not site.tied)}
        rows.append(Share(name, len(counts), sum(counts.values()), 100 * sum(counts.values()) / total))
        everything += sum(count for site, count in counts.items() if variant.adapter is not None or site not in seen)
        seen |= counts.keys() if variant.adapter is None else set()
    return [*rows, Share("total", len(chosen_sites(sites, variants)), everything, 100 * everything / total)]


def _count(variant: Variant, site: Site, options: Mapping[str, Any]) -> int:
    weight = torch.empty(site.shape, device="meta")
    if variant.adapter is None:
        return weight.numel()
    made = variant.make(weight.T if site.transposed else weight, None, options)
    return sum(parameter.numel() for parameter in made.parameters())


class _On(nn.Module):
    """An adapter on a parameter, turned where it is stored [in, out]; in float32 whatever torch.autocast would like."""

    def __init__(self, adapter: Adapter, transposed: bool) -> None:
        super().__init__()
        self.adapter, self.transposed = adapter, transposed

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self._turned(self.adapter(self._turned(weight)))

    def merged(self, weight: Tensor) -> Tensor:
        return self._turned(self.adapter.merged(self._turned(weight)))

    def _turned(self, weight: Tensor) -> Tensor:
        return weight.T if self.transposed else weight


class Adapted:
    """A model with variants on it. `parameters` train; `masks` (for `full`) are those of the linear layers."""

    def __init__(self, module: nn.Module, sites: Sequence[Site], parameters: dict[str, nn.Parameter], masks: dict[str, Tensor]) -> None:
        self.module, self.sites, self.parameters, self.masks = module, list(sites), parameters, masks

    def merge(self) -> dict[str, Tensor]:
        """Take the adapters off, their weights merged into the model's in place: what it computes with is what it keeps.

        The changed tensors by the checkpoint's names, float32. A zero of a linear weight stays the zero that it was, bit for bit, unless an adapter
        densifies.
        """
        with torch.no_grad():
            return {site.name: self._merge(site) for site in self.sites}

    def _merge(self, site: Site) -> Tensor:
        owner, leaf = _owner(self.module, site.parameter)
        if not parametrize.is_parametrized(owner, leaf):
            return owner.get_parameter(leaf).detach()
        adapters: Any = getattr(owner.parametrizations, leaf)
        weight: Tensor = adapters.original.detach()
        merged = weight
        for one in adapters:
            merged = one.merged(merged)
        if not any(one.adapter.densifies for one in adapters):
            merged = torch.where(weight == 0, weight, merged)
        for path in (site.parameter, *site.also):
            parametrize.remove_parametrizations(*_owner(self.module, path), leave_parametrized=False)
        kept = owner.get_parameter(leaf)
        kept.copy_(merged)
        return kept.detach()


def adapt(
    module: nn.Module, sites: Sequence[Site], variants: Sequence[str], options: Mapping[str, Any] | None = None, seed: int = 0
) -> Adapted:
    """Put variants on the tensors of a model, whose weights are read in float32, in the order in which they are named.

    What blocks share is one parameter at several places, and has one adapter. The masks are those of the weights as they are now. A head tied to the
    embeddings is untied by `head`, so that they stay as they are.
    Errors: OptionError for variants that cannot be, and where there is nothing to train.
    """
    if problems := check_variants(variants, options or {}):
        raise OptionError("; ".join(problems))
    chosen = chosen_sites(sites, variants)
    generator = torch.Generator().manual_seed(seed)
    parameters: dict[str, nn.Parameter] = {}
    masks: dict[str, Tensor] = {}
    for site in chosen:
        owner, leaf = _owner(module, site.parameter)
        parameter = owner.get_parameter(leaf)
        if site.tied:
            parameter = nn.Parameter(parameter.detach().clone())
            setattr(owner, leaf, parameter)
        weight = parameter.detach()
        for name in variants:
            variant = VARIANTS[name]
            if not variant.trains(site):
                continue
            if variant.adapter is None:
                parameters[site.name] = parameter
                if name == "full" and site.role == "linear":
                    masks[site.name] = weight != 0
                continue
            made = variant.make(weight.T if site.transposed else weight, generator, options or {})
            on = _On(made, site.transposed)
            for path in (site.parameter, *site.also):
                parametrize.register_parametrization(*_owner(module, path), on)
            parameters |= {f"{site.name} {name}.{inner}": value for inner, value in made.named_parameters()}
    return Adapted(module, chosen, parameters, masks)


def _owner(module: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that a parameter belongs to, and its name there."""
    above, _, leaf = path.rpartition(".")
    return module.get_submodule(above), leaf
