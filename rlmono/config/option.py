"""`option(default, help, …)`: one field of the schema with everything that is said about it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Optional


@dataclass(frozen=True)
class Option:
    """What the schema knows of a field besides its name, type and default.

    `later` names a feature that is not there yet: any value but the default is validated, and `train` refuses
    to start with it; `later_above=(x, feature)` does so for values above x.
    """

    help: str
    choices: tuple[str, ...] = ()
    minimum: Optional[float] = None
    maximum: Optional[float] = None
    above: Optional[float] = None
    below: Optional[float] = None
    later: Optional[str] = None
    later_above: Optional[tuple[float, str]] = None


def option(default: Any, help: str, **about: Any) -> Any:
    """A dataclass field with its `Option` as metadata."""
    return dataclasses.field(default=default, metadata={"option": Option(help, **about)})
