"""AutoRound: signed gradient descent on rounding and ranges with its defaults (200 steps a block, or as `iters` says)."""

from __future__ import annotations

from auto_round import AutoRound
from job import Job
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer

job = Job()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)
tokenizer = AutoTokenizer.from_pretrained(job.model)
rows = [{"input_ids": row, "attention_mask": row.new_ones(len(row))} for row in job.ids]
batch = 8
peer = AutoRound(
    model, tokenizer, bits=job.bits, group_size=job.group_size, sym=True, dataset=DataLoader(rows, batch_size=batch), nsamples=len(rows),
    seqlen=job.ids.shape[1], batch_size=batch, device_map="cpu", **job.options,
)  # fmt: skip
with job.timed():
    quantized, config = peer.quantize()
dense = dict(quantized.state_dict())
linears = {f"{name}.weight" for name, module in quantized.named_modules() if getattr(module, "scale", None) is not None}
job.finish(lambda name: dense[name] if name in linears else None, ["auto-round"], 0)
