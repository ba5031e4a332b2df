"""Records of shards: `<shard>.json` in the work folder says that one is whole, of which merge, and its checksums."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from pymerge.common.events import event
from pymerge.common.files import install, os_errors, parse_json_object, read_text_file
from pymerge.output.identity import Identity
from pymerge.output.work import host, record_name, temporary


@dataclass(frozen=True)
class Record:
    """Record of a whole shard: the digest of the merge's identity, checksum of each tensor, and where it was made."""

    identity: str
    tensors: Mapping[str, str]
    host: str
    seconds: float


def identity_digest(identity: Identity) -> str:
    """sha256 (hex) of an identity."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def save_record(work: Path, shard: str, identity: str, tensors: Mapping[str, str], seconds: float) -> Record:
    """Record that a shard in the work folder is whole. Raises OutputError."""
    record = Record(identity, dict(tensors), host(), round(seconds, 3))
    text = json.dumps(asdict(record), indent=1, sort_keys=True) + "\n"
    install(text.encode(), work / record_name(shard), temporary(work))
    return record


def load_records(work: Path, shards: Iterable[str], identity: str) -> dict[str, Record]:
    """The records of these shards that are of this identity. Others, and damaged ones, are told in an event."""
    found: dict[str, Record] = {}
    for shard in shards:
        path = work / record_name(shard)
        try:
            with os_errors(path, "reading"):
                if not path.exists():
                    continue
                record = _checked(Record(**parse_json_object(read_text_file(path), unique=True)))
            reason = "is of another merge" if record.identity != identity else ""
        except (ValueError, TypeError) as error:
            reason = f"is damaged ({error})"
        if reason:
            text = f"{path}: {reason}; {shard} is made again"
            event("shard_damaged", text, level=logging.WARNING, file=shard)
        else:
            found[shard] = record
    return found


def _checked(record: Record) -> Record:
    texts = [record.identity, record.host, *record.tensors.values()]
    if not all(isinstance(text, str) for text in texts) or not isinstance(record.seconds, (int, float)):
        raise ValueError("a field has the wrong type")
    return record
