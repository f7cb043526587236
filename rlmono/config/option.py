"""`option(default, help, …)`: one field of the schema with everything that is said about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Iterator, Optional


class ConfigError(ValueError):
    """The configuration cannot be used; the message has a line for each problem, with its source and a remedy."""

    def __init__(self, problems: list[str]) -> None:
        head = "1 problem in the configuration:" if len(problems) == 1 else f"{len(problems)} problems in the configuration:"
        super().__init__("\n  ".join([head, *problems]))
        self.problems = tuple(problems)


@dataclass(frozen=True)
class Option:
    """What the schema knows of a field besides its name, type and default.

    `later` names a feature that is not there yet: any value but the default is validated, and `train` refuses
    to start with it; `later_above=(x, feature)` does so for values above x, and `later_choices={choice: feature}`
    for single choices.
    """

    help: str
    choices: tuple[str, ...] = ()
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    above: Optional[float] = None
    below: Optional[float] = None
    later: Optional[str] = None
    later_above: Optional[tuple[float, str]] = None
    later_choices: Optional[dict[str, str]] = None

    def check(self, value: Any) -> None:
        """Raise ValueError when a value (None, or of the field's type) is outside of what the option allows."""
        if value is None:
            return
        if self.choices and value not in self.choices:
            raise ValueError(f"is {value!r}, but must be one of {', '.join(self.choices)}")
        for bound, bad, words in ((self.minimum, lambda v, b: v < b, "at least"), (self.maximum, lambda v, b: v > b, "at most"),
                                  (self.above, lambda v, b: v <= b, "above"), (self.below, lambda v, b: v >= b, "below")):
            if bound is not None and bad(value, bound):
                raise ValueError(f"is {value}, but must be {words} {bound:g}")

    def coming(self, value: Any, default: Any) -> Optional[str]:
        """The feature that a value needs and that is not there yet."""
        if self.later and value != default:
            return self.later
        if self.later_above and value is not None and value > self.later_above[0]:
            return self.later_above[1]
        return (self.later_choices or {}).get(value)


def option(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with its `Option` as metadata."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **about)})


def options(section: Any) -> Iterator[tuple[dataclasses.Field[Any], Option]]:
    """The fields of a section, or of the whole Config, that are options."""
    for field in dataclasses.fields(section):
        if "option" in field.metadata:
            yield field, field.metadata["option"]
