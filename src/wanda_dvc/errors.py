"""What goes wrong by the user's hand, each as *where: found, expected, what to do*."""


class UserError(Exception):
    """One or more problems that the user can mend; the command line prints them and exits 2."""

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
