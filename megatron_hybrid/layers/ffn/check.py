"""What the dense feed-forward layer needs of flags and layout."""

from argparse import Namespace


def check(args: Namespace) -> None:
    """Nothing beyond what Megatron checks itself."""
