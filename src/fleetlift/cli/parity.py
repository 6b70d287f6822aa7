"""What `fleetlift migrate parity` shows: every message in one class, and the fields that differed."""

from collections.abc import Mapping
from typing import Any

from rich.text import Text

from fleetlift.cli.screen import listing, out

CLASSES = (
    ("matched", "matched"),
    ("only_old", "only old"),
    ("only_new", "only new"),
    ("differing", "differing"),
    ("ignored", "by rule"),
)
FIELDS_MAX = 40


def show_parity(found: Mapping[str, Any]) -> None:
    """Print the answer of `GET /migrations/{name}/parity`."""
    account = found["account"]
    console = out()
    if not found["all"]:
        console.print(Text("No device has sent to both sides yet: there is nothing to compare."))
    else:
        parts = [f"{account[name]:,} {label}" for name, label in CLASSES]
        console.print(Text(f"{found['all']:,} messages = " + " + ".join(parts)), soft_wrap=True)
        bad = found["above_noise"] > 0
        sign = Text("✗ " if bad else "✓ ", style="red" if bad else "green")
        console.print(sign + Text(f"{percent(found['above_noise'])} of the pairs differ above noise."))
        if account["retimed"]:
            console.print(f"{account['retimed']:,} of the differing have another time on each side.")
        if account["uncounted"]:
            console.print(f"{account['uncounted']:,} messages carry no number and are not compared.")
    noise = found["noise_compared"]
    console.print(
        f"Noise: of {noise:,} messages that {found['old']} was asked for twice, "
        f"{found['noise_differing']:,} differed from themselves."
        if noise
        else f"Noise: {found['old']} has not been asked for anything twice yet."
    )
    for rule in found["rules"]:
        console.print(f"Rule: {rule}")
    console.print()
    listing(
        found["channels"],
        [
            ("Channel", lambda c: c["channel"]),
            ("Devices", lambda c: c["devices"]),
            ("All", lambda c: c["all"]),
            *((label.capitalize(), _class(name)) for name, label in CLASSES),
        ],
        as_json=False,
        empty="No channel has been compared.",
    )
    if found["fields"]:
        console.print()
        listing(
            found["fields"][:FIELDS_MAX],
            [
                ("Field", lambda f: f"{f['channel']} {f['field']}"),
                ("Differs", lambda f: f["differing"]),
                ("By rule", lambda f: f["allowed"]),
                ("Noise", lambda f: percent(f["noise"])),
                ("Above", lambda f: percent(f["above_noise"])),
                ("Likely", lambda f: f["likely"]),
                ("Old", lambda f: f["old"]),
                ("New", lambda f: f["new"]),
            ],
            as_json=False,
            empty="",
            more=len(found["fields"]) > FIELDS_MAX,
        )


def _class(name: str) -> Any:
    return lambda channel: channel["account"][name]


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"
