"""Refuse words, sentences and code that the project does without: python scripts/words.py, in `make lint`.

Prose: the pages for users, with the command line's help and the settings' meanings, which are pages too, and the
docstrings, comments and messages of the package. Code, quotations of commands and links are not read.

Code: the package's modules. A variable says what its value is; one name has one meaning in all modules; and some
expressions that have to be read twice are refused.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter, defaultdict
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
    for number, line in enumerate(SILENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text).splitlines(), 1):
        for word, instead in WORDS.items():
            for match in word.finditer(line):
                yield f"{name}:{number}: {match[0]}: use {instead}"


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
    contents = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in files}
    return {name: text if name.endswith(".md") else prose(text) for name, text in contents.items()}


# --- code ---

# Names that do not say what a value is, and how many assignments, loops, parameters and arguments may have them.
NAMELESS = {"found", "made", "one", "every", "own", "other", "some", "came", "words", "said", "there"}
MOST_NAMELESS = 100
DOORS = ("src/wanda_dvc/cli.py", "src/wanda_dvc/interface.py")  # users call stages and commands here by their names
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def nameless(tree: ast.AST) -> list[str]:
    """Return the nameless names that a module assigns or passes."""
    assigned = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    passed = [node.arg for node in ast.walk(tree) if isinstance(node, (ast.arg, ast.keyword)) and node.arg]
    return [name for name in (*assigned, *passed) if name in NAMELESS]


def read_twice(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the fault of expressions that have to be read twice."""
    for node in ast.walk(tree):
        if isinstance(node, COMPREHENSIONS):
            if any(isinstance(inside, ast.NamedExpr) for inside in ast.walk(node)):
                yield node.lineno, "a walrus in a comprehension"
            if len(node.generators) > 1 and node.end_lineno != node.lineno:
                yield node.lineno, "a comprehension of two loops over several lines"
        if isinstance(node, ast.Call):
            arguments = [*node.args, *(keyword.value for keyword in node.keywords)]
            if any(isinstance(inside, ast.NamedExpr) for value in arguments for inside in ast.walk(value)):
                yield node.lineno, "a walrus in an argument"
            name = node.func.id if isinstance(node.func, ast.Name) else ""
            if name == "reduce" or (name == "zip" and any(isinstance(value, ast.Starred) for value in node.args)):
                yield node.lineno, f"{name} of an unknown number of values"


def names_of(tree: ast.Module) -> set[str]:
    """Return the functions, classes and constants that a module defines."""
    names = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            stored = [inside for target in node.targets for inside in ast.walk(target)]
            names |= {inside.id for inside in stored if isinstance(inside, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def ambiguous(modules: dict[str, ast.Module]) -> Iterator[str]:
    """Yield names that several modules define, unless all but one import the name: they call it for the same job."""
    defined: dict[str, list[str]] = defaultdict(list)
    for module, tree in modules.items():
        for name in () if module in DOORS else names_of(tree):
            defined[name].append(module)
    for name, where in sorted(defined.items()):
        callers = [module for module in where if imports(modules[module], name)]
        if len(where) - len(callers) > 1:
            yield f"{name}: defined in {', '.join(where)}: one name has one meaning"


def imports(tree: ast.Module, name: str) -> bool:
    """Whether a module imports a name, or a module of that name."""
    aliases = [alias for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names]
    return any(alias.name == name for alias in aliases)


def check_code() -> list[str]:
    """Return the problems of the package's code."""
    paths = sorted(ROOT.glob("src/**/*.py"))
    modules = {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in paths}
    problems = [
        f"{module}:{line}: {fault}" for module, tree in modules.items() for line, fault in sorted(read_twice(tree))
    ]
    problems += ambiguous(modules)
    counts = {module: Counter(nameless(tree)) for module, tree in modules.items()}
    total = sum(count.total() for count in counts.values())
    if total >= MOST_NAMELESS:
        worst = sorted(counts, key=lambda module: -counts[module].total())[:15]
        problems += [f"{module}: {dict(counts[module])}" for module in worst if counts[module]]
        problems.append(f"{total} names like `found` and `one`, expected fewer than {MOST_NAMELESS}: name the value")
    return problems


def main() -> None:
    """Print all problems; exit 1 if there is one."""
    checked = texts()
    lines = [problem for name, text in checked.items() for problem in problems(name, text)] + check_code()
    print("\n".join(lines) or f"{len(checked)} pages and modules")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
