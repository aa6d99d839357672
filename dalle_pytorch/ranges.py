"""Checks that many settings share."""


def at_least_one(config: object, *names: str) -> None:
    """Refuse sizes and counts below 1.

    Raises:
        ValueError: names the first field, and says what it is.
    """
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")


def not_negative(config: object, *names: str) -> None:
    """Refuse counts and weights below 0.

    Raises:
        ValueError: names the first field, and says what it is.
    """
    for name in names:
        if getattr(config, name) < 0:
            raise ValueError(f"{name} must not be negative, got {getattr(config, name)}")
