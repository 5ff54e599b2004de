"""mergekit's YAML, read as it is: the same file, the same result; what mergekit ignores in silence is refused, or is right here.

    inputs: {base: org/base, code: ./code}
    steps:
      - mergekit: {merge_method: slerp, base_model: base, models: [{model: base}, {model: code}], parameters: {t: [0, 0.5, 1]}}

A document names models; as a step of a recipe it names inputs of the recipe. A file of mergekit's is a recipe of this one step, whose inputs go by
their own paths, relative to where one stands, as with mergekit-yaml. A list of documents refer to each other by `name`; nothing is written between them.
"""

from .compose import compose
from .documents import Read, as_recipe, read

__all__ = ["Read", "as_recipe", "compose", "read"]
