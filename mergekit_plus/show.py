"""Results as lines of text for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .adapters.extract import Kept
    from .generate import Speed
    from .recipe import Outcome


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows of a table under their headings; the headings are the rows' keys, in order of appearance."""
    heads = list(dict.fromkeys(head for row in rows for head in row))
    cells = [heads] + [[_cell(row.get(head)) for head in heads] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(heads))]
    return ["  ".join(text.ljust(width) if column == 0 else text.rjust(width) for column, (text, width) in enumerate(zip(line, widths, strict=True)))
            for line in cells]  # fmt: skip


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and abs(value) < 1 else f"{value:.2f}" if isinstance(value, float) else str(value)


def size(nbytes: float) -> str:
    """Bytes as a person reads them: "1.94 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= factor:
            return f"{nbytes / factor:.2f} {unit}"
    return f"{nbytes:.0f} B"


def speed_line(speed: Speed) -> str:
    """How fast `compress generate` was."""
    decode = "" if speed.decode is None else f"; then {speed.decode:.1f} tokens/s, {speed.new_tokens} in all"
    return f"prompt of {speed.prompt_tokens} tokens at {speed.prefill:.1f} tokens/s{decode}; weights of {size(speed.weight_bytes)}"


def method_lines(facts: Mapping[str, Any]) -> list[str]:
    """`compress methods`."""
    lines: list[str] = []
    for name, entry in facts.items():
        base = ", needs --base" if entry.get("needs_base") else ", takes --base" if entry.get("takes_base") else ""
        base = ", from --base, or the first of two models" if entry.get("from_first") else base
        lines.append(f"{name} ({entry['kind']}{base}): {entry['summary']}")
        for option in entry["options"]:
            default = "required" if option["required"] else f"default {option['default']}"
            about = ", ".join(map(str, option["choices"])) + "; " if option["choices"] else ""
            lines.append(f"    -s {option['name']}=  {option['help']} ({about}{default}{'; one value, or one for each model' if option['per_model'] else ''})")
    return lines


def inspection_lines(facts: Mapping[str, Any]) -> list[str]:
    """`compress inspect`."""
    kind = "{type} adapter of {base}".format(**facts["adapter"]) if facts["adapter"] else facts["architecture"]
    lines = [
        f"{facts['label']}: {kind}, {facts['tensors']} tensors in {facts['files']} file{'s' * (facts['files'] != 1)}, {size(facts['bytes'])}",
        f"{facts['parameters'] / 1e6:.2f} M parameters, {facts['bits_per_weight']:.3g} bits a weight; "
        + ", ".join(f"{dtype} {size(nbytes)}" for dtype, nbytes in facts["dtypes"].items()),
        "roles: " + ", ".join(f"{count} {role}" for role, count in facts["roles"].items()) + f"; {facts['blocks']} block{'s' * (facts['blocks'] != 1)}",
    ]
    if facts["fused"]:
        lines.append("fused by servers: " + "; ".join(facts["fused"]))
    if facts["tied"]:
        lines.append("tied: " + ", ".join(" = ".join(names) for names in facts["tied"]))
    if facts["quantized"]:
        lines.append(facts["quantized"])
    if adapter := facts["adapter"]:
        lines.append(f"{adapter['modules']} modules of rank {', '.join(map(str, adapter['ranks']))}")
    if packed := facts["packed"]:
        coding = f"{packed['bits']:.3g} bit{'s' * (packed['bits'] != 1)}, {packed['codebook']}, a scale for each {packed['scale']}"
        lines.append(f"packed: {size(packed['bytes'])} on the disk, {coding}; above is what it expands to")
    if compact := facts["compact"]:
        groups, voices = compact["groups"], f", voices of rank {compact['rank']} at most" if compact["rank"] else ""
        share = f"{len(groups)} blocks in {len(set(groups))} groups ({','.join(map(str, groups))}){voices}"
        lines.append(f"compact: {size(compact['bytes'])} on the disk, {compact['parameters'] / 1e6:.1f} M weights, {share}; above is what it expands to")
    return lines + [f"  {t['name']}  {t['dtype']} {tuple(t['shape'])}  {t['role']}" for t in facts.get("list", [])]


def verification_lines(facts: Mapping[str, Any]) -> list[str]:
    """`compress verify`."""
    found = [*(f"{each['file']}: {each['problem']}" for each in facts["problems"]), *facts["wrong"], *(f"note: {note}" for note in facts["notes"])]
    checked = f"{facts['files']} file{'s' * (facts['files'] != 1)}, {size(facts['bytes'])}"
    recorded = f"{len(facts['problems'])} not as recorded" if facts["problems"] else "all as recorded"
    return [*found, f"{facts['out']}: {checked}; {recorded}{'; engines would load it wrongly' if facts['wrong'] else ''}"]


def plan_lines(facts: Mapping[str, Any]) -> list[str]:
    """`--dry-run`."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["tensors"].items())
    times = 1 + facts["bytes_measured"] / max(1, facts["bytes_read"])
    again = f", {times:.2g} times in all to measure the whole model first" if facts["bytes_measured"] else ""
    if facts["computations"]:
        again = f", and {size(facts['bytes_measured'])} before that for a computation over the whole model"
    hub = []
    if facts["cached"]:
        hub = [f"brings {size(facts['cached'])} from the Hub into its local cache"]
    elif facts["from_hub"]["bytes"]:
        advice = "; --cache brings the models to the disk and reads them once" if facts["measurements"] else ""
        hub = [f"from the Hub: {size(facts['from_hub']['bytes'])} in {facts['from_hub']['requests']} requests{advice}"]
    return [
        f"would write {facts['out']}: {kinds}; {size(facts['bytes_written'])} in {facts['files']} file{'s' * (facts['files'] != 1)}",
        f"reads {size(facts['bytes_read'])}{again}; hashes {size(facts['bytes_hashed'])} beside that; "
        f"at most {size(facts['peak_memory'])} in flight ({facts['workers']} workers, largest unit {size(facts['largest_unit'])}); "
        f"needs {size(facts['disk_needed'])} on the disk, {size(facts['disk_free'])} are free",
        *hub,
        *facts["notes"],
    ]


