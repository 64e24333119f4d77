"""What can be wrong with what comes from outside."""


class InputError(ValueError):
    """Bad input: one line that says what, where, and what was expected."""
