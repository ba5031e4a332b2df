"""Lines of JSON, one after the other."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pymerge.common.events import logger, recording


def test_times_of_lines_ascend_whatever_order_threads_made_their_records_in(tmp_path: Path) -> None:
    with recording(str(tmp_path / "log.jsonl")):
        for created in (200.0, 100.0, 300.0):
            record = logger.makeRecord(logger.name, logging.INFO, __file__, 1, "made at %s", (created,), None)
            record.created = created
            logger.handle(record)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["message"] for line in lines] == ["made at 200.0", "made at 100.0", "made at 300.0"]
    times = [line["time"] for line in lines]
    assert times == sorted(times)
