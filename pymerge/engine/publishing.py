"""The end of a merge: everything beside the weights put in place, or an output that was there already verified."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from pymerge.common.events import event
from pymerge.common.names import printable
from pymerge.common.progress import ProgressSink
from pymerge.engine.memory import peak_resident_bytes
from pymerge.engine.model_card import RECIPE_NAME, model_card
from pymerge.engine.report import MergeReport
from pymerge.errors import OutputError
from pymerge.output.directory import OutputDirectory
from pymerge.output.manifest import build_manifest
from pymerge.planner.plan import Plan


def publish(plan: Plan, output: OutputDirectory) -> None:
    """Put everything beside the weights in place, and make the output visible."""
    donor = plan.inputs.donor
    files: dict[str, bytes | Path] = {path.as_posix(): donor.path / path for path in donor.other_files}
    files = {name: source for name, source in files.items() if name not in plan.tokens.dropped} | dict(
        plan.tokens.files
    )
    if "config.json" in files:  # of a folder whose transformer, with its config.json, is in a folder of its own
        files["config.json"] = (donor.path / "config.json").read_bytes()
    if plan.config_json is not None:
        files[Path(donor.folder, "config.json").as_posix()] = plan.config_json
    files["README.md"] = model_card(plan)
    files = {name: source for name, source in files.items() if name not in plan.given}
    files |= {name: data for name, data in plan.given.items() if data is not None}
    files[RECIPE_NAME] = plan.config.source_text.encode()
    layouts = output.beside[len(plan.modules) :]
    beside = plan.extras.files(layouts)
    manifest = build_manifest(
        plan.layouts,
        output.checksums,
        files | beside,
        identity=output.identity,
        recipe={
            "config": RECIPE_NAME,
            "directory": printable(plan.config.directory or Path.cwd()),
            "dtype": plan.dtype,
            "backend": plan.target.backend,
            "device": plan.target.device.type,
        },
        base_parameters=plan.base_parameters,
        modules=plan.modules,
        beside=layouts,
        changeable=plan.extras.changeable,
        infinite={step.name: step.infinite for step in plan.steps if step.infinite},
    )
    output.publish(files | beside, manifest, last=next(reversed(beside), None))


def verified(plan: Plan, out: Path, started: float, progress: ProgressSink) -> MergeReport:
    """The report of an output that was there already, after reading it again."""
    from pymerge.output.verify import verify

    found = verify(out, progress=progress, allow_nonfinite=plan.config.allow_nonfinite)
    if found.problems:
        raise OutputError(
            f"{out} holds this merge, but damaged: " + "; ".join(found.problems) + "; give --overwrite to redo it"
        )
    report = MergeReport(
        output=out,
        tensors=found.tensors,
        parameters=found.parameters,
        bytes_read=found.nbytes,
        bytes_written=0,
        seconds=(seconds := time.perf_counter() - started),
        reading=seconds,
        computing=0.0,
        writing=0.0,
        budget=plan.budget.tensors,
        peak_memory=peak_resident_bytes(),
        peak_device_memory=0,
        warnings=plan.warnings,
        already_done=True,
    )
    event("already_done", report.lines()[0], **asdict(report))
    return report
