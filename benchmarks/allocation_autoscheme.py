"""AutoRound's AutoScheme, run in an interpreter that has it: the bits that it gives each layer, for `allocation.py`.

    python allocation_autoscheme.py MODEL TEXT.jsonl OUT.json GROUP_SIZE CHOICES AVERAGE_BITS...

q/k/v and gate/up are declared shared, which AutoScheme does not do by itself; its averages count scales, as ours do. The rest are its defaults.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from auto_round import AutoRound, AutoScheme
from auto_round.auto_scheme.gen_auto_scheme import GenScheme
from auto_round.schemes import QuantizationScheme
from transformers import AutoModelForCausalLM, AutoTokenizer


class Found(Exception):
    """The layers' bits, before anything is quantized."""


def stop_when_found() -> None:
    """Make AutoScheme hand out what it found, in place of quantizing by it."""
    search = GenScheme.get_layer_config

    def get_layer_config(self):
        raise Found(search(self))

    GenScheme.get_layer_config = get_layer_config


SHARED = [["q_proj", "k_proj", "v_proj"], ["gate_proj", "up_proj"]]


def main() -> None:
    stop_when_found()
    model, text, out, group_size, choices, *averages = sys.argv[1:]
    schemes = [QuantizationScheme(bits=int(bits), group_size=int(group_size), sym=True, data_type="int", act_bits=16) for bits in choices.split(",")]
    found = {}
    for average in averages:
        start = time.perf_counter()
        scheme = AutoScheme(
            avg_bits=float(average), options=schemes, shared_layers=SHARED, nsamples=16, seqlen=256, dataset=text, device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        peer = AutoRound(
            AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model), scheme=scheme, iters=0, nsamples=16, seqlen=256, dataset=text,
            device_map="cpu", enable_torch_compile=False,
        )  # fmt: skip
        try:
            peer.quantize()
        except Found as answer:
            bits = {name: config["bits"] for name, config in answer.args[0].items() if config.get("bits", 16) < 16}
        found[average] = {"bits": bits, "seconds": time.perf_counter() - start}
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
