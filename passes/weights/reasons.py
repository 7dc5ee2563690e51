"""Reasons: why a weight is dense."""

import enum
from dataclasses import dataclass

_ASK = ". Give inputs=, and a run shows whether it is multiplied by; or name it in include= or exclude="


class Why(enum.Enum):
    """The kinds of reasons."""

    RULE = "rule"  # by request or by design: an excluded weight, the first layer, a layout that does not fit
    TABLE = "table"  # it is indexed before it is used, or no product reads it
    UNSUPPORTED = "unsupported"  # it cannot be masked where it is read
    UNKNOWN = "unknown"  # its consumer may multiply by it or not


@dataclass(frozen=True)
class Reason:
    """Why one weight is dense.

    Example:
        >>> str(Reason(Why.TABLE, "it is indexed (getitem) before linear"))
        'table: it is indexed (getitem) before linear'
    """

    why: Why
    text: str
    is_open: bool = False  # whether a run on example inputs decides
    in_python: bool = False  # whether Python code reads it, so that no graph shows what for

    @property
    def sentence(self) -> str:
        """What is wrong, and what decides it where that is open."""
        return self.text + _ASK * self.is_open

    def __str__(self) -> str:
        return self.sentence if self.why is Why.RULE else f"{self.why.value}: {self.sentence}"
