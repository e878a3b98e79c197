"""Every error that a user can cause or fix, grouped by what to do about it.

::

    DoremiMixError                what went wrong, which thing, got and expected, what to do next: one line
    ├── ConfigError               fix a setting                        (ValueError)
    ├── DataError                 fix the data                         (ValueError)
    │   ├── SourceNotFoundError   a file or folder does not exist      (FileNotFoundError)
    │   ├── SourceFormatError     a file cannot be read as its format
    │   ├── SchemaError           no or several readings of the columns
    │   └── TooManyRejectedError  too large a share of rows is bad
    ├── StageNotFinishedError     run an earlier stage                 (RuntimeError)
    ├── RunDirectoryError         choose another run directory         (OSError)
    ├── BudgetError               change the token budget or epoch cap (ValueError)
    ├── ExportError               choose another format, names or paths (ValueError)
    ├── DivergedError             lower the learning rate              (ArithmeticError)
    └── ModelError                choose another model                 (ValueError)

Each class also inherits the standard exception that it specialises, and takes exactly one argument, its message, so
that it can be pickled.  The command line prints the message as one line and exits 1.
"""


class DoremiMixError(Exception):
    """Base of all errors that the user can fix."""


class ConfigError(DoremiMixError, ValueError):
    """A setting is unknown, mistyped or contradicts another."""


class DataError(DoremiMixError, ValueError):
    """The data cannot be used as they are."""


class SourceNotFoundError(DataError, FileNotFoundError):
    """A source file or folder does not exist."""


class SourceFormatError(DataError):
    """A file is empty, truncated or not of the format that it claims."""


class SchemaError(DataError):
    """The columns of a file fit no schema, or more than one."""


class TooManyRejectedError(DataError):
    """More rows of a source are bad than the configuration allows."""


class StageNotFinishedError(DoremiMixError, RuntimeError):
    """A stage was asked for before the stage that it reads from."""


class RunDirectoryError(DoremiMixError, OSError):
    """The run directory is in use, not writable or not a run directory."""


class BudgetError(DoremiMixError, ValueError):
    """The token budget cannot be met under the epoch cap."""


class ExportError(DoremiMixError, ValueError):
    """Another program cannot be told of these weights in the form that was asked for."""


class DivergedError(DoremiMixError, ArithmeticError):
    """Training produced a loss that is not finite."""


class ModelError(DoremiMixError, ValueError):
    """A model or tokenizer cannot be loaded, or does not do what the pipeline needs."""


def short_reason(error: BaseException) -> str:
    """Returns what a library or the system said, in one short line without its full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".")[:200] if lines else type(error).__name__
