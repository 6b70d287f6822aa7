"""Make `src/fleetlift/device/data/vehicles.jsonl.gz` from the full recordings.

    python scripts/extract_vehicles.py vehicles.jsonl.gz

Takes the first eight minutes of every trip. A line is either a trip's head, `{"device", "records"}`, or one
of its records, `[t_ms, {fields}]`; `ts` is left out, since a replay stamps its messages anew. No value is
altered. The README beside the extract names the sources and their licence.
"""

import gzip
import sys
from pathlib import Path

import msgspec

MINUTES = 8
OUT = Path(__file__).parent.parent / "src/fleetlift/device/data/vehicles.jsonl.gz"


def main(source: Path) -> None:
    trips: dict[str, list[bytes]] = {}
    with gzip.open(source, "rb") as lines:
        for line in lines:
            record = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
            t_ms = int(bytes(record.pop("t_ms")))
            if t_ms >= MINUTES * 60_000:
                continue
            device = msgspec.json.decode(record.pop("device"), type=str)
            del record["ts"]
            trips.setdefault(device, []).append(msgspec.json.encode([t_ms, record]))
    with OUT.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0, filename="") as out:
        for device in sorted(trips):
            out.write(msgspec.json.encode({"device": device, "records": len(trips[device])}) + b"\n")
            out.writelines(record + b"\n" for record in trips[device])
    size = OUT.stat().st_size
    sys.stdout.write(f"{OUT}: {len(trips)} trips, {sum(map(len, trips.values()))} records, {size} bytes\n")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
