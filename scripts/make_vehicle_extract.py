"""Makes the extract of recorded vehicles that ships with the package.

    python scripts/make_vehicle_extract.py vehicles.jsonl.gz src/fleetlift/device/data/vehicles.jsonl.gz

Keeps the first eight minutes of every trip, drops `device` and `ts` of each record (the trip is named once,
time is kept as `t_ms` since the trip's start) and alters nothing else. The output is the same bytes each time.
"""

import gzip
import json
import sys
from pathlib import Path

KEEP_MS = 8 * 60 * 1000


def main(source: Path, target: Path) -> None:
    trips: dict[str, list[dict[str, object]]] = {}
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            device, _ = record.pop("device"), record.pop("ts")
            if record["t_ms"] < KEEP_MS:
                trips.setdefault(device, []).append(record)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as packed:
        for device, records in trips.items():
            packed.write(json.dumps({"trip": device, "records": len(records)}).encode() + b"\n")
            for record in records:
                packed.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
    kept = sum(map(len, trips.values()))
    sys.stdout.write(f"{target}: {len(trips)} trips, {kept:,} records, {target.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
