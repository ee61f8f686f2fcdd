"""A task's answers as compact code: no keys, no braces, a choice is one sign."""

from headtail.core.compact.codec import ALPHABET, VERSION, Codec, Decoded
from headtail.core.compact.streams import Unfit

__all__ = ["ALPHABET", "VERSION", "Codec", "Decoded", "Unfit"]
