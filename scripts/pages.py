"""Write the pages of the documentation site into .site: python scripts/pages.py; `make docs` then builds them.

The Markdown of this repository is the source, and works on GitHub as it is. For the site,
- the README is the first page;
- a paragraph that is a link to a Python module with the title "include" becomes the reference of its `__all__`;
- a link to a file that is no page of the site leads to the file in the repository;
- a <picture> becomes two images, of which the site's own mode shows one.

The repository's address is that of the GitHub workflow that runs this. Elsewhere, links into the repository become
plain text. A link that leads nowhere and a page in no list are errors.
"""

import importlib
import os
import posixpath
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "zensical.toml"
TARGET = ROOT / ".site"
OUTSIDE = {"README.md": "index.md", "CHANGELOG.md": "CHANGELOG.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}
FENCED = re.compile(r"^( *)```.*?^\1```\s*?$", flags=re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n\n)[^\0])+?(?<!`)\1(?!`)")  # without blocks, which are \0NUMBER\0 by then
LINK = re.compile(
    r"(?P<image>!?)\[(?P<text>(?:!\[[^\]]*\]\([^)]*\)|\\.|[^\[\]])*)\]\((?P<to>[^)\s]+)(?P<title> +\"[^\"]*\")?\)"
)
PICTURE = re.compile(
    r"<picture>\s*<source [^>]*dark[^>]*srcset=\"(?P<dark>[^\"]+)\">\s*<source [^>]*srcset=\"(?P<light>[^\"]+)\">\s*"
    r"<img alt=\"(?P<alt>[^\"]*)\"[^>]*>\s*</picture>"
)


def pages() -> dict[str, str]:
    """Return every page of the site, by the path of its source in the repository."""
    found = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md"))
    return {page: page.removeprefix("docs/") for page in found} | OUTSIDE


def build(target: Path, repository: str | None) -> None:
    """Write all pages, their pictures and the generator's settings into an empty `target`.

    SystemExit for a link that leads nowhere, and a page that the list of pages leaves out.
    """
    published, config = pages(), CONFIG.read_text(encoding="utf-8")
    listed, made = set(re.findall(r'"(\S+\.md)"', config)), set(published.values())
    if listed != made:
        raise SystemExit(
            f"{CONFIG.name}: nav: not listed: {', '.join(sorted(made - listed)) or 'none'}; "
            f"listed and not there: {', '.join(sorted(listed - made)) or 'none'}; expected every page once"
        )
    site = Site(published, repository)
    for source, page in published.items():
        _write(target / "docs" / page, site.page(source))
    for asset in sorted(site.assets):
        (target / "docs" / asset).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / "docs" / asset, target / "docs" / asset)
    if repository:  # as `repo_url`, readers' browsers would ask its host for the number of stars
        config += (
            f'\n[[project.extra.social]]\nicon = "lucide/git-branch"\nname = "The repository"\nlink = "{repository}"\n'
        )
        if found := re.fullmatch(r"https://github\.com/([^/]+)/([^/]+)", repository):
            address = f"https://{found[1].lower()}.github.io/{found[2]}/"
            config = config.replace("[project]\n", f'[project]\nsite_url = "{address}"\n', 1)
    _write(target / CONFIG.name, config)


class Site:
    """The pages with their links: which file is which page, and which pictures they show."""

    def __init__(self, published: dict[str, str], repository: str | None) -> None:
        self.published = published
        self.repository = repository
        self.assets = {"site.css"}

    def page(self, source: str) -> str:
        """Return the text of a page as the site's generator reads it."""
        return self._rewrite((ROOT / source).read_text(encoding="utf-8"), source)

    def _rewrite(self, text: str, source: str) -> str:
        """Return the text of a file as its page has it: links, pictures and code in tables."""
        code: list[str] = []

        def keep(found: re.Match[str]) -> str:
            # On GitHub a cell's code span needs the backslash of \|; Python-Markdown keeps it.
            code.append(found[0] if FENCED.fullmatch(found[0]) else found[0].replace("\\|", "|"))
            return f"\0{len(code) - 1}\0"

        def link(found: re.Match[str]) -> str:
            if found["title"] == ' "include"':
                return reference(self._resolve(source, found["to"])[0])
            text = LINK.sub(link, found["text"])
            to = self._link(found["to"], source)
            return text if to is None else f"{found['image']}[{text}]({to}{found['title'] or ''})"

        def picture(found: re.Match[str]) -> str:
            alt = found["alt"]
            return "\n".join(f"![{alt}]({found[mode]}#only-{mode})" for mode in ("light", "dark"))

        text = CODE.sub(keep, FENCED.sub(keep, text))
        text = LINK.sub(link, PICTURE.sub(picture, text))
        return re.sub("\0(\\d+)\0", lambda found: code[int(found[1])], text)

    def _link(self, to: str, source: str) -> str | None:
        """Return where a link of a page leads on the site; None where the site has no address for it."""
        if re.match(r"[a-z]+:", to):
            return to
        path, kind, anchor = self._resolve(source, to)
        fragment = f"#{anchor}" if anchor else ""
        if path in self.published:
            path = self.published[path]
        elif path.startswith("docs/") and kind == "blob":
            path = path.removeprefix("docs/")
            self.assets.add(path)
        else:
            return f"{self.repository}/{kind}/main/{path}{fragment}" if self.repository else None
        here = self.published[source]
        return fragment if fragment and path == here else posixpath.relpath(path, posixpath.dirname(here)) + fragment

    def _resolve(self, source: str, to: str) -> tuple[str, str, str]:
        """Return the path in the repository that a link leads to, `blob` or `tree`, and its fragment."""
        to, _, anchor = to.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(to))) if to else source
        if path.startswith("..") or not (ROOT / path).exists():
            raise SystemExit(f"{source}: {to} leads to no file of the repository; fix the link")
        return path, "tree" if (ROOT / path).is_dir() else "blob", anchor


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-")


def reference(path: str) -> str:
    """Return mkdocstrings' directives for what a module exports."""
    module = importlib.import_module(re.sub(r"^src/|(/__init__)?\.py$", "", path).replace("/", "."))
    exported = [name for name in module.__all__ if not name.startswith("__")]
    return "\n\n".join(f"::: {getattr(module, name).__module__}.{name}" for name in exported)


def repository_address() -> str | None:
    """Return the address of the GitHub repository whose workflow runs this; None elsewhere."""
    name = os.environ.get("GITHUB_REPOSITORY")
    return name and f"{os.environ.get('GITHUB_SERVER_URL', 'https://github.com')}/{name}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def main() -> None:
    """Write the pages into an emptied .site."""
    repository = repository_address()
    shutil.rmtree(TARGET, ignore_errors=True)
    build(TARGET, repository)
    print(f"{TARGET}: {len(pages())} pages; links into the repository: {repository or 'plain text'}")


if __name__ == "__main__":
    main()
