"""The key-value part of a GGUF file."""

import math

import numpy as np
from gguf import GGUFReader, GGUFValueType

from .structure import ConversionError, check_structure


class Metadata:
    """Keys and values of a GGUF file, with errors that name the file and key.

    A key is asked for with the type that it must have: int, float, str, bool, or a list of one of them as [int]. Integers
    are counts or ids, from 0 to 2^31 - 1 (those of lists are not looked at); floats are finite."""

    def __init__(self, reader, path):
        self.path = path
        self._fields = reader.fields
        self.architecture = self.need("general.architecture", str)

    def get(self, key, kind, default=None):
        field = self._fields.get(key)
        if field is None:
            return default
        try:
            value = field.contents()
        except (ValueError, IndexError) as error:  # UnicodeDecodeError is a ValueError
            raise ConversionError(f"{self.path}: the metadata key {key} cannot be read ({error})") from None
        if isinstance(kind, list):
            # An empty list has no type of its own.
            if not isinstance(value, list) or any(type(one) is not kind[0] for one in value):
                raise ConversionError(f"{self.path}: the metadata key {key} is no list of {kind[0].__name__}")
            return value
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ConversionError(f"{self.path}: the metadata key {key} is {str(value):.40}, no {kind.__name__}")
        if kind is int and not 0 <= value < 2**31:
            raise ConversionError(f"{self.path}: the metadata key {key} is {value}, which no model has")
        if kind is float:
            if not math.isfinite(value):
                raise ConversionError(f"{self.path}: the metadata key {key} is {value}, a finite number was expected")
            # A float32 is written back as the shortest decimal that reads as the same float32: 1e-05, not
            # 9.999999747378752e-06.
            value = float(str(np.float32(value))) if abs(value) < 3.4e38 else value
        return value

    def need(self, key, kind):
        value = self.get(key, kind)
        if value is None:
            raise ConversionError(f"{self.path}: the metadata key {key} is missing, so the file cannot be converted")
        return value

    # The same of a key that begins with the architecture's name.
    def get_own(self, key, kind, default=None):
        return self.get(f"{self.architecture}.{key}", kind, default)

    def need_own(self, key, kind):
        return self.need(f"{self.architecture}.{key}", kind)

    def is_list(self, key):
        return key in self._fields and self._fields[key].types[0] == GGUFValueType.ARRAY

    def need_count(self, key):
        """An own key that counts something a model has at least one of."""
        return self.positive(key, self.need_own(key, int))

    def positive(self, key, value):
        if not value > 0:
            raise ConversionError(
                f"{self.path}: the metadata key {self.architecture}.{key} is {value}, more was expected"
            )
        return value

    def between(self, key, value, low, high):
        if not low < value < high:
            raise ConversionError(
                f"{self.path}: the metadata key {self.architecture}.{key} is {value}, "
                f"a number between {low:g} and {high:g} was expected"
            )
        return value


def open_gguf(path):
    """The reader, its Metadata and its tensors by name."""
    try:
        check_structure(path)
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (ValueError, IndexError, OSError, KeyError, OverflowError) as error:
        raise ConversionError(
            f"{path}: not a readable GGUF file ({error}); it may be truncated, fetch it again"
        ) from None
    return Metadata(reader, path), {tensor.name: tensor for tensor in reader.tensors}
