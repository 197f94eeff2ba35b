"""metrics/details/*.json that a stage writes, and others that the views must refuse."""

from typing import Any

from cases import REMOVED

PROTOCOL: dict[str, Any] = {"model": "0" * 64, "dtype": "float32"}
TASK = {
    "protocol": PROTOCOL | {"task": {"task": "piqa", "sha256": "0" * 64}},
    "standard_errors": {"acc": 0.5},
    "items": [{"item": n, "loglikelihoods": [-1.5, -2], "answer": 0, "gold": n, "acc": 1.0 - n} for n in (0, 1)],
}
RIGHT: dict[str, dict[str, Any]] = {
    "perplexity": {
        "protocol": PROTOCOL
        | {"windows": 2, "length": 64, "rest": "dropped", "text": {"source": "embedded", "sha256": "0" * 64}},
        "losses": [3.5, "diverged"],
        "divergences": [0.1, "diverged"],
        "agreements": [0.5, "diverged"],
    },
    "zero_shot": {"tasks": {"piqa": TASK}},
    "layer_error": {
        "protocol": PROTOCOL,
        "linears": {"a": {"error": 0.1, "masked": 0.2, "damping": 0.01, "raised": True, "dead": 1}},
    },
    "continuations": {"protocol": PROTOCOL, "prompts": [{"prompt": "p", "text": "t", "tokens": [1, 2]}]},
}
Place = tuple[str | int, ...]
_ITEM: Place = ("tasks", "piqa", "items", 1)
# The file, the place of a wrong value, the value, and a part of the message.
WRONG: list[tuple[str, Place, object, str]] = [
    *((name, (), x, "found") for name in RIGHT for x in ([1], None, 3, "x", True)),
    *((name, ("protocol",), 3, "protocol: found 3") for name in RIGHT if name != "zero_shot"),
    ("perplexity", ("protocol",), REMOVED, "protocol: missing, expected a value"),
    *(
        ("perplexity", ("protocol", key), REMOVED, f"protocol.{key}: missing")
        for key in ("windows", "length", "rest", "text", "dtype")
    ),
    *(("perplexity", ("protocol", "windows"), x, "protocol.windows: found") for x in (0, -1, "2", 2.5, None)),
    *(("perplexity", ("protocol", "length"), x, "protocol.length: found") for x in (1, "64", [64])),
    *(("perplexity", ("protocol", "rest"), x, "protocol.rest: found") for x in ("kept", 1, None)),
    ("perplexity", ("protocol", "text"), "embedded", "protocol.text: found 'embedded'"),
    ("perplexity", ("protocol", "text", "sha256"), 5, "protocol.text.sha256: found 5"),
    ("perplexity", ("protocol", "text", "source"), None, "protocol.text.source: found None"),
    ("perplexity", ("protocol", "dtype"), 5, "protocol.dtype: found 5"),
    ("perplexity", ("losses", 0), "3.5", "losses.0: found '3.5'"),
    ("perplexity", ("losses", 0), None, "losses.0: found None"),
    ("perplexity", ("losses",), [3.5], "losses: found 1, expected 2"),
    ("perplexity", ("losses",), [3.5] * 3, "losses: found 3, expected 2"),
    ("perplexity", ("losses",), {"a": 1}, "losses: found {'a': 1}"),
    ("perplexity", ("not_finite",), 3, "not_finite: found 3"),
    ("zero_shot", ("tasks",), [], "tasks: found []"),
    ("zero_shot", ("tasks",), "piqa", "tasks: found 'piqa'"),
    ("zero_shot", ("tasks", "piqa"), [1], "tasks.piqa: found [1]"),
    ("zero_shot", ("tasks", "piqa", "items"), {"0": 1}, "tasks.piqa.items: found {'0': 1}"),
    ("zero_shot", ("tasks", "piqa", "protocol", "task"), "piqa", "protocol.task: found 'piqa'"),
    ("zero_shot", ("tasks", "piqa", "protocol", "task", "sha256"), REMOVED, "task.sha256: missing"),
    ("zero_shot", ("tasks", "piqa", "standard_errors"), 0.5, "standard_errors: found 0.5"),
    ("zero_shot", ("tasks", "piqa", "standard_errors", "acc"), "N/A", "standard_errors.acc: found 'N/A'"),
    ("zero_shot", _ITEM, 3, "items.1: found 3"),
    *(("zero_shot", (*_ITEM, "acc"), x, "items.1.acc: found") for x in ("1", None, [1])),
    ("zero_shot", (*_ITEM, "acc"), REMOVED, "items.1.acc: missing"),
    *(("zero_shot", (*_ITEM, "item"), x, "items.1.item: found") for x in ("1", None, [1], 0.5)),
    *(("zero_shot", (*_ITEM, "answer"), x, "items.1.answer: found") for x in ("A", None, [1])),
    *(("layer_error", ("linears",), x, "linears: found") for x in ([1], 3, None)),
    ("layer_error", ("linears", "a"), 0.1, "linears.a: found 0.1"),
    *(("layer_error", ("linears", "a", "error"), x, "linears.a.error: found") for x in ("0.1", None, [1])),
    ("layer_error", ("linears", "a", "masked"), REMOVED, "linears.a.masked: missing"),
    ("layer_error", ("linears", "a", "damping"), "x", "linears.a.damping: found 'x'"),
    ("layer_error", ("linears", "a", "raised"), "yes", "linears.a.raised: found 'yes'"),
    *(("continuations", ("prompts",), x, "prompts: found") for x in ({"a": 1}, "x", None)),
    ("continuations", ("prompts", 0), "p", "prompts.0: found 'p'"),
    *(("continuations", ("prompts", 0, "tokens"), x, "prompts.0.tokens: found") for x in (3, "ab", None)),
    ("continuations", ("prompts", 0, "tokens", 1), "b", "prompts.0.tokens.1: found 'b'"),
    ("continuations", ("prompts", 0, "text"), REMOVED, "prompts.0.text: missing"),
    ("continuations", ("skipped",), ["x"], "skipped: found ['x']"),
]


def at(content: Any, place: Place, value: object) -> Any:
    """A document with another value at a place; `REMOVED` takes it out."""
    if not place:
        return value
    first, *rest = place
    changed: Any = content.copy()
    if value is REMOVED and not rest:
        del changed[first]
    else:
        changed[first] = at(content[first], tuple(rest), value) if rest else value
    return changed
