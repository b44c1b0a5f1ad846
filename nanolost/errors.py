"""The one error that a user can mend. A command ends on it with one line and exit code 2; every other
exception is a fault of the program and keeps its traceback (`flags.command`)."""
import contextlib

class UserError(ValueError):
    """Bad flags, bad configuration or bad input. The message names the cause and the repair."""

@contextlib.contextmanager
def as_user_error(*kinds: type[Exception], prefix: str = ""):
    """Translate exceptions of `kinds` at a boundary to code that knows no user, as lost.py and model.py."""
    try:
        yield
    except kinds as e:
        raise UserError(f"{prefix}{e}") from e
