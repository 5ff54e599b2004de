"""Smaller ordinary models: whole neurons of the MLPs and whole attention heads go, the same number in every block, so that config.json says it all.

A neuron is a row of the layers that make it (gate, up) and a column of the layer that reads it (down); a group of heads is the rows of one key-value head
and of the query heads that share it, and their columns of the output projection. What a unit counts for is the squared norm of all its weights, or, on a
text, the squared norm of what the reading layer would lose without it, `tr(W_S G_SS W_S^T)` with the Gram matrix G of its inputs. There, the columns that
are left are then fitted to the whole layer's outputs by least squares: `W' = W G_:K (G_KK)^-1`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, copy_step
from mergekit_plus.errors import CheckpointError, OptionError, nearest
from mergekit_plus.model import NEURON_COUNTS, NEURONS, ModelMap, adapter_reason, describe, meta_model, quantized_reason
from mergekit_plus.moments import Moments

# The layers that make a unit, and the one that reads it, by the last part of their names.
LAYERS: dict[str, tuple[tuple[tuple[str, ...], str], ...]] = {
    "mlp": NEURONS,
    "heads": ((("q_proj", "k_proj", "v_proj"), "o_proj"),),
}


@dataclass(frozen=True)
class Site:
    """A place in a block where units go: the tensors that make them, weights and biases, along their rows; the weight that reads them, along its columns."""

    block: str
    makers: tuple[str, ...]
    reader: str
    units: int
    removed: int

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.makers, self.reader)

    def dim(self, name: str) -> int:
        return int(name == self.reader)

    def smaller(self, spec: TensorSpec) -> TensorSpec:
        """What is left of a tensor."""
        shape = list(spec.shape)
        shape[self.dim(spec.name)] = shape[self.dim(spec.name)] * (self.units - self.removed) // self.units
        return replace(spec, shape=tuple(shape))

    def take(self, name: str, tensor: Tensor, kept: Tensor) -> Tensor:
        """The units `kept` (int64) of a tensor."""
        dim = self.dim(name)
        width = tensor.shape[dim] // self.units
        places = (kept[:, None] * width + torch.arange(width)).flatten()
        chosen: Tensor = tensor.index_select(dim, places)
        return chosen

    def kept(self, importance: Tensor) -> Tensor:
        """The units that count most, in their order; of equal ones the last."""
        best: Tensor = importance.argsort(stable=True)[self.removed :].sort().values
        return best


def problems(structured: Mapping[str, object]) -> list[str]:
    """Everything wrong with what is to go, a sentence each."""
    found = [f"structured: unknown part '{kind}'.{nearest(kind, LAYERS)}" for kind in structured if kind not in LAYERS]
    for kind, share in structured.items():
        if kind in LAYERS and (isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share < 1):
            found.append(f"structured: {kind}={share!r}: a share from 0 to below 1")
    return found or ([] if any(structured.values()) else ["structured: say what goes, as in mlp=0.25 or heads=0.5"])


def by_norm(site: Site, tensors: Mapping[str, Tensor]) -> Tensor:
    """The squared norm of all weights of each unit, float64 [units]."""
    total = torch.zeros(site.units, dtype=torch.float64)
    for name, tensor in tensors.items():
        squares = tensor.double().square_()
        rows = squares if squares.dim() == 1 else squares.sum(1 - site.dim(name))  # along the units
        total += rows.view(site.units, -1).sum(1)
    return total


def by_gram(site: Site, reader: Tensor, moments: Moments) -> Tensor:
    """The squared norm of what the outputs lose without each unit, float64 [units]."""
    width = reader.shape[1] // site.units
    columns = reader.double().view(len(reader), site.units, width).permute(1, 2, 0)  # [units, width, out]
    blocks = moments.gram.double().view(site.units, width, site.units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # [units, width, width]
    return (columns * (blocks @ columns)).sum((1, 2))


def refit(reader: Tensor, gram: Tensor, columns: Tensor, damp: float = 0.01) -> Tensor:
    """The weight [out, kept] on these columns that comes nearest to the whole one's outputs, float32."""
    full = gram.double()
    inner = full[columns][:, columns]
    inner.diagonal().add_(damp * full.diagonal().mean() + torch.finfo(torch.float64).tiny)
    # relative to the columns as they are, so that the damping pulls to them and not to zero
    error = reader.double() @ full[:, columns] - reader.double()[:, columns] @ full[columns][:, columns]
    change: Tensor = torch.linalg.solve(inner, error.T).T
    return (reader.double()[:, columns] + change).float()


def shrink(checkpoint: Checkpoint, structured: Mapping[str, float]) -> Checkpoint:
    """The checkpoint without the units of least norm: `{"mlp": 0.25}` removes a quarter of every MLP's neurons, `{"heads": 0.5}` half of the groups of heads.

    Errors: OptionError for shares that cannot be; CheckpointError for a model whose layers are not known to have such units, or that transformers cannot
    build without them.
    """
    found = sites(checkpoint, structured)
    steps = []
    for site in found:
        reads = tuple((checkpoint, name) for name in site.names)
        steps.append(Step(reads, tuple(site.smaller(checkpoint.specs[name]) for name in site.names), _Shrink(site)))
    return smaller_checkpoint(checkpoint, structured, steps)


