"""A mixture of experts from dense models: one model's attention, every model's MLP, and routers that know whose prompts are whose."""

from .config import Expert, MoeConfig
from .plan import moe

__all__ = ["Expert", "MoeConfig", "moe"]
