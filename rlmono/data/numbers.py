"""Numbers of a sample, kept as the bytes that travel and that numpy reads until somebody asks for the list: of 8k tokens that takes half a
millisecond to make, and ten times the memory.

A kind of numbers is struct's letter, i (int32) or f (float32), and both ends are on machines of one byte order.
"""

from __future__ import annotations

import itertools
import struct
from array import array
from collections.abc import Sequence
from typing import Any, Generic, Literal, Self, TypeVar, overload

Kind = Literal["i", "f"]
L = TypeVar("L")


class Listed(Generic[L]):
    """A field of a struct which is read as a list, `stored` as that list or as its bytes, and which may be None.

    Who reads it makes the list, which then is what is stored: it may be changed in place, and copies share it as they do any attribute.
    Encoders and `msgspec.structs.asdict` take what is stored. The methods never change a list: what they store is new.
    """

    def __init__(self, kind: Kind, stored: Any, size: int = 4):
        self._kind, self._field, self._size = kind, stored, size

    @overload
    def __get__(self, owner: None, cls: Any) -> Self: ...
    @overload
    def __get__(self, owner: object, cls: Any) -> L: ...

    def __get__(self, owner: Any, cls: Any = None) -> Any:
        if owner is None:
            return self
        stored = self._field.__get__(owner)
        if isinstance(stored, bytes):
            stored = self._list(stored)
            self._field.__set__(owner, stored)
        return stored

    def __set__(self, owner: object, value: L | bytes) -> None:
        self._field.__set__(owner, value)

    def bytes_of(self, owner: object) -> bytes:
        """None has none. Raises ValueError for what is no such number."""
        stored = self._field.__get__(owner)
        return stored if isinstance(stored, bytes) else b"" if stored is None else self._bytes(stored)

    def peek(self, owner: object) -> L:
        """The list, which is not kept where it has to be made."""
        stored = self._field.__get__(owner)
        return self._list(stored) if isinstance(stored, bytes) else stored      # type: ignore[no-any-return]

    def view(self, owner: object) -> memoryview[Any]:
        """The numbers one by one, without a list of them; for numpy too."""
        return memoryview(self.bytes_of(owner)).cast(self._kind)

    def count(self, owner: object) -> int:
        """How many there are; of None 0."""
        stored = self._field.__get__(owner)
        return self._count(stored) if isinstance(stored, bytes) else 0 if stored is None else len(stored)

    def is_none(self, owner: object) -> bool:
        return self._field.__get__(owner) is None

    def check(self, owner: object) -> None:
        """Raises ValueError for bytes that are not whole numbers: for `__post_init__`, so that no message with them is taken."""
        stored = self._field.__get__(owner)
        if isinstance(stored, bytes) and len(stored) % self._size:
            raise ValueError(f"{len(stored)} bytes are not whole numbers of {self._size}")

    def pack(self, owner: object) -> None:
        """Keep the bytes from here on. Raises ValueError for what is no such number."""
        if not self.is_none(owner):
            self._field.__set__(owner, self.bytes_of(owner))

    def extend(self, owner: object, numbers: Sequence[Any] | bytes) -> None:
        """Append numbers, and keep the bytes."""
        self._field.__set__(owner, self.bytes_of(owner) + (numbers if isinstance(numbers, bytes) else self._bytes(numbers)))

    def _bytes(self, numbers: Sequence[Any]) -> bytes:
        return to_bytes(self._kind, numbers)

    def _list(self, data: bytes) -> Any:
        return memoryview(data).cast(self._kind).tolist()

    def _count(self, data: bytes) -> int:
        return len(data) // self._size


class Runs(Listed[L]):
    """Of int32 that stay the same for long: as bytes they are a pair a run, of the number and how often it comes."""

    def __init__(self, stored: Any):
        super().__init__("i", stored, 8)

    def repeat(self, owner: object, number: int, times: int) -> None:
        """Append the number so many times, and keep the bytes."""
        data = self.bytes_of(owner)
        if data and (last := struct.unpack_from("2i", data, len(data) - 8))[0] == number:
            data, times = data[:-8], times + last[1]
        self._field.__set__(owner, data + to_bytes("i", [number, times] if times else []))

    def check(self, owner: object) -> None:
        super().check(owner)
        stored = self._field.__get__(owner)
        if isinstance(stored, bytes) and any(times < 1 for times in memoryview(stored).cast("i")[1::2]):
            raise ValueError("a run comes less than once")

    def view(self, owner: object) -> memoryview[Any]:
        return memoryview(self._whole(self.bytes_of(owner)))

    def _whole(self, data: bytes) -> array[int]:
        pairs, numbers = memoryview(data).cast("i"), array("i")
        for number, times in zip(pairs[::2], pairs[1::2], strict=True):
            numbers.extend(array("i", [number]) * times)
        return numbers

    def _bytes(self, numbers: Sequence[Any]) -> bytes:
        whole = memoryview(to_bytes("i", numbers)).cast("i")
        return to_bytes("i", [x for number, run in itertools.groupby(whole) for x in (number, len(list(run)))])

    def _list(self, data: bytes) -> list[int]:
        return self._whole(data).tolist()

    def _count(self, data: bytes) -> int:
        return sum(memoryview(data).cast("i")[1::2])


def to_bytes(kind: Kind, numbers: Sequence[Any]) -> bytes:
    """Also of arrays and tensors. Raises ValueError for what is no such number; what is beyond fp32 becomes infinite."""
    if isinstance(numbers, array) and numbers.typecode == kind:
        return numbers.tobytes()
    if not isinstance(numbers, list) and hasattr(numbers, "tolist"):
        numbers = numbers.tolist()
    try:
        return struct.pack(f"{len(numbers)}{kind}", *numbers)       # `array` and numpy take more than twice as long
    except (struct.error, TypeError) as e:
        raise ValueError(f"not all {'whole numbers of 32 bits' if kind == 'i' else 'numbers of fp32'}: {e}") from None
