"""The README as a package index shows it, where relative links lead nowhere; hatchling calls this for each build.

The repository's address is that of the GitHub workflow that builds a release. In other builds, links into the
repository become plain text, and pictures are left out.
"""

import re
import sys
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "scripts"))

from pages import CODE, FENCED, LINK, PICTURE, repository_address  # noqa: E402 - a folder of scripts


class Metadata(MetadataHookInterface):
    """Fills the fields `readme` and `urls` of the package's metadata."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add both fields to the metadata."""
        repository = repository_address()
        text = page((ROOT / "README.md").read_text(encoding="utf-8"), repository, f"v{metadata['version']}")
        metadata["readme"] = {"content-type": "text/markdown", "text": text}
        metadata["urls"] = self.config["urls"] | ({"Repository": repository} if repository else {})


def page(text: str, repository: str | None, tag: str) -> str:
    """Return the README with absolute links to the files of a tag; without a repository, with none."""
    code: list[str] = []

    def keep(match: re.Match[str]) -> str:
        code.append(match[0])
        return f"\0{len(code) - 1}\0"

    def picture(match: re.Match[str]) -> str:
        return f"![{match['alt']}]({repository}/raw/{tag}/{match['light']})" if repository else ""

    def link(match: re.Match[str]) -> str:
        if re.match(r"[a-z]+:|#", match["to"]):
            return match[0]
        kind = "tree" if (ROOT / match["to"]).is_dir() else "blob"
        return f"[{match['text']}]({repository}/{kind}/{tag}/{match['to']})" if repository else match["text"]

    text = LINK.sub(link, PICTURE.sub(picture, CODE.sub(keep, FENCED.sub(keep, text))))
    return re.sub("\0(\\d+)\0", lambda match: code[int(match[1])], text)
