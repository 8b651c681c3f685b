"""Arguments as the package takes them, or a TypeError or ValueError of one sentence that names what is wrong."""

import math
import numbers
import operator
import os
from collections.abc import Iterable, Mapping, Set
from typing import Any

import torch

MOST_TOKEN = 2**31 - 1


def shown(value: Any) -> str:
    """A value for a sentence: short ones as they are written, others by their type."""
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)):
        try:
            text = ascii(value)
        except ValueError:  # more digits than Python prints
            return "a number of thousands of digits"
        return text if len(text) <= 40 else text[:40] + "..."
    return f"of type {type(value).__name__}"


def wrong_type(name: str, value: Any, wanted: str) -> TypeError:
    return TypeError(f"{name} is {shown(value)}; it must be {wanted}")


def whole(name: str, value: Any, least: int = -(2**63), most: int = 2**63 - 1) -> int:
    """An integer of any type, NumPy's and torch's too; True is none."""
    boolean = isinstance(value, bool) or (isinstance(value, torch.Tensor) and value.dtype == torch.bool)
    try:
        number = operator.index(None if boolean else value)
    except (TypeError, RuntimeError):  # torch's, for a tensor of several
        raise wrong_type(name, value, "a whole number") from None
    if not least <= number <= most:
        raise ValueError(f"{name} is {shown(number)}; it must be a whole number from {least} to {most}")
    return number


def number(name: str, value: Any) -> float:
    """A finite number; True is none."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong_type(name, value, "a number")
    try:
        made = float(value)
    except OverflowError:
        made = math.inf
    if not math.isfinite(made):
        raise ValueError(f"{name} is {shown(value)}; it must be a finite number")
    return made


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(name, value, "True or False")
    return value


def text(name: str, value: Any, wanted: str = "a text") -> str:
    if not isinstance(value, str):
        raise wrong_type(name, value, wanted)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate at character {error.start}; it must be text that UTF-8 can hold"
        ) from None
    return value


def path(name: str, value: Any) -> str:
    """A path as text; an empty one, which would mean the current folder, is refused."""
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise wrong_type(name, value, "a path")
    if not os.fspath(value):
        raise ValueError(f"{name} is empty; it must name a folder (. is the current one)")
    return text(name, os.fspath(value))


def items(name: str, value: Any, wanted: str) -> list:
    """A list of what an ordered collection holds; a text is no list of its letters."""
    if isinstance(value, (str, bytes, bytearray, Mapping, Set)) or not isinstance(value, Iterable):
        raise wrong_type(name, value, wanted)
    return list(value)


def texts(name: str, value: Any) -> list[str]:
    return [text(f"{name}[{i}]", item) for i, item in enumerate(items(name, value, "a list of texts"))]


def token_ids(name: str, value: Any, wanted: str = "a list of token ids") -> list[int]:
    if isinstance(value, torch.Tensor):
        if value.dim() != 1 or value.is_floating_point() or value.is_complex():
            dtype = str(value.dtype).removeprefix("torch.")
            raise TypeError(f"{name} is a tensor {list(value.shape)} of {dtype}; it must be one row of whole numbers")
        value = value.tolist()
    ids = items(name, value, wanted)
    if all(type(token) is int and 0 <= token <= MOST_TOKEN for token in ids):
        return ids
    return [whole(f"{name}[{i}]", token, 0, MOST_TOKEN) for i, token in enumerate(ids)]
