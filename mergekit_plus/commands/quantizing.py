"""Doors to quantizing. Heavy things are imported where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from .common import (
    Calibrate,
    CalibrationSeed,
    CalibrationWindow,
    CalibrationWindows,
    Device,
    Exclude,
    FewWindows,
    Include,
    Json,
    Model,
    Overwrite,
    Set,
    Writing,
    app,
    beside,
    calibration_key,
    carry_out,
    check_device,
    hash_early,
    open_model,
    print_result,
    settings,
    text_key,
    writes,
)


@app.command()
@writes()
def quantize(
    *,
    how: Writing,
    model: Model = ".",
    bits: Annotated[int | None, typer.Option("--bits", help="2 to 8 bits a weight (default: 4)")] = None,
    group_size: Annotated[int, typer.Option("--group-size", help="weights that share a scale; 0 for a whole output row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    scheme: Annotated[str | None, typer.Option("--scheme", help="W8A8, FP8, FP8_BLOCK, NVFP4 or MXFP4, in place of bits and groups")] = None,
    allocation: Annotated[Path | None, typer.Option("--allocation", metavar="FILE", help="bits.yaml of `compress allocate`: a scheme for each layer")] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "rtn",
    format_: Annotated[
        str | None, typer.Option("--format", help="pack-quantized (compressed-tensors, by default), gptq, gptq_v2, or dense: the dequantized weights")
    ] = None,
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    include: Include = [],  # noqa: B006
    calibration: Calibrate = [],  # noqa: B006
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
    order: Annotated[
        Literal["block", "layer"] | None,
        typer.Option("--order", help="layer: measure what stands behind other layers of a block again after these (default: block)"),
    ] = None,
    norm_passes: Annotated[
        int, typer.Option("--norm-passes", min=0, help="passes over the text in which the norms of each block are tuned to the original's outputs")
    ] = 0,
    biases: Annotated[bool, typer.Option("--biases", help="correct the biases of the layers, where they have some, for the mean of their outputs")] = False,
    moments: Annotated[str | None, typer.Option("--moments", metavar="FILE", help="what `compress calibrate` wrote, in place of a text")] = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="write the residual stream in another basis first: fewer outliers, the same function")] = False,
) -> None:
    """Quantize a model's linear layers.

    `compress quantize merged --bits 4`

    `compress quantize merged --bits 3 --method gptq --calibration code.txt`
    """
    digests = None if how.resume else hash_early(model)
    from mergekit_plus.recipe import check

    step = {
        "bits": 4 if (bits, scheme, allocation) == (None, None, None) else bits, "group_size": group_size, "symmetric": not asymmetric, "scheme": scheme,
        "allocation": allocation and str(allocation), "method": method, "format": format_, "exclude": exclude, "include": include, "rotate": rotate,
        "norm_passes": norm_passes, "biases": biases, **calibration_key(calibration, windows=windows, window=window, seed=seed, order=order), **settings(set_),
    }  # fmt: skip
    inputs = {"model": model}
    if moments is not None:
        inputs["moments"], step["moments"], step["of"] = moments, "moments", "model"
    recipe = check({"inputs": inputs, "steps": [{"quantize": step}]}, Path(), "compress quantize")
    what = scheme.lower() if scheme else "mixed" if allocation else f"{step['bits']}bit"
    default = beside(model, f"{what}-dense", "file") if format_ == "dense" else beside(model, what, "folder")
    carry_out(recipe, how, default, digests)


@app.command()
@writes("allow_nonfinite")
def calibrate(
    *,
    how: Writing,
    model: Model = ".",
    text: Annotated[list[str], typer.Option("--text", "-t", metavar="FILE", help="text to flow through the model: .txt, .jsonl, a folder; may be repeated")],
    windows: CalibrationWindows = None,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
) -> None:
    """Measure what reaches the layers of a model on a text.

    The moments serve any number of `compress quantize --moments`.

    `compress calibrate merged --text code.txt`
    """
    from mergekit_plus.recipe import check

    step = {"text": text_key(text, windows=windows, window=window, seed=seed)}
    recipe = check({"inputs": {"model": model}, "steps": [{"calibrate": step}]}, Path(), "compress calibrate")
    carry_out(recipe, how, beside(model, "moments", "file").with_suffix(".safetensors"))


@app.command()
def allocate(
    model: Model = ".",
    bits_per_weight: Annotated[float | None, typer.Option("--bits-per-weight", help="budget: stored bits of a quantized weight, scales and all")] = None,
    size: Annotated[str | None, typer.Option("--size", help="budget: bytes of the weight files, as in 8.1MB, with all that is not quantized")] = None,
    max_loss: Annotated[float | None, typer.Option("--max-loss", help="fewest bits within this KL, nats a token")] = None,
    choices: Annotated[str, typer.Option("--choices", help="bits to choose from; 4g32: with a group size of its own, 4a: asymmetric")] = "2,3,4,6,8",
    group_size: Annotated[int, typer.Option("--group-size", help="weights that share a scale; 0 for a whole output row")] = 128,
    asymmetric: Annotated[bool, typer.Option("--asymmetric", help="with zero points")] = False,
    calibration: Calibrate = [],  # noqa: B006
    windows: FewWindows = 24,
    window: CalibrationWindow = None,
    seed: CalibrationSeed = None,
    sensitivity: Annotated[Literal["kl", "fisher", "gram"], typer.Option("--sensitivity", help="how a layer's loss is measured")] = "kl",
    reference: Annotated[
        str | None, typer.Option("--reference", help="the choice of all other layers while one is measured, or dense (default: the middle choice)")
    ] = None,
    method: Annotated[str, typer.Option("--method", "-m", help="see `compress methods`")] = "rtn",
    format_: Annotated[str, typer.Option("--format", help="what will be stored: pack-quantized, ...")] = "pack-quantized",
    set_: Set = [],  # noqa: B006
    exclude: Exclude = [],  # noqa: B006
    candidates: Annotated[int, typer.Option("--candidates", min=1, help="allocations that are measured on held-out windows")] = 8,
    sensitivities: Annotated[Path | None, typer.Option("--sensitivities", help="file of losses: read where it exists, else written")] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="picture of the bits of each layer: .svg, .png or .pdf (needs matplotlib)")] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="file to write")] = Path("bits.yaml"),
    overwrite: Overwrite = False,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Find the bits that each layer needs, within a budget.

    `compress allocate merged --bits-per-weight 3.5 --calibration code.txt`

    `compress quantize merged --allocation bits.yaml`
    """
    from mergekit_plus.calibration.options import CalibrationOptions
    from mergekit_plus.checkpoint.shards import parse_size
    from mergekit_plus.compare import check_picture
    from mergekit_plus.errors import OptionError
    from mergekit_plus.progress import on
    from mergekit_plus.show import allocation_lines
    from quant.allocation import AllocateOptions, allocate_bits, facts, parse_choice, parse_choices
    from quant.mixed import Budget

    if not calibration:
        raise OptionError("allocate measures on a text: give one with --calibration FILE")
    if plot is not None:
        check_picture(plot)
    check_device(device)
    text = CalibrationOptions.model_validate(text_key(calibration, windows=windows, window=window, seed=seed))
    for problem in text.problems(Path()):
        raise OptionError(f"--calibration: {problem}")
    dense = reference is None or reference == "dense"
    options = AllocateOptions(
        Budget(bits_per_weight, parse_size(size) if size else None, max_loss), parse_choices(choices, group_size, not asymmetric), text, sensitivity,
        reference if dense else parse_choice(str(reference), group_size, not asymmetric), method, settings(set_), format_, tuple(exclude), candidates,
        sensitivities, overwrite, device,
    )  # fmt: skip
    written = allocate_bits(open_model(model), options, out, on())
    if plot is not None:
        from mergekit_plus.bits_plot import draw_bits

        draw_bits(written.table.groups, written.table.choices, written.result.chosen.selection, plot)
    found = facts(written)
    print_result(found, allocation_lines(found), as_json)


@app.command()
@writes("device", "allow_nonfinite")
def dequantize(
    *,
    how: Writing,
    model: Model = ".",
) -> None:
    """Turn a packed model back into a dense one.

    It may be packed as compressed-tensors, GPTQ or AWQ do.

    `compress dequantize merged-4bit`
    """
    from mergekit_plus.recipe import check

    recipe = check({"inputs": {"model": model}, "steps": [{"dequantize": {}}]}, Path(), "compress dequantize")
    carry_out(recipe, how, beside(model, "dense", "file"))


@app.command()
@writes("device", "allow_nonfinite")
def convert(
    *,
    how: Writing,
    model: Model = ".",
    to: Annotated[str, typer.Option("--to", help="pack-quantized, gptq, gptq_v2 or int-quantized")],
) -> None:
    """Store a packed model in another format, code for code.

    `compress convert merged-4bit --to gptq`
    """
    from mergekit_plus.recipe import check

    recipe = check({"inputs": {"model": model}, "steps": [{"convert": {"to": to}}]}, Path(), "compress convert")
    carry_out(recipe, how, beside(model, to, "folder"))
