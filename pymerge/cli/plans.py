"""Plans shown on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

from pymerge.cli import options
from pymerge.cli.console import OUT, print_lines, print_warnings
from pymerge.common.events import event


def show_plan(
    config: Path,
    memory: str | None,
    max_shard_size: str,
    dtype: options.OutputDtype | None,
    device: str = "auto",
    form: str = "",
    part: tuple[int, int] | None = None,
    device_memory: str | None = None,
) -> None:
    """Show the plan of a config: as a table, or, by `form`, "tensors" or "json"; of a part, its files too."""
    from pymerge import api
    from pymerge.cli import tensor_table
    from pymerge.cli.plan_table import plan_view

    planned = api.plan(
        config,
        device=device,
        memory=memory,
        device_memory=device_memory,
        max_shard_size=max_shard_size,
        dtype=dtype.value if dtype else None,
    )
    event("plan", f"{planned.method.name}: {len(planned.steps)} tensors", **planned.summary())
    if form == "json":
        sys.stdout.write(tensor_table.plan_json(planned) + "\n")
    elif form == "tensors":
        OUT.print(tensor_table.tensor_view(planned))
    else:
        OUT.print(plan_view(planned))
        OUT.print(tensor_table.group_view(planned), soft_wrap=True)
    if part is not None:
        from pymerge.planner.parts import assign, few_files

        number, count = part
        files = assign(planned, count)[number - 1]
        print_lines([f"part {number}/{count} makes {len(files)} of {len(planned.files)} files: {', '.join(files)}"])
        if warning := few_files(planned, count):
            print_warnings((warning,))
