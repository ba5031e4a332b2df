"""Findings: the measures in sentences, no more than the numbers show."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

from pymerge.analysis.measures import Analysis, cosines, pairs

_REFINED_ABOVE = 0.3  # the released gamma_threshold of ACE
_PUBLISHED_RMS = 5e-4  # of the deltas of CLIP ViT-B/32 experts, for which WUDI's lr 1e-5 was published
_ALIGNED, _ORTHOGONAL = 0.3, 0.05  # what is called similar, and nearly orthogonal


def percent(share: float) -> str:
    """0.123 as "12.3 %"."""
    return "unknown" if math.isnan(share) else f"{100 * share:.3g} %"


def findings(analysis: Analysis) -> list[str]:
    """One sentence for each thing worth knowing before a merge."""
    return [
        *_likeness(analysis),
        *_sizes(analysis),
        *_conflict(analysis),
        *_heterogeneity(analysis),
        *_untouched(analysis),
        *_ranks(analysis),
    ]


def _likeness(analysis: Analysis) -> list[str]:
    known = [(value, row, column) for row, column, value in pairs(cosines(analysis.dots)) if not math.isnan(value)]
    if not known:
        return []
    mean = statistics.fmean(value for value, _, _ in known)
    word = "similar" if mean > _ALIGNED else "nearly orthogonal" if abs(mean) < _ORTHOGONAL else "little alike"
    if mean < -_ORTHOGONAL:
        word = "opposed"
    text = f"The task vectors are {word}: the mean cosine between two of them is {mean:.2f}."
    if max(known)[0] - min(known)[0] > _ORTHOGONAL:
        (most, a, b), (least, c, d) = max(known), min(known)
        text += (
            f" Most alike are {_name(analysis, b)} and {_name(analysis, a)} ({most:.2f}), "
            f"least {_name(analysis, d)} and {_name(analysis, c)} ({least:.2f})."
        )
    return [text]


def _sizes(analysis: Analysis) -> list[str]:
    norms = [math.sqrt(analysis.dots[task][task]) for task in range(len(analysis.experts))]
    touched = [(norm, task) for task, norm in enumerate(norms) if norm > 0]
    said = [f"{_name(analysis, task)} equals the base." for task, norm in enumerate(norms) if norm == 0]
    if len(touched) > 1:
        (largest, a), (smallest, b) = max(touched), min(touched)
        said.append(
            f"The largest task vector ({_name(analysis, a)}) is {largest / smallest:.2g} times as long as the smallest "
            f"({_name(analysis, b)}); methods that add task vectors give it that much more say."
        )
    if touched:
        rms = statistics.median(norm for norm, _ in touched) / math.sqrt(max(1, analysis.elements))
        said.append(
            f"The root mean square of the deltas is {rms:.1e}, {rms / _PUBLISHED_RMS:.2g} times that of the experts "
            "for which WUDI's fixed step (lr 1e-5) was published."
        )
    return said


def _conflict(analysis: Analysis) -> list[str]:
    if len(analysis.experts) < 2:
        return []
    absolute = math.fsum(tensor.absolute for tensor in analysis.tensors)
    if absolute == 0:
        return []
    share = 1 - math.fsum(tensor.net for tensor in analysis.tensors) / absolute
    independent = 1 - 1 / math.sqrt(len(analysis.experts))
    return [
        f"Added up, the task vectors cancel {percent(share)} of their absolute size; independent ones of equal size "
        f"would cancel {percent(independent)}."
    ]


def _heterogeneity(analysis: Analysis) -> list[str]:
    known = [tensor.gamma for tensor in analysis.tensors if len(tensor.shape) > 1 and not math.isnan(tensor.gamma)]
    if not known:
        return []
    above = sum(gamma > _REFINED_ABOVE for gamma in known)
    return [
        f"ACE's heterogeneity gamma is {statistics.median(known):.2g} in the median over {len(known)} matrices and at "
        f"most {max(known):.2g}; {above} are above {_REFINED_ABOVE}, where ACE refines linear weights."
    ]


def _untouched(analysis: Analysis) -> list[str]:
    nowhere = sum(not any(tensor.norms) for tensor in analysis.tensors)
    shares = [analysis.unchanged(task) for task in range(len(analysis.experts))]
    said = [f"{nowhere} of {len(analysis.tensors)} tensors are the base's in every expert."] if nowhere else []
    if max(shares) > 0.01:
        said.append(
            f"Between {percent(min(shares))} and {percent(max(shares))} of the elements of an expert are the base's, "
            "bit for bit after conversion."
        )
    return said


def _ranks(analysis: Analysis) -> list[str]:
    shares = [
        rank / min(spectrum.shape) for spectrum in analysis.spectra for rank in spectrum.ranks if min(spectrum.shape)
    ]
    if not shares:
        return []
    return [
        f"Of the {len(analysis.spectra)} weights looked at, {percent(statistics.median(shares))} of the singular "
        f"directions hold 90 % of a task vector in the median (from {percent(min(shares))} to {percent(max(shares))})."
    ]


def _name(analysis: Analysis, task: int) -> str:
    return Path(analysis.experts[task]).name or analysis.experts[task]
