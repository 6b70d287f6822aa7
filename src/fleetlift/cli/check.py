"""What `fleetlift migrate check` shows: the fleet, the waves, and what is missing."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from fleetlift.cli.screen import out, span

WARN, BAD, GOOD, FAINT = "yellow", "red", "green", "grey58"


def show_check(found: Mapping[str, Any]) -> bool:
    """Print the answer of `POST /migrations/check`; True when the migration could start."""
    console = out()
    tenant = found.get("kind") == "tenant"
    for line in move_lines(found) if tenant else lines(found, console.width):
        console.print(line, soft_wrap=True)
    return bool(found["ok"])


def move_lines(found: Mapping[str, Any]) -> list[Text]:
    """The check of a tenant's move as lines of text."""
    head = Text(found["name"], style="bold")
    head.append(f"  tenant {found['tenant']}", style=FAINT)
    shown = [head, Text()]
    shown += [Text(f"{number}. {step}") for number, step in enumerate(found["steps"], start=1)]
    if found["tables"]:
        shown += [Text(), Text(f"{len(found['tables'])} tables have rows to bring", style="bold")]
        names = max(len(one["table"]) for one in found["tables"])
        for one in found["tables"]:
            line = Text(f"  {one['table']:<{names}}  {one['part']:<7}")
            shown.append(line.append(f"  of about {max(one['rows'], 0):,} rows", style=FAINT))
        shown.append(Text("  'fleetlift tenant explain' counts them and says why each comes.", style=FAINT))
    shown.append(Text())
    shown += [Text(f"✗ {text}", style=BAD) for text in found["problems"]]
    shown += [Text("! ", style=WARN).append(text) for text in found["warnings"]]
    verdict = "✓ It can start." if found["ok"] else "✗ It cannot start like this."
    shown.append(Text(verdict, style=GOOD if found["ok"] else BAD))
    return shown


def lines(found: Mapping[str, Any], width: int) -> list[Text]:
    """The check as lines of text; names are wrapped to `width`."""
    head = Text(found["migration"], style="bold")
    head.append(f"  {found['from_side']} → {found['to_side']}  tenant {found['tenant']}", style=FAINT)
    shown = [
        head,
        Text(
            f"{found['inventory']:,} devices known, {found['selected']:,} selected, {found['movable']:,} to "
            f"be moved ({found['connected']:,} connected now), {found['excluded_total']:,} left out"
        ),
    ]
    if found["movable"]:
        shown += [Text(), *waves(found["rungs"])]
        shown.append(Text(f"At least {span(found['takes_s'])} of baking.", style=FAINT))
    if found["order"]:
        shown += [Text(), Text("First to move", style="bold"), *wrapped(found["order"][:40], width)]
    if found["excluded"]:
        shown += [Text(), Text("Left out", style="bold")]
        by_reason: dict[str, list[str]] = {}
        for item in found["excluded"]:
            by_reason.setdefault(item["reason"], []).append(item["device"])
        for reason, devices in by_reason.items():
            shown += [Text(f"{len(devices):,}: {reason}"), *wrapped(devices[:20], width)]
    shown.append(Text())
    for finding in found["findings"]:
        bad = finding["severity"] == "error"
        line = Text("✗ " if bad else "! ", style=BAD if bad else WARN)
        shown.append(line.append(finding["text"], style=BAD if bad else ""))
    if not found["findings"]:
        shown.append(Text("✓ Nothing is missing.", style=GOOD))
    verdict = "✓ It can start." if found["ok"] else "✗ It cannot start like this."
    shown.append(Text(verdict, style=GOOD if found["ok"] else BAD))
    return shown


def waves(rungs: Sequence[Mapping[str, Any]]) -> list[Text]:
    """Each rung with its waves and gates."""
    shown = []
    for rung in rungs:
        line = Text(f"{rung['rung']}. {rung['step']} → {rung['stage']}", style="bold")
        line.append(f"  bake {span(rung['bake_s'])}", style=FAINT)
        if rung["approve"]:
            line.append("  a person approves each wave", style=WARN)
        shown.append(line)
        steps = Text("   ")
        for wave in rung["waves"]:
            if wave["adds"]:
                steps.append(f"{wave['label']} ").append(f"+{wave['adds']:,}   ", style="cyan")
            else:
                steps.append(f"{wave['label']} -   ", style=FAINT)
        shown.append(steps)
        forecasts = {one["gate"]: one for one in rung.get("forecasts", ())}
        for gate in rung["gates"]:
            line = Text(f"   gate {gate}", style=FAINT)
            if gate in forecasts:
                line.append(f"  {soonest(forecasts[gate])}", style=FAINT)
            shown.append(line)
    return shown


def soonest(one: Mapping[str, Any]) -> str:
    """When a gate can be decided, if nothing goes wrong: of the slowest wave."""
    if one["least"] is None:
        return "never sure"
    known = [seconds for seconds in one["waves_s"] if seconds is not None]
    needs = f"sure after {one['least']:,} {one['counts']}"
    return f"{needs}, {span(min(known))} to {span(max(known))}" if known else needs


def wrapped(names: Sequence[str], width: int) -> list[Text]:
    """`names` side by side, as many as fit a line."""
    shown, row = [], "  "
    for name in names:
        if len(row) + len(name) + 2 > width and row.strip():
            shown.append(Text(row.rstrip()))
            row = "  "
        row += f"{name}  "
    return [*shown, Text(row.rstrip())]