def comparison_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """`compress compare`: what is a logarithm, or a share, with four digits."""
    return table([{head: _digits(value) if head.startswith(("mean log", "norm ")) else value for head, value in row.items()} for row in rows])


def search_lines(record: Mapping[str, Any]) -> list[str]:
    """What a search tried, a line for each model that it measured, and what it found."""
    trace = record["evaluations"]
    best = next(index for index, row in enumerate(trace) if row["options"] == record["found"])
    rows = [
        {"search": f"{index + 1}{' *' * (index == best)}", **{name: _values(value) for name, value in row["options"].items()},
         record["objective"]: _digits(row["objective"]), **{name: _digits(loss) for name, loss in row["losses"].items()}}
        for index, row in enumerate(trace)
    ]  # fmt: skip
    lines = table(rows)
    found = ", ".join(f"{name} {_values(value)}" for name, value in record["found"].items())
    lines += ["", f"found {found}: {record['objective']} {_digits(trace[best]['objective'])}, {_digits(trace[0]['objective'])} at the start", ""]
    if "heldout" in record:
        rows = [{"held-out": row["model"], **{name: _digits(loss) for name, loss in row["losses"].items()}, "mean": _digits(row["mean"])}
                for row in record["heldout"]]  # fmt: skip
        lines += [*table(rows), ""]
    return lines


