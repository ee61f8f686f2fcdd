"""Review: people look at the answers that are likely to be wrong, highest expected gain first."""

from headtail.review.commands import Config, export_reviews, import_reviews, serve_page
from headtail.review.log import HISTORY, decision_history, decisions, digest
from headtail.review.transfer import ExportReport, ImportReport

__all__ = [
    "HISTORY",
    "Config",
    "ExportReport",
    "ImportReport",
    "decision_history",
    "decisions",
    "digest",
    "export_reviews",
    "import_reviews",
    "serve_page",
]
