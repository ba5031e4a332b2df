"""Adapters from fine-tuned models: the difference to the base as factors of low rank, with the error that they have."""

from __future__ import annotations

from pymerge.extraction.options import ExtractOptions
from pymerge.extraction.report import ExtractReport, TensorReport
from pymerge.extraction.run import run

__all__ = ["ExtractOptions", "ExtractReport", "TensorReport", "run"]
