"""An answer schema as a grammar can hold it, and the one text of an answer."""

from headtail.core.schema.outline import Outline, closed, outline, pointed_at, without_names
from headtail.core.schema.text import DECIMALS, Write, fits, text_bounds, validator, writer

__all__ = ["DECIMALS", "Outline", "Write", "closed", "fits", "outline", "pointed_at", "text_bounds", "validator", "without_names", "writer"]
