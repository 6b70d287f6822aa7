"""The report of a load test: one HTML page that needs no network."""

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files

from fleetlift.core.load_result import LoadResult
from fleetlift.core.migration import GateResult, Verdict
from fleetlift.core.units import format_count, format_duration
from fleetlift.migrate.load_section import load_section
from fleetlift.migrate.page import section, table


def load_page(result: LoadResult, gates: Sequence[GateResult] = ()) -> str:
    """The whole page. Deterministic: the same result gives the same bytes."""
    style = files("fleetlift.migrate").joinpath("report.css").read_text(encoding="utf-8")
    script = files("fleetlift.migrate").joinpath("report.js").read_text(encoding="utf-8")
    began = datetime.fromtimestamp(result.started_at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    name = escape(result.scenario)
    how = f"{result.protocol}, QoS {result.qos}" if result.protocol == "mqtt" else result.protocol
    header = (
        f'<header><p class="kicker">Load test · {escape(result.target)} · {escape(how)}</p>'
        f"<h1>{name}</h1>"
        f'<p class="note">{began} · lasted {format_duration(round(result.lasted_s))} · '
        f"{format_count(result.devices)} devices · {result.processes} "
        f"process{'' if result.processes == 1 else 'es'} · seed {result.seed}</p></header>"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name}: load test</title><style>{style}</style></head><body><main>"
        f"{header}{_gates(gates)}{load_section(result)}"
        f"<footer>Made by Fleetlift. Latencies count from the moment a message was meant to be sent, however "
        f"late it was sent.</footer></main>"
        f'<div id="tip" hidden></div><script>{script}</script></body></html>'
    )


def _gates(gates: Sequence[GateResult]) -> str:
    if not gates:
        return ""
    rows = [
        f"<tr><td>{'✓' if one.verdict is Verdict.ADVANCE else '✗'}</td>"
        f"<td><code>{escape(one.gate)}</code></td><td>{escape(one.why)}</td></tr>"
        for one in gates
    ]
    return section("Gates", table(("", "gate", "in words"), rows))
