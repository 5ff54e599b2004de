"""Sparsity dealt out to the layers of a model: more zeros where they change its predictions least.

Every linear layer is pruned to each of a few sparsities around the one that is asked for, while the rest of the model stands at that one, and what this does
to the predictions on a text is measured (KL at the logits). The integer program that deals out bits then deals out zeros: one sparsity for each layer, of
least summed loss; the largest layer gives back what was dealt out too much, so that the asked number goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import partial

from torch import Tensor

from prune import PRUNERS, Sparsity
from prune.calibrated import prune_on
from prune.plan import DEFAULTS, PruneOptions, choose, prune, pruned_checkpoint
from quant.allocate import solve
from quant.sensitivity import measure

from .checkpoint import Checkpoint, Deferred, Work, copy_step

STEPS = (Fraction(-1, 5), Fraction(-1, 10), Fraction(0), Fraction(1, 10), Fraction(1, 5))  # around the sparsity that is asked for
MOST = Fraction(19, 20)


def prune_allocated(
    checkpoint: Checkpoint,
    ids: Tensor,
    sparsity: Sparsity,
    method: str = "magnitude",
    scope: str | None = None,
    options: Mapping[str, object] | None = None,
    how: PruneOptions = DEFAULTS,
) -> Checkpoint:
    """As `prune` and `prune_on`, with a sparsity for each layer, measured on a text: int64 ids [windows, window]. Computed when it is first read.

    A method that looks at a text prunes once more with what was dealt out, block after block. Memory: what `quant.sensitivity.measure` says.
    """
    chosen = choose(checkpoint, how)
    choices = sorted({sparsity.share + step for step in STEPS if 0 <= sparsity.share + step <= MOST} | {sparsity.share})
    calibrated = PRUNERS[method].calibrated

    def pruned(share: Fraction) -> Checkpoint:
        asked = replace(sparsity, share=share)
        return prune_on(checkpoint, ids, asked, method, scope, options, how) if calibrated else prune(checkpoint, asked, method, scope, options, how)

    plans = {share: pruned(share) for share in choices}
    groups: dict[str | None, list[str]] = {}  # experts that the model packs into one parameter share a sparsity
    for name in chosen.names:
        groups.setdefault(chosen.roles.tensors[name].parameter, []).append(name)

    def compute(work: Work) -> None:
        sizes = [sum(checkpoint.specs[name].numel for name in group) for group in groups.values()]
        standing = [choices.index(sparsity.share)] * len(groups)
        alike = [tuple(group) for group in groups.values()]
        found = measure(checkpoint, alike, choices, plans.__getitem__, ids, reference=standing, device=how.device, progress=work.progress)
        kept = [[size - replace(sparsity, share=share).count(size) for share in choices] for size in sizes]
        solution = solve(found.losses, kept, budget=sum(sizes) - sparsity.count(sum(sizes)))
        shares = {name: choices[choice] for group, choice in zip(alike, solution.choices, strict=True) for name in group}
        zeros = {name: int(share * checkpoint.specs[name].numel) for name, share in shares.items()}
        most = max(zeros, key=lambda name: zeros[name])
        excess = sum(zeros.values()) - sparsity.count(sum(sizes))
        shares[most] = Fraction(zeros[most] - min(excess, zeros[most]), checkpoint.specs[most].numel)
        dealt = {name: replace(sparsity, share=share) for name, share in shares.items()}
        final = prune_on(checkpoint, ids, dealt, method, scope, options, how) if calibrated else None
        for number, (name, share) in enumerate(shares.items()):
            made = final or plans.get(share) or pruned(share)
            work.part(f"layer-{number}", partial(lambda name, made: {name: made.read(name)}, name, made))

    made = Checkpoint(checkpoint.label, Deferred([checkpoint.specs[name] for name in chosen.names], [checkpoint], compute, passes=len(choices) + 1))
    steps = [copy_step(made, name) for name in chosen.names] + [copy_step(checkpoint, name) for name in chosen.copied]
    return replace(pruned_checkpoint(chosen, steps), label=f"{checkpoint.label} pruned to {sparsity} by {method}, dealt out")
