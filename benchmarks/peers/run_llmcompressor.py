"""llm-compressor: `oneshot` with GPTQModifier (its defaults: static activation order, damping 0.01) or QuantizationModifier (round to nearest)."""

from __future__ import annotations

from typing import Any

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from job import Job
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

job = Job()
weights = QuantizationArgs(num_bits=job.bits, type="int", symmetric=True, strategy="group", group_size=job.group_size)
modifier = {"gptq": GPTQModifier, "rtn": QuantizationModifier}[job.method]
tokenizer = AutoTokenizer.from_pretrained(job.model)


def loaded() -> Any:
    return AutoModelForCausalLM.from_pretrained(job.model, dtype=job.dtype)


def quantize(model: Any, windows: int) -> None:
    recipe = modifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"])
    calibration = {}
    if job.method == "gptq":
        rows = job.ids[:windows].tolist()
        data = Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})
        calibration = {
            "dataset": data, "num_calibration_samples": len(rows), "max_seq_length": job.ids.shape[1], "shuffle_calibration_samples": False,
        }  # fmt: skip
    oneshot(model=model, processor=tokenizer, recipe=recipe, **calibration)


quantize(loaded(), 2)  # whatever is imported or set up when it is first needed
model = loaded()
with job.timed():
    quantize(model, len(job.ids))
model.save_pretrained(job.packed, save_compressed=True)
decoded = AutoModelForCausalLM.from_pretrained(job.packed, quantization_config=CompressedTensorsConfig(dequantize=True)).state_dict()
linears = {f"{name}.weight" for name, module in model.named_modules() if getattr(module, "quantization_scheme", None) is not None}
job.finish(lambda name: decoded[name] if name in linears else None, ["llmcompressor", "compressed-tensors"])
