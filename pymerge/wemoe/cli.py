"""`pymerge wemoe`: the commands of WEMoE."""

from __future__ import annotations

import typer

from pymerge.wemoe.adapt_cli import adapt_command
from pymerge.wemoe.build_cli import build_command, info_command

wemoe_app = typer.Typer(
    help="Merged models whose MLPs mix base and experts for each input.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
wemoe_app.command("build")(build_command)
wemoe_app.command("info")(info_command)
wemoe_app.command("adapt")(adapt_command)
