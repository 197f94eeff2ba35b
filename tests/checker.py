"""Checks the types and shapes of annotations at run time; an int is a float, as PEP 484 has it."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with checks; not one within a function, which would get new checks at each call of that."""
    return function if "<locals>" in function.__qualname__ else check(function)
