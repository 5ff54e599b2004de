"""Memory of calibrated quantisation at several depths: `python benchmarks/calibration_memory.py [--blocks 4 8] [--windows 8 32]`.

A Llama of so many blocks is made up (random weights), quantised with GPTQ to 3 bits on made-up windows of 256 tokens in a process of its own, and the
anonymous memory of that process is watched from inside it. The target: one block's weights in float32, the Gram matrices of its inputs, what the quantiser
takes for its widest layer, and a batch of hidden states; whatever the depth, and the length of the text. What a process takes before it opens a model
(torch, transformers) is shown apart.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
QUANTIZE = """
    import json, sys, threading, time
    from pathlib import Path
    import torch, transformers.models.auto.modeling_auto, transformers.models.llama.modeling_llama
    from mergekit_plus.checkpoint import Checkpoint, SaveOptions, save
    from mergekit_plus.checkpoint.layout import plan_save
    from quant import Scheme
    from quant.calibrated import Calibration
    from quant.plan import quantize

    def anonymous():
        return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) * 1024

    before = peak = anonymous()
    done = threading.Event()
    def watch():
        global peak
        while not done.wait(0.005):
            peak = max(peak, anonymous())
    threading.Thread(target=watch, daemon=True).start()
    start, out = time.monotonic(), Path(sys.argv[3])
    made = quantize(Checkpoint.open(sys.argv[1]), Scheme(3, 128), "gptq", calibration=Calibration(torch.randint(0, 4096, (int(sys.argv[2]), 256))))
    told = plan_save(made, out, SaveOptions()).peak_memory
    save(made, out, SaveOptions())
    done.set()
    print(json.dumps({"before": before, "peak": peak, "told": told, "seconds": time.monotonic() - start}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--mlp", type=int, default=2816)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--windows", type=int, nargs="+", default=[8, 32], help="windows of 256 tokens")
    given = parser.parse_args()
    from transformers import LlamaConfig, LlamaForCausalLM

    print(f"{'blocks':>6} {'float32':>8} {'states':>8} {'before':>8} {'more':>8} {'told':>8} {'seconds':>8}")
    with tempfile.TemporaryDirectory() as folder:
        for blocks in given.blocks:
            shape = {"hidden_size": given.hidden, "intermediate_size": given.mlp, "num_hidden_layers": blocks, "num_attention_heads": given.hidden // 64}
            model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, **shape)).bfloat16()
            model.save_pretrained(Path(folder, str(blocks)))
            weights = 4 * sum(parameter.numel() for parameter in model.parameters())
            del model
            for windows in given.windows:
                places = str(Path(folder, str(blocks))), str(windows), str(Path(folder, f"out-{blocks}-{windows}"))
                command = [sys.executable, "-c", textwrap.dedent(QUANTIZE), *places]
                found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout)
                facts = (weights, windows * 256 * given.hidden * 4, found["before"], found["peak"] - found["before"], found["told"])
                print(f"{blocks:>6} " + " ".join(f"{each / 1e6:>5.0f} MB" for each in facts) + f" {found['seconds']:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
