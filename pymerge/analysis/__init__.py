"""Measures of experts before they are merged: of their task vectors, and a page that shows them."""

from __future__ import annotations

from pymerge.analysis.measures import Analysis, Spectrum, TensorMeasures
from pymerge.analysis.page import write_report
from pymerge.analysis.run import survey

__all__ = ["Analysis", "Spectrum", "TensorMeasures", "survey", "write_report"]
