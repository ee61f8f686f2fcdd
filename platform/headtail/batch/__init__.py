"""Batch inference: an engine over any number of rows, such that no row is lost, doubled, mixed or paid twice."""

from headtail.batch.catalog import ANSWERS
from headtail.batch.driver import generate, read_answers, remove_work_files
from headtail.batch.job import InputTable, Job
from headtail.batch.ledger import Ledger
from headtail.batch.limits import Limits

__all__ = ["ANSWERS", "InputTable", "Job", "Ledger", "Limits", "generate", "read_answers", "remove_work_files"]
