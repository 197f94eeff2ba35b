"""Refuse words and long sentences that the project's English does without: python scripts/words.py, in `make lint`.

It reads the pages for users, with the command line's help and the settings' meanings, which are pages too, and the
docstrings, comments and messages of the package. Code, quotations of commands and links are not read.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A word that is not to be used, and the words for it.
INSTEAD = {
    r"told|handed|hired": "fails, returns, reports, raises, passes",
    r"comes? to|came to|at it": "reaches, runs",
    r"besides?": "next to, compared with, apart from",
    r"stands?|stood": "is, are",
    r"go(?:es)? on|went on": "resumes, continues",
    r"mend(?:ed|s)?": "fix",
    r"gone|not there": "missing, removed",
    r"is none|are none": "there is no …",
    r"whole(?! (?:numbers?|processes)\b)": "all, complete, full",
    r"crew|staff|parcels?|way back": "worker, job, backward pass",
    r"whoever|whichever": "a noun",
    r"(?<!model )cards?": "GPU; the model card by its full name",
}
LONGEST = 25
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/*.md")
WORDS = {re.compile(rf"\b(?:{words})\b", flags=re.I): instead for words, instead in INSTEAD.items()}
# From Python 3.12 on, the text of an f-string is a token of its own.
STRINGS = {tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
MESSAGE = re.compile(r"[a-z,;:]{2,} [a-z]{2,}", flags=re.I)
CODE = re.compile(r"\{[^{}]*\}|^[frb]*[\"']+|[\"']+$")  # not words of a message
SILENT = re.compile(r"^( *)```.*?^\1```\s*$|`[^`\n]*`|\]\([^)\s]*\)|<[^>]*>", flags=re.MULTILINE | re.DOTALL)


def long_sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a page with more than `LONGEST` words, without code blocks and tables."""
    text = re.sub(r"^( *)```.*?^\1```\s*$|^ *\|[^\n]*$|<[^>]*>", "", text, flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "code", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    for paragraph in re.split(r"\n\s*\n|\n\s*(?:[-*]|\d+\.|#+) ", text):
        for sentence in re.split(r"(?<=[.!?])[\"')*]*\s", " ".join(paragraph.split())):
            if sum(any(map(str.isalnum, word)) for word in sentence.split()) > LONGEST:
                yield sentence


def problems(name: str, text: str) -> Iterator[str]:
    """Yield each use of a word of the list, as *file:line: word: use …*, and each long sentence of a page."""
    if name.endswith(".md"):
        yield from (f"{name}: more than {LONGEST} words: {sentence}" for sentence in long_sentences(text))
    for number, line in enumerate(SILENT.sub(lambda found: re.sub(r"[^\n]", " ", found[0]), text).splitlines(), 1):
        for word, instead in WORDS.items():
            for found in word.finditer(line):
                yield f"{name}:{number}: {found[0]}: use {instead}"


def prose(source: str) -> str:
    """Return the docstrings, comments and messages of a module, each on its own lines; all other lines are empty.

    A string of two words or more counts as a message.
    """
    lines, kept = source.splitlines(), [""] * (source.count("\n") + 1)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        is_message = token.type in STRINGS and MESSAGE.search(token.string)
        if token.type == tokenize.COMMENT or (is_message and token.start[0] == token.end[0]):
            kept[token.start[0] - 1] += f" {CODE.sub(' ', token.string)}"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            kept[node.lineno - 1 : node.end_lineno] = lines[node.lineno - 1 : node.end_lineno]
    return "\n".join(kept)


def texts() -> dict[str, str]:
    """Return the checked text of each page and module, by name."""
    files = sorted(path for pattern in (*PAGES, "src/**/*.py") for path in ROOT.glob(pattern))
    read = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return {name: text if name.endswith(".md") else prose(text) for name, text in read.items()}


def main() -> None:
    """Print all problems; exit 1 if there is one."""
    checked = texts()
    found = [one for name, text in checked.items() for one in problems(name, text)]
    print("\n".join(found) or f"{len(checked)} pages and modules")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
