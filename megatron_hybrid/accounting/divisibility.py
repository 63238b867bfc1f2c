"""Divisibility of sizes, with messages that name the flags."""


def check_divides(value: int, what: str, by: int, by_what: str) -> None:
    """Refuses a value that is no positive multiple of another.

    Raises:
        ValueError: With both values and what they are.
    """
    if by < 1 or value % by or value < 1:
        raise ValueError(f"{what} is {value} and must be a multiple of {by_what}, which is {by}.")


def check_shares(units: int, what: str, tp: int) -> None:
    """Refuses units (heads, groups) that tensor-parallel ranks can neither divide nor share evenly.

    Raises:
        ValueError: With both values.
    """
    if units % tp and tp % units:
        raise ValueError(
            f"{what} is {units} and --tensor-model-parallel-size is {tp}: one must divide the other, so that a rank "
            "has whole ones or a share of one."
        )
