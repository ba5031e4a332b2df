"""The report: one HTML file that needs nothing else, and the numbers behind it as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2

from pymerge import env
from pymerge.analysis.charts import heat_map, line_chart
from pymerge.analysis.findings import findings, percent
from pymerge.analysis.measures import Analysis, Spectrum, TensorMeasures, cosines
from pymerge.common.files import atomic_write
from pymerge.common.names import template
from pymerge.common.units import format_bytes, format_flops
from pymerge.errors import OutputError
from pymerge.planner.plan import Plan

PAGE_NAME, DATA_NAME = "index.html", "report.json"
_WORST = 20  # tensors listed
_POINTS = 96  # drawn of each line of singular values


def write_report(plan: Plan, analysis: Analysis, folder: Path | str) -> Path:
    """Write index.html and report.json into `folder` (made if it is missing); returns the page's path.

    Earlier reports are replaced. Raises OutputError if the folder cannot be written.
    """
    folder = Path(folder)
    data = {"pymerge": env.version(), "plan": plan.summary(), "analysis": analysis.as_json()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / DATA_NAME, (json.dumps(data, indent=1, default=str) + "\n").encode())
        atomic_write(folder / PAGE_NAME, page(plan, analysis).encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
    return folder / PAGE_NAME


def page(plan: Plan, analysis: Analysis) -> str:
    """The page as HTML; all of it is in this text."""
    surroundings = jinja2.Environment(
        loader=jinja2.PackageLoader("pymerge.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined
    )
    threshold = {"ACE refines above 0.3": 0.3}
    independent = {"independent": 1 - 1 / math.sqrt(len(analysis.experts))}
    return surroundings.get_template("page.html").render(
        version=env.version(),
        plan=plan,
        read=format_bytes(plan.bytes_read),
        written=format_bytes(plan.bytes_written),
        flops=format_flops(plan.flops),
        memory=format_bytes(plan.peak_memory),
        groups=list(_groups(plan)),
        analysis=analysis,
        findings=findings(analysis),
        experts=list(_experts(analysis)),
        cosines=heat_map([_short(name) for name in analysis.experts], cosines(analysis.dots)),
        by_block=[
            ("Cosine between task vectors", _by_block(analysis, lambda tensor: tensor.mean_cosine, "mean cosine")),
            ("Cancellation", _by_block(analysis, lambda tensor: tensor.cancellation, "cancellation", independent)),
            ("Size against the base", _by_block(analysis, lambda tensor: tensor.relative_size, "||tau|| / ||W_0||")),
            ("Heterogeneity (ACE's gamma)", _by_block(analysis, lambda tensor: tensor.gamma, "gamma", threshold)),
        ],
        worst=_worst(analysis),
        worst_count=_WORST,
        spectra=[(spectrum, _spectrum(analysis, spectrum)) for spectrum in analysis.spectra],
        percent=percent,
        short=_short,
    )


def _short(name: str) -> str:
    """The last part of a path or Hub id."""
    return Path(name).name or name


def _experts(analysis: Analysis) -> Iterable[tuple[str, str, str, str]]:
    """Name, ||tau_t|| / ||W_0||, root mean square of tau_t, and share of elements that are the base's."""
    for task, name in enumerate(analysis.experts):
        norm = math.sqrt(analysis.dots[task][task])
        relative = norm / analysis.base_norm if analysis.base_norm > 0 else math.nan
        rms = norm / math.sqrt(max(1, analysis.elements))
        yield name, f"{relative:.3g}", f"{rms:.2e}", percent(analysis.unchanged(task))


def _by_block(
    analysis: Analysis,
    value: Callable[[TensorMeasures], float],
    label: str,
    marks: Mapping[str, float] | None = None,
) -> str:
    """A line for each role of matrices, over the blocks of the model; matrices outside blocks are in the JSON."""
    series: dict[str, list[tuple[float, float]]] = {}
    for tensor in analysis.tensors:
        if tensor.block is not None and len(tensor.shape) > 1:
            series.setdefault(_part(tensor.template), []).append((tensor.block, value(tensor)))
    return line_chart(series, x_label="block", y_label=label, marks=marks)


def _part(template: str) -> str:
    """Part of a role after the last number, "mlp.up_proj"; where that is nothing, all of it: "stem.*"."""
    inside = template.rpartition(".*.")[2].removesuffix(".weight")
    return template.removesuffix(".weight") if inside == "weight" else inside


def _worst(analysis: Analysis) -> list[TensorMeasures]:
    """The tensors whose task vectors cancel most; without those that no or one task touched."""
    known = [tensor for tensor in analysis.tensors if not math.isnan(tensor.mean_cosine)]
    return sorted(known, key=lambda tensor: (-tensor.cancellation, tensor.name))[:_WORST]


def _spectrum(analysis: Analysis, spectrum: Spectrum) -> str:
    """Singular values of each task, relative to its largest."""
    series = {}
    for name, values in zip(analysis.experts, spectrum.values, strict=True):
        step = max(1, len(values) // _POINTS)
        largest = values[0] if values and values[0] > 0 else math.nan
        series[_short(name)] = [(index, value / largest) for index, value in enumerate(values) if index % step == 0]
    return line_chart(series, x_label="index", y_label="singular value / largest", limits=(1e-4, 1.0), log=True)


def _groups(plan: Plan) -> Iterable[dict[str, Any]]:
    """Rows of the plan: tensors that differ in their block only."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for step in plan.steps:
        groups.setdefault((template(step.name), step.shape, step.action.label, step.dtype), []).append(step)
    for (name, shape, action, dtype), steps in groups.items():
        yield {
            "name": name,
            "shape": " x ".join(map(str, shape)) or "scalar",
            "action": action,
            "dtype": dtype,
            "count": len(steps),
            "read": format_bytes(sum(step.bytes_read for step in steps)),
            "write": format_bytes(sum(step.nbytes for step in steps)),
            "flops": format_flops(sum(step.flops for step in steps)),
        }