def _digits(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _values(value: float | Sequence[float] | Mapping[str, Any]) -> str:
    if isinstance(value, Mapping):
        return " ".join(f"{name} {_values(part)}" for name, part in value.items())
    return ",".join(f"{number:g}" for number in (value if isinstance(value, list | tuple) else [value]))


def kept_lines(tensors: Sequence[Kept]) -> list[str]:
    """`compress adapter extract`: what each module keeps, what is left out, and what is lost of it all."""
    from .adapters.extract import overall

    lines = [f"{t.name}  rank {t.rank}, relative error {t.relative:.3g}" for t in tensors if t.kind == "low rank"]
    lines += [f"{t.name}  stored whole" for t in tensors if t.kind == "whole"]
    lines += [f"{t.name}  left out: a change of norm {t.change:.3g}" for t in tensors if t.kind == "left out"]
    low = [t for t in tensors if t.kind == "low rank"]
    left_out = len([t for t in tensors if t.kind == "left out"])
    advice = f"; {left_out} changed tensors are left out (--save-rest stores them)" if left_out else ""
    return [*lines, f"relative error {overall(low):.3g} over {len(low)} modules, {overall(tensors):.3g} over all that changed{advice}"]


def allocation_lines(facts: Mapping[str, Any]) -> list[str]:
    """`compress allocate`: the candidates, what is proven, the schemes, and the file."""
    kinds = dict.fromkeys(layer["scheme"] for layer in sorted(facts["layers"], key=lambda layer: layer["bits"]))
    counts = {kind: sum(layer["scheme"] == kind for layer in facts["layers"]) for kind in kinds}
    widest = max(len(layer["layers"]) for layer in facts["layers"])
    proof = f"proven optimal by {facts['by']}" if facts["proven"] else f"within {facts['gap']:.3g} of the optimum"
    return [
        *(f"{layer['layers']:{widest}}  {layer['scheme']}" for layer in facts["layers"]), "",
        *table(facts["candidates"]), "",
        f"objective {facts['objective']:.6g} {facts['unit']}, bound {facts['bound']:.6g}, gap {facts['gap']:.2g}: {proof}; "
        f"reduced costs fixed {facts['fixed']} of {len(facts['layers'])} groups",
        "; ".join(f"{count} groups in {kind}" for kind, count in counts.items()),
        f"wrote {facts['out']}: {facts['bits_per_weight']:.4f} stored bits a quantized weight, {size(facts['file_bytes'])} of weight files; "
        f"`compress quantize MODEL --allocation {facts['out']}` makes them",
    ]  # fmt: skip


def depth_lines(facts: Mapping[str, Any]) -> list[str]:
    """`compress fold --budget`: the candidates, what stays and shares, and the file."""
    return [
        *table(facts["candidates"]), "",
        f"blocks: {facts['blocks']}",
        f"wrote {facts['out']}: {facts['bytes']:.1%} of the bytes, {facts['operations']:.1%} of the operations of blocks; "
        f"{facts['loss']:.4f} nats a token are lost before any cure; "
        f"`compress fold MODEL --plan {facts['out']}` makes it",
    ]  # fmt: skip


def outcome_facts(outcome: Outcome) -> dict[str, Any]:
    """A run as data."""
    return {
        "out": str(outcome.out), "commit": outcome.published and outcome.published[1],
        "bytes": sum(file["bytes"] for file in outcome.manifest.outputs.values()),
        "outputs": outcome.manifest.outputs, "inputs": outcome.manifest.inputs, "measured": outcome.table, "failures": outcome.failures,
        "checks": [{"check": verdict.what, "kept": verdict.kept, "found": verdict.found} for verdict in outcome.verdicts], "sampled": outcome.sampled,
        "searched": outcome.searched, "sparsity": outcome.sparsity,
    }  # fmt: skip


def outcome_lines(outcome: Outcome) -> list[str]:
    """A run as text: its table, where it lies, and what failed."""
    lines = [line for record in outcome.searched for line in search_lines(record)]
    lines += [*table(outcome.table), ""] if outcome.table else []
    lines += [f"{sample['prompt']} >> {sample['text']}" for sample in outcome.sampled]
    if zeros := outcome.sparsity:
        counts = f"{zeros['zeros']} of {zeros['weights']} weights in {len(zeros['tensors'])} linear layers are zero"
        lines.append(f"{counts}: {zeros['share']:.2%}, asked: {zeros['asked']}")
    total = sum(file["bytes"] for name, file in outcome.manifest.outputs.items() if name.endswith(".safetensors"))
    if not outcome.published or outcome.published[0] != outcome.out:
        lines.append(f"wrote {outcome.out}: {size(total)}")
    if outcome.published:
        target, commit = outcome.published
        lines.append(f"published {target}: {size(total)}, commit {commit[:7]}")
    return lines
