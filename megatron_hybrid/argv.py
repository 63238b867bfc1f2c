"""Names of flags, and lists of them in both of argparse's spellings: ``--flag value`` and ``--flag=value``."""


def flag_name(argument: str) -> str:
    """The flag of an argument: ``hidden_size`` to ``--hidden-size``."""
    return f"--{argument.replace('_', '-')}"


def value(argv: list[str], flag: str, default: str = "") -> str:
    """The last value that a flag is given."""
    found = default
    for i, arg in enumerate(argv):
        if arg == flag and i + 1 < len(argv):
            found = argv[i + 1]
        elif arg.startswith(flag + "="):
            found = arg.split("=", 1)[1]
    return found


def without(argv: list[str], flag: str) -> list[str]:
    """``argv`` without a flag that takes one value."""
    kept, skip = [], False
    for arg in argv:
        if skip:
            skip = False
        elif arg == flag:
            skip = True
        elif not arg.startswith(flag + "="):
            kept.append(arg)
    return kept
