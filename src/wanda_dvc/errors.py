"""What users are told: errors that they can fix, and notices."""

import sys


class UserError(Exception):
    """One or more problems that the user can fix, each as *where: found, expected, what to do*.

    The command line prints them and exits 2.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


def notice(text: str) -> None:
    """Print a line on stderr: what a stage needs, does, or could not do. Results go to stdout."""
    print(text, file=sys.stderr, flush=True)
