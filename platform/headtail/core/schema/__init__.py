"""An answer schema as a grammar can hold it, and the one text of an answer."""

from headtail.core.schema.outline import Outline, close_objects, outline, resolve_pointer, resolve_reference
from headtail.core.schema.text import DECIMALS, Write, fit_check, text_bounds, validator, writer

__all__ = [
    "DECIMALS",
    "Outline",
    "Write",
    "close_objects",
    "fit_check",
    "outline",
    "resolve_pointer",
    "resolve_reference",
    "text_bounds",
    "validator",
    "writer",
]
