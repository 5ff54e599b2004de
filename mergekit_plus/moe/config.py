"""What a mixture is made of: the schema of mergekit-moe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..checkpoint.dtypes import parse_float_dtype
from ..errors import OptionError

GateMode = Literal["hidden", "cheap_embed", "random", "uniform_random"]
_Scale = Annotated[float, Field(allow_inf_nan=False)]


class Expert(BaseModel):
    """A model whose MLPs become one expert of each layer, and the prompts that should be sent to it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_model: str
    positive_prompts: list[str] | None = None
    negative_prompts: list[str] | None = None
    noise_scale: _Scale | None = None  # standard deviation of the noise added to its weights
    residual_scale: _Scale | None = None  # factor of its down projections


class MoeConfig(BaseModel):
    """A mixture. Models are named as its inputs are."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: str  # gives everything but the MLPs
    experts: list[Expert] = Field(min_length=1)
    shared_experts: list[Expert] | None = None  # asked for every token; one, in the Qwen2-MoE layout
    gate_mode: GateMode = "hidden"
    dtype: str | None = None
    experts_per_token: int = Field(default=2, ge=1)
    architecture: Literal["mixtral", "qwen"] | None = None
    seed: int = 0  # of random gates and noise

    @property
    def all_experts(self) -> Sequence[Expert]:
        """The experts, then the shared ones."""
        return [*self.experts, *(self.shared_experts or [])]

    @property
    def models(self) -> list[str]:
        """Every model that it names, once."""
        return list(dict.fromkeys([self.base_model, *(expert.source_model for expert in self.all_experts)]))

    @property
    def layout(self) -> Literal["mixtral", "qwen"]:
        """The architecture that is written: a shared expert is what Mixtral has not."""
        return self.architecture or ("qwen" if self.shared_experts else "mixtral")

    def conflicts(self) -> Iterator[str]:
        """A sentence for everything that does not go together."""
        if self.dtype:
            try:
                parse_float_dtype(self.dtype)
            except OptionError as error:
                yield str(error)
        if self.experts_per_token > len(self.experts):
            yield f"experts_per_token is {self.experts_per_token}, but there are {len(self.experts)} experts"
        shared = len(self.shared_experts or [])
        if self.layout == "mixtral" and shared:
            yield "Mixtral has no shared experts; leave shared_experts out, or write `architecture: qwen`"
        if self.layout == "qwen" and shared != 1:
            yield f"Qwen2-MoE has exactly one shared expert, not {shared}; name it under shared_experts"
        if self.gate_mode not in ("hidden", "cheap_embed"):
            return
        silent = [expert.source_model for expert in self.all_experts if not expert.positive_prompts]
        if silent:
            yield f"no positive_prompts for {', '.join(silent)}, and gate_mode {self.gate_mode} makes routers of prompts; write some, or use random"
        prompts = [(expert.positive_prompts, expert.negative_prompts) for expert in self.experts]
        if not silent and len(prompts) > 1 and all(pair == prompts[0] for pair in prompts):
            yield "all experts have the same prompts, so that the routers could not tell them apart"
