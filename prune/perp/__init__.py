"""PERP, retraining a few parameters of a pruned model: what can train (one file each), how it is put on a model, and what comes off again.

    adapted = adapt(model, sites_of(checkpoint), ["biases", "norms", "mask_lora"], {"rank": 16})
    train(model, adapted.parameters, next_token, rows, TrainOptions(), masks=adapted.masks)
    adapted.merge()                                               # {name: merged weight}, float32; zeros are where they were

After Zimmer et al., PERP (arXiv:2312.15230), from the behaviour of its released code; and relatives that keep a mask, or say that they do not.
"""

from .adapt import Adapted, Share, adapt, check_variants, chosen_sites, report
from .hut import Hut
from .lora import HeadLora, LoraPrune, MaskLora
from .neuroada import NeuroAda
from .sara import Sara
from .scale import ScaleLora
from .variant import VARIANTS, Adapter, Site, Variant, adapter, sites_of, sites_of_block

__all__ = [
    "VARIANTS", "Adapted", "Adapter", "HeadLora", "Hut", "LoraPrune", "MaskLora", "NeuroAda", "Sara", "ScaleLora", "Share", "Site", "Variant", "adapt",
    "adapter", "check_variants", "chosen_sites", "report", "sites_of", "sites_of_block",
]  # fmt: skip
