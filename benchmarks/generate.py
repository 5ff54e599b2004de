"""Tokens a second of a 4-bit model beside its bfloat16 self, and what each takes of memory. The tables in docs/running.md.

    python benchmarks/generate.py [--model FOLDER] [--layers 22] [--threads 2] [--rounds 5] [--cpu-time]

Without --model it makes a random Llama of the shapes of TinyLlama 1.1B (hidden 2048, 22 layers), which fits no cache, in --folder. Both models are in
memory at once and run by turns, dense then packed; the ratio is the median over the rounds of the ratio of neighbours, which other work on the machine
disturbs less than the speeds; those are the best of all rounds. --cpu-time counts the time of the processor, for one thread on a machine that others use
too. The floor is the bytes of weights that a token needs over the bandwidth measured before.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from adapter_bank import anonymous
from transformers import GenerationConfig, LlamaConfig

from mergekit_plus.checkpoint import Checkpoint, Plan, Step, TensorSpec, save
from mergekit_plus.generate import timed, weight_bytes
from mergekit_plus.model import meta_model, silent_transformers
from quant import Scheme
from quant.loading import load
from quant.plan import quantize

TINYLLAMA = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000}


def random_llama(layers: int) -> Checkpoint:
    """A Llama of random numbers, computed as it is read."""
    config = LlamaConfig(**TINYLLAMA, num_hidden_layers=layers, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"])
    bare = Checkpoint("random", Plan(()), {"config.json": config.to_json_string(use_diff=False).encode()})
    steps = []
    for number, (name, parameter) in enumerate(meta_model_of(bare).state_dict().items()):
        spec = TensorSpec(name, "BF16", tuple(parameter.shape))

        def run(tensors: object, first_row: int, measured: object, spec: TensorSpec = spec, seed: int = number) -> list[torch.Tensor]:
            if len(spec.shape) == 1:
                return [torch.ones(spec.shape, dtype=torch.bfloat16)]
            return [torch.randn(spec.shape, generator=torch.Generator().manual_seed(seed)).mul_(0.02).bfloat16()]

        steps.append(Step((), (spec,), run))
    return Checkpoint("random", Plan(steps), bare.files)


def meta_model_of(bare: Checkpoint) -> torch.nn.Module:
    """The model without weights; `meta_model` wants as many tensors as layers."""
    placeholders = Checkpoint.from_tensors({f"{n}": torch.zeros(0) for n in range(100)})
    return meta_model(Checkpoint(bare.label, placeholders.source, bare.files))


def bandwidth(threads: int, now: Callable[[], float]) -> float:
    """Bytes a second that this machine reads, with so many threads, from an array that is larger than its caches; the best of a few."""
    torch.set_num_threads(threads)
    array = torch.ones(1 << 28)  # 1 GiB
    seconds = []
    for _ in range(5):
        start = now()
        array.sum()
        seconds.append(now() - start)
    return array.nbytes / min(seconds)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=24, help="new ones in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-generate"))
    options = parser.parse_args()
    dense = Checkpoint.open(options.model) if options.model else made(options.folder / f"dense-{options.layers}", random_llama(options.layers))
    name = f"{options.model.name if options.model else f'random-{options.layers}'}-{options.bits}bit-{options.group_size}"
    packed = made(options.folder / name, quantize(dense, Scheme(options.bits, options.group_size), options={"clip": 0}))
    now = time.process_time if options.cpu_time else time.perf_counter
    speed = bandwidth(options.threads, now)
    ids = torch.arange(options.prompt) * 7 % 1000
    config = GenerationConfig(max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False, pad_token_id=0)
    torch.set_num_threads(options.threads)
    with silent_transformers():
        models, memory = {}, {}
        for kind, checkpoint in (("bfloat16", dense), (f"{options.bits} bits, packed", packed)):
            start = anonymous()
            models[kind] = load(checkpoint, torch.bfloat16)
            memory[kind] = anonymous() - start
        rounds = [{kind: timed(model, ids, config, now=now) for kind, model in models.items()} for _ in range(options.rounds + 1)][1:]
    print(f"{options.threads} threads, {speed / 1e9:.1f} GB/s read; prompt of {options.prompt} tokens, {options.tokens} new ones, {options.rounds} rounds\n")
    print("| | weights, MB | anonymous memory, MB | prefill, tokens/s | decode, tokens/s | of the floor |\n|---|---:|---:|---:|---:|---:|")
    for kind, model in models.items():
        read = weight_bytes(model) - model.get_input_embeddings().weight.nbytes  # of which a token needs a row
        prefill, decode = (max(getattr(each[kind], what) for each in rounds) for what in ("prefill", "decode"))
        floor = f"{decode * read / speed:.0%}"
        print(f"| {kind} | {weight_bytes(model) / 1e6:.0f} | {memory[kind] / 1e6:.0f} | {prefill:.1f} | {decode:.2f} | {floor} |")
    before, after = models
    for what in ("prefill", "decode"):
        ratios = [getattr(each[after], what) / getattr(each[before], what) for each in rounds]
        print(f"\n{what}: {statistics.median(ratios):.2f} times as fast (of neighbours {min(ratios):.2f} to {max(ratios):.2f})")


def made(folder: Path, checkpoint: Checkpoint) -> Checkpoint:
    """A checkpoint in a folder, written if it is not there."""
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        save(checkpoint, folder)
    return Checkpoint.open(folder)


if __name__ == "__main__":
    main()
