"""What the command-line tools share."""

import sys
from collections.abc import Callable


def run(main: Callable[[], None]) -> None:
    """Call a tool's ``main``; a user's mistake is one paragraph and exit code 2, no traceback."""
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
