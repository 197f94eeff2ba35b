"""Which code can change a result: the modules that a stage imports, and their digest.

Comments, docstrings and empty lines are left out, so that a digest says that the code is the same.
"""

import ast
import hashlib
import io
import re
import tokenize
from collections.abc import Iterable
from functools import cache
from pathlib import Path

PACKAGE = "wanda_dvc"
SOURCE = Path(__file__).resolve().parents[1] / "src"
NAMED = re.compile(rf"({PACKAGE}[\w.]*):\w+")  # a function by its name, as the tables of methods have it


@cache
def sources_digest(stages: tuple[str, ...] = (), source: Path = SOURCE) -> str:
    """Return a digest of all code that some stages can run; without stages, of the whole package."""
    if stages:
        paths = imported_by([f"{PACKAGE}.stages.{stage.replace('-', '_')}" for stage in stages], source)
    else:
        paths = set((source / PACKAGE).rglob("*.py"))
    content = "\n\n".join(f"{path.relative_to(source).as_posix()}\n{code_of(path)}" for path in sorted(paths))
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def imported_by(modules: Iterable[str], source: Path = SOURCE) -> set[Path]:
    """Return the files of modules and of all modules of the package that they import when they run."""
    found, left = set[Path](), list(modules)
    while left:
        name = left.pop()
        path = source / Path(*name.split("."))
        path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if path.is_file() and path not in found:  # else the name is that of a class or function
            found.add(path)
            left += [*_imports(path), *([name.rpartition(".")[0]] if "." in name else [])]
    return found


@cache
def _imports(path: Path) -> set[str]:
    names, left = set[str](), list[ast.AST]([ast.parse(path.read_text(encoding="utf-8"))])
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        left += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and (named := NAMED.fullmatch(node.value)):
            names.add(named[1])
    return {name for name in names if name.partition(".")[0] == PACKAGE}


@cache
def code_of(path: Path) -> str:
    """Return the code of a file, without comments, docstrings and empty lines."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        if ast.get_docstring(node, clean=False) is not None:
            end = node.body[0].end_lineno or 0
            lines[node.body[0].lineno - 1 : end] = [""] * (end - node.body[0].lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())