class _Shrink:
    """Take the units of greatest norm of the tensors of one site."""

    def __init__(self, site: Site) -> None:
        self.site = site

    def __call__(self, tensors: Sequence[Tensor], first_row: int, measured: Any) -> Sequence[Tensor]:
        named = dict(zip(self.site.names, tensors, strict=True))
        kept = self.site.kept(by_norm(self.site, named))
        return [self.site.take(name, tensor, kept) for name, tensor in named.items()]


def sites(checkpoint: Checkpoint, structured: Mapping[str, float]) -> list[Site]:
    """Where units go, in every block. Errors: as `shrink`."""
    if found := problems(structured):
        raise OptionError("; ".join(found))
    if reason := quantized_reason(checkpoint) or adapter_reason(checkpoint):
        raise CheckpointError(reason)
    roles = describe(checkpoint)
    if not checkpoint.config or not roles.blocks:
        raise CheckpointError(f"{checkpoint.label}: units of layers can be taken out of a model with blocks and a config.json only")
    places = []
    for kind, share in structured.items():
        for names in roles.blocks.values():
            site = _site(checkpoint, roles, kind, names)
            places.append(replace(site, removed=int(Fraction(str(share)) * site.units)))
        if len({(site.units, site.removed) for site in places[-len(roles.blocks) :]}) > 1:
            raise CheckpointError(f"{checkpoint.label}: blocks differ in their {kind}; only what is the same in every block can be taken out")
    return [site for site in places if site.removed]


def _site(checkpoint: Checkpoint, roles: ModelMap, kind: str, names: Sequence[str]) -> Site:
    """The site of a kind in the block of these tensors, nothing removed yet."""
    place = roles.tensors[names[0]]
    block = f"{place.stack}.{place.block}"
    modules: dict[str, list[str]] = {}
    for name in names:
        if roles.tensors[name].role == "linear" and not roles.tensors[name].transposed:
            modules.setdefault(name.split(".")[-2], []).append(name.removesuffix(".weight"))
    for makers, reader in LAYERS[kind]:
        if all(len(modules.get(leaf, ())) == 1 for leaf in (*makers, reader)):
            weights = [f"{modules[leaf][0]}.weight" for leaf in makers]
            biases = [bias for leaf in makers if (bias := f"{modules[leaf][0]}.bias") in checkpoint.specs]
            site = Site(block, (*weights, *biases), f"{modules[reader][0]}.weight", _units(checkpoint, kind, checkpoint.specs[weights[0]].rows), 0)
            if site.units and all(checkpoint.specs[name].shape[site.dim(name)] % site.units == 0 for name in site.names):
                return site
    known = " or ".join(" + ".join((*makers, reader)) for makers, reader in LAYERS[kind])
    raise CheckpointError(f"{checkpoint.label}: {block} is not known to have {kind} that can be taken out (one each of {known})")


def _units(checkpoint: Checkpoint, kind: str, rows: int) -> int:
    """Neurons, or groups of heads that share a key-value head; 0 where config.json does not say."""
    config = checkpoint.config
    if kind == "mlp":
        return rows if rows in (config.get(key) for key in NEURON_COUNTS) else 0
    groups = config.get("num_key_value_heads") or config.get("num_attention_heads")
    return groups if isinstance(groups, int) else 0


def smaller_checkpoint(checkpoint: Checkpoint, structured: Mapping[str, float], steps: Sequence[Step]) -> Checkpoint:
    """The checkpoint with what these steps write, under the config of the smaller model, if transformers builds it with just these shapes."""
    written = {write.name for step in steps for write in step.writes}
    rest = [copy_step(checkpoint, name) for name in checkpoint.specs if name not in written]
    label = ", ".join(f"{kind} {share:g}" for kind, share in structured.items())
    result = Checkpoint(f"{checkpoint.label} without {label}", Plan([*steps, *rest]), checkpoint.files, checkpoint.notes)
    roles = describe(checkpoint)
    result = result.with_config(**_config(checkpoint, result, roles))
    built = meta_model(result).state_dict()
    for name, spec in result.specs.items():
        wanted = built.get(roles.tensors[name].parameter or "")
        if wanted is not None and tuple(wanted.shape) != spec.shape:
            raise CheckpointError(f"{checkpoint.label}: its architecture cannot be built smaller: {name} would be {list(wanted.shape)}, not {list(spec.shape)}")
    return result


def _config(checkpoint: Checkpoint, result: Checkpoint, roles: ModelMap) -> dict[str, Any]:
    """What config.json must say of the smaller model: widths and heads, from the shapes of its first block."""
    config = checkpoint.config
    changes: dict[str, Any] = {}
    for name in next(iter(roles.blocks.values())):
        before, after, leaf = checkpoint.specs[name], result.specs[name], name.split(".")[-2]
        if before.shape == after.shape or not name.endswith(".weight"):
            continue
        if leaf in ("down_proj", "fc2"):
            changes |= {key: after.shape[1] for key in NEURON_COUNTS if key in config}
        if leaf == "q_proj":
            heads = config["num_attention_heads"]
            changes |= {"num_attention_heads": heads * after.rows // before.rows, "head_dim": before.rows // heads}
        if leaf == "k_proj" and config.get("num_key_value_heads"):
            changes["num_key_value_heads"] = config["num_key_value_heads"] * after.rows // before.rows
    return changes
