"""Hooks of mkdocs.yml: README.md is the front page, the reference is read from the code, and links to files of the repository are no broken ones."""

from __future__ import annotations

import logging
import os
import posixpath
import re
from pathlib import Path
from typing import Any

from site_reference import PAGES

ROOT = Path(__file__).parents[1]
FROM_ROOT = {"index.md": "README.md", "changelog.md": "CHANGELOG.md", "contributing.md": "CONTRIBUTING.md"}  # pages that lie beside docs/, not in it
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```)", re.MULTILINE | re.DOTALL)
CODE_IN_TABLE = re.compile(r"^\|.*`.*$", re.MULTILINE)
log = logging.getLogger("mkdocs.plugins.site")  # a warning fails a strict build


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are no files of docs/."""
    from mkdocs.structure.files import File

    for page, source in FROM_ROOT.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text(encoding="utf-8")))
    for page, write in PAGES.items():
        files.append(File.generated(config, page, content=write()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Links as the site has them."""
    return placed(markdown, page.file.src_uri, config.repo_url)


def placed(markdown: str, page: str, repository: str | None = None) -> str:
    """The text of a page with its links, which are right in the repository, as they are right on the site.

    Files that the site does not have are linked to in the repository; without an address of that, they are named.
    """
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: _link(link, page, repository), CODE_IN_TABLE.sub(_unescaped, part)) for part in parts[::2]]
    return "".join(parts)


def _unescaped(row: re.Match[str]) -> str:
    """A row of a table as Python's Markdown reads it: a bar in code, which GitHub wants escaped, ends no cell."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace(r"\|", "|"), row[0])


def _link(link: re.Match[str], page: str, repository: str | None) -> str:
    image, text, target, anchor = link[1], link[2], link[3], link[4] or ""
    if ":" in target:
        return link[0]
    source = FROM_ROOT.get(page, f"docs/{page}")
    path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
    on_site = {there: name for name, there in FROM_ROOT.items()}.get(path) or (path.removeprefix("docs/") if path.startswith("docs/") else None)
    if on_site is not None:  # whether it is there, mkdocs says
        return f"{image}[{text}]({posixpath.relpath(on_site, posixpath.dirname(page) or '.')}{anchor})"
    if not os.path.exists(ROOT / path):
        log.warning("%s links to %s, which is not in the repository", source, path)
    if repository:
        return f"{image}[{text}]({repository.rstrip('/')}/blob/main/{path}{anchor})"
    return f"`{path}`" if path.endswith(text.strip("`/")) else f"{text} (`{path}`)"
