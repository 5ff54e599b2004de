"""A page about an output: what went in and out, what was measured, and what became of every layer; for whoever decides whether to publish it.

    facts = gather(Path("merged-4bit"))
    Path("report.html").write_text(page(facts))
"""

from .facts import Facts, Spent, gather
from .page import page
from .plots import plots

__all__ = ["Facts", "Spent", "gather", "page", "plots"]
