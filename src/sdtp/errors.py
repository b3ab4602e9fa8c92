"""The one error type that means: the user's input is wrong, and this line says what to change."""


class UserError(ValueError):
    """A fault in what the user gave: the message names the key or file, the value, and what is accepted."""
