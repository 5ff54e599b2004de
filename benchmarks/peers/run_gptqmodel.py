"""GPTQModel: GPTQ with its defaults (activation-aware order of groups, damping 0.05), symmetric, decoded from the file that it saves."""

from __future__ import annotations

from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from job import Job

job = Job()
model = GPTQModel.load(job.model, QuantizeConfig(bits=job.bits, group_size=job.group_size, sym=True, device="cpu"), dtype=job.dtype)
with job.timed():
    model.quantize(job.rows, calibration_sort=None)
model.save(str(job.packed))
loaded = GPTQModel.load(str(job.packed), device="cpu", backend=BACKEND.TORCH)
decoded = {f"{name}.weight": module.dequantize_weight().T for name, module in loaded.model.named_modules() if isinstance(module, BaseQuantLinear)}
job.finish(decoded.get, ["gptqmodel"])
