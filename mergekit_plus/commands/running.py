"""The door to what runs a model. Heavy things are imported where they are used."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from .common import Device, Model, app, check_device


@app.command()
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="text to continue")],
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", "-n", help="at most (default: 128, or what the model has room for)")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", help="draw tokens by their probability at it (default: the likeliest token)")] = None,
    top_p: Annotated[float, typer.Option("--top-p", help="draw among the likeliest tokens that make up so much of the probability")] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="of what is drawn")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="the prompt is what a user says, in the model's chat template")] = False,
    dtype: Annotated[str | None, typer.Option("--dtype", help="float dtype to run in (default: the model's own)")] = None,
    threads: Annotated[int | None, typer.Option("--threads", min=1, help="of the processor (default: torch's)")] = None,
    device: Device = "cpu",
) -> None:
    """Continue a text with a model as it is stored.

    Packed weights stay packed. The text goes to stdout, tokens a second to stderr.

    `compress generate merged-4bit --prompt "def main("`
    """
    from mergekit_plus.checkpoint.dtypes import TORCH_DTYPES, parse_float_dtype
    from mergekit_plus.generate import Sampling
    from mergekit_plus.generate import generate as run
    from mergekit_plus.progress import on
    from mergekit_plus.show import speed_line
    from quant.loading import opened

    def write(text: str) -> None:
        print(text, end="", flush=True)

    check_device(device)
    checkpoint, adapters = opened(model)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    float_type = TORCH_DTYPES[parse_float_dtype(dtype)] if dtype else None
    try:
        speed = run(checkpoint, prompt, sampling, write, adapters=adapters, chat=chat, dtype=float_type, device=device, threads=threads, progress=on())
    except KeyboardInterrupt:
        print("\ncompress: interrupted", file=sys.stderr)
        raise typer.Exit(130) from None
    print(f"compress: {speed_line(speed)}", file=sys.stderr)
