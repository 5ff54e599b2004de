"""AutoRound: signed gradient descent on rounding and ranges with its defaults (200 steps a block, or as `iters` says)."""

from __future__ import annotations

from auto_round import AutoRound
from job import Job
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

job = Job()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
tokenizer = AutoTokenizer.from_pretrained(job.model)
batch = 8
peer = AutoRound(
    model, tokenizer, bits=job.bits, group_size=job.group_size, sym=True, dataset=DataLoader(job.rows, batch_size=batch), nsamples=len(job.rows),
    seqlen=job.ids.shape[1], batch_size=batch, device_map="cpu", **job.options,
)  # fmt: skip
with job.timed():
    quantized, config = peer.quantize()
linears = {f"{name}.weight" for name, module in quantized.named_modules() if getattr(module, "scale", None) is not None}
dense = {name: tensor.clone() for name, tensor in quantized.state_dict().items() if name in linears}  # on the grid, before they are packed
peer.save_quantized(str(job.packed), format="auto_round", inplace=True)
job.finish(dense.get, ["auto-round"])
