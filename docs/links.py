"""A hook of mkdocs: a link to a file outside docs/ becomes the file's path, since the site holds only the pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page, with `name (path)` in place of each link that leaves docs/; a missing file is an error."""
    folder = Path(page.file.abs_src_path).parent
    docs = next(parent for parent in folder.joinpath("_").parents if (parent / "links.py").is_file())

    def shown(match: re.Match[str]) -> str:
        target = (folder / match[2]).resolve()
        if docs in target.parents:
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match[2]}, which does not exist.")
        return f"{match[1]} (`{target.relative_to(docs.parent)}`)"

    return _OUTSIDE.sub(shown, markdown)
