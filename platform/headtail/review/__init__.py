"""Review: people look at the answers that are likely to be wrong, those first by which most is gained."""

from headtail.review.commands import Config, export_file, import_file, serve
from headtail.review.log import HISTORY, decisions, digest, history
from headtail.review.transfer import Exported, Imported

__all__ = ["HISTORY", "Config", "Exported", "Imported", "decisions", "digest", "export_file", "history", "import_file", "serve"]
