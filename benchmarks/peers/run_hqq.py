"""HQQ: half-quadratic quantisation with its defaults, along the inputs; natively asymmetric, with zero points that are no integers."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from hqq.models.hf.base import AutoHQQHFModel
from job import Job
from transformers import AutoModelForCausalLM

job = Job()
model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32)
config = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)
with job.timed():
    AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.float16, device="cpu")
decoded = {f"{name}.weight": module.dequantize().float() for name, module in model.named_modules() if isinstance(module, HQQLinear)}
AutoHQQHFModel.save_quantized(model, str(job.packed))
job.finish(decoded.get, ["hqq"], (job.packed / "qmodel.pt").stat().st_size)
