"""The key-value part of a GGUF file."""

import numpy as np
from gguf import GGUFReader


class ConversionError(Exception):
    """One sentence: what is wrong, where, what to do."""


class Metadata:
    """Keys and values of a GGUF file, with errors that name the file and key."""

    def __init__(self, reader, path):
        self.path = path
        self._fields = reader.fields
        self.architecture = self.need("general.architecture")

    def get(self, key, default=None):
        field = self._fields.get(key)
        if field is None:
            return default
        value = field.contents()
        # A float32 is written back as the shortest decimal that reads as the same float32: 1e-05, not
        # 9.999999747378752e-06.
        if isinstance(value, float):
            value = float(str(np.float32(value)))
        return value

    def need(self, key):
        value = self.get(key)
        if value is None:
            raise ConversionError(f"{self.path}: the metadata key {key} is missing, so the file cannot be converted")
        return value

    # The same of a key that begins with the architecture's name.
    def get_own(self, key, default=None):
        return self.get(f"{self.architecture}.{key}", default)

    def need_own(self, key):
        return self.need(f"{self.architecture}.{key}")


def open_gguf(path):
    """The reader, its Metadata and its tensors by name."""
    try:
        reader = GGUFReader(path)
    except FileNotFoundError:
        raise ConversionError(f"{path}: no such file") from None
    except (ValueError, IndexError, OSError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise ConversionError(
            f"{path}: not a readable GGUF file ({error}); it may be truncated, fetch it again"
        ) from None
    return Metadata(reader, path), {tensor.name: tensor for tensor in reader.tensors}
