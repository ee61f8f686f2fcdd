"""A task's answers in the compact format: no keys, no braces, a choice is one symbol."""

from headtail.core.compact.codec import ALPHABET, VERSION, Codec, DecodedAnswer
from headtail.core.compact.streams import CompactError

__all__ = ["ALPHABET", "VERSION", "Codec", "CompactError", "DecodedAnswer"]
