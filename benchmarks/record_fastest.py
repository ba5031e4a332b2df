"""Takes results of bench_ops on a GPU into pymerge/backends/measured.json, from which `auto` chooses there.

python benchmarks/record_fastest.py benchmarks/results/<device>/<date>-ops.json
"""

from __future__ import annotations

import sys
from pathlib import Path

from pymerge.backends import measured

for argument in sys.argv[1:]:
    print(f"{measured.record(Path(argument))} cases of {argument} recorded; {measured.summary()}")
