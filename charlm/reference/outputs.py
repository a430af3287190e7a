"""What functions return that have several results."""

from __future__ import annotations

from types import GeneratorType
from typing import Any, TypeVar

T = TypeVar("T", bound=type)


def made_from_generator(cls: T) -> T:
    """Lets a NamedTuple be called with one generator of all its fields.

    Tensor.__torch_function__ rebuilds a tuple so, to make tensors of a subclass of its results: type(result)(...).
    A NamedTuple would take the generator for its first field.
    """
    new = cls.__new__

    def __new__(cls: Any, *fields: Any, **named: Any) -> Any:
        if len(fields) == 1 and isinstance(fields[0], GeneratorType):
            fields = tuple(fields[0])
        return new(cls, *fields, **named)

    cls.__new__ = __new__
    return cls
