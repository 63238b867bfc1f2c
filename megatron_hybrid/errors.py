"""Errors of Megatron as errors for the user."""

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def upstream_errors_as_value_errors() -> Iterator[None]:
    """Upstream checks arguments with asserts: their text is for the user, their trace is not.

    What else it ends by, while it does nothing but read flags, is a mistake in these, too.
    """
    try:
        yield
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        text = str(error) or place.line  # an assert without a message still has a source line
        if not isinstance(error, (AssertionError, RuntimeError, ValueError, NotImplementedError)):
            text = f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"
        raise ValueError(f"Megatron refuses these flags: {text}") from error
