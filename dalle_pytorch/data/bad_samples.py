"""Counts samples that cannot be used; above a fraction of all they are an error."""

from collections import Counter

from dalle_pytorch.errors import UserError

_KINDS = 1000  # kept apart; a stream without an end has no end of reasons
_SHOWN = 5


class BadSamples:
    """The bad samples of a data set, by kind of reason.

    Args:
        where: what they are of, for messages.
        fraction: the largest fraction of all samples that may be bad, in [0, 1].
        setting: name of the setting that holds it.
        allowed: so many are no error, whatever their fraction.
    """

    def __init__(self, where: str, fraction: float, setting: str, *, allowed: int = 0) -> None:
        self.where, self.fraction, self.setting, self.allowed = where, fraction, setting, allowed
        self.kinds = Counter[str]()
        self.examples: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many there are."""
        return self.kinds.total()

    def add(self, kind: str, example: str) -> None:
        """Count one.

        Args:
            kind: of the reason.
            example: names the sample and what is wrong with it.
        """
        if kind not in self.kinds and len(self.kinds) == _KINDS:
            kind = "others"
        self.kinds[kind] += 1
        self.examples[kind] = example

    def check(self, total: int) -> None:
        """Compare with the number of all samples.

        Raises:
            UserError: too many are bad; names the numbers, the setting, and the commonest reasons with an example.
        """
        if self.count <= max(self.allowed, self.fraction * total):
            return
        reasons = "".join(
            f"\n  {count} x {kind}, such as {self.examples[kind]}" for kind, count in self.kinds.most_common(_SHOWN)
        )
        raise UserError(
            f"{self.count} of the {total} samples of {self.where} cannot be used, more than "
            f"{self.setting}={self.fraction:g} allows: mend them, or raise {self.setting}{reasons}"
        )
