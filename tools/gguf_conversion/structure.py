"""What a GGUF file claims of itself, checked before the package gguf reads it: that takes every count at its word, and a file
of a hundred bytes can ask for any amount of time and memory."""

import mmap
import os
import struct

SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # by type of a value
STRING, ARRAY = 8, 9
# Of all arrays together: the reader makes an object of each. The largest vocabularies need two million.
MOST_VALUES = 8_000_000
MOST_DIMS = 4  # the format's own limit


class ConversionError(Exception):
    """One sentence: what is wrong, where, what to do."""


class Walk:
    """A position in the file that moves only over bytes that are there."""

    def __init__(self, path, data):
        self.path, self.data, self.at = path, data, 0

    def refuse(self, why):
        raise ConversionError(f"{self.path}: not a readable GGUF file ({why}); it may be truncated, fetch it again")

    def skip(self, count):
        if count > len(self.data) - self.at:
            self.refuse(f"{count} bytes at byte {self.at} lie beyond its end at {len(self.data)}")
        self.at += count

    def number(self, form):
        begin = self.at
        self.skip(struct.calcsize(form))
        return struct.unpack_from("<" + form, self.data, begin)[0]

    def skip_string(self):
        self.skip(self.number("Q"))

    def skip_value(self, kind, count):
        if kind == STRING:
            for _ in range(count):
                self.skip_string()
        elif kind in SCALAR_BYTES:
            self.skip(count * SCALAR_BYTES[kind])
        else:
            self.refuse(f"a value of type {kind} at byte {self.at}")


def check_structure(path):
    """Walks over the header of the file `path`. Raises ConversionError where a length leads beyond the end, arrays hold
    other arrays or more than MOST_VALUES values, or a tensor has more than MOST_DIMS dimensions or values than the file
    has bits. OSError when it cannot be read."""
    with open(path, "rb") as file:
        if os.fstat(file.fileno()).st_size < 24:
            Walk(path, b"").refuse("it has fewer than 24 bytes")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            walk_header(Walk(path, data))


def walk_header(walk):
    if walk.number("4s") != b"GGUF":
        walk.refuse("it does not begin with GGUF")
    version = walk.number("I")
    if version not in (2, 3):
        raise ConversionError(f"{walk.path}: GGUF of version {version} is not supported, little-endian 2 and 3 are")
    num_tensors, num_keys = walk.number("Q"), walk.number("Q")
    values = 0
    for _ in range(num_keys):
        walk.skip_string()
        kind, count = walk.number("I"), 1
        if kind == ARRAY:
            kind, count = walk.number("I"), walk.number("Q")
            values += count
            if values > MOST_VALUES:
                walk.refuse(f"its arrays hold more than {MOST_VALUES} values")
        walk.skip_value(kind, count)
    for _ in range(num_tensors):
        walk.skip_string()
        dims = walk.number("I")
        if dims > MOST_DIMS:
            walk.refuse(f"a tensor of {dims} dimensions at byte {walk.at}")
        size = 1
        for _ in range(dims):
            size *= walk.number("Q")
        # The tightest types take more than a bit a value.
        if size > 8 * len(walk.data):
            walk.refuse(f"a tensor of {size} values at byte {walk.at}, more than it has room for")
        walk.skip(4 + 8)
