"""What every report's page is made of: one HTML file that needs no network, for people who were not there."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import msgspec

from fleetlift.migrate.plots import Mark, clock_label, value_label


class AuditLine(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    actor: str
    kind: str
    text: str
    evidence: dict[str, Any] = {}


class Figure(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of the verdict; `good` False is shown as a fault, None as plain information."""

    label: str
    value: str
    good: bool | None = None


MARK_KINDS: Mapping[str, str] = {
    "wave_opened": "step",
    "gate_breached": "breach",
    "breach": "breach",
    "wave_returned": "breach",
    "wave_returning": "breach",
    "finished": "done",
    "migration_finished": "done",
    "step_begun": "step",
    "step_failed": "breach",
    "follow_stopped": "breach",
    "way_back_closed": "breach",
    "migration_reverting": "breach",
}


def page(
    *,
    name: str,
    tenant: str,
    phase: str,
    reason: str,
    started_at: float,
    ended_at: float,
    sections: Sequence[str],
) -> str:
    """The whole page. Deterministic: the same facts give the same bytes."""
    head, css, script = escape(name), _asset("report.css"), _asset("report.js")
    shown = f'<p class="reason">{escape(reason)}</p>' if reason else ""
    header = (
        f'<header><p class="kicker">Migration report · tenant {escape(tenant)}</p>'
        f'<h1>{head} <span class="phase {escape(phase)}">{escape(phase)}</span></h1>{shown}'
        f'<p class="note">{_when(started_at)} to {_when(ended_at)} · '
        f"lasted {clock_label(ended_at - started_at)}</p></header>"
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{head}: migration report</title><style>{css}</style></head><body><main>"
        f"{header}{''.join(sections)}"
        f"<footer>Made by Fleetlift from the engine's own records.</footer></main>"
        f'<div id="tip" hidden></div><script>{script}</script></body></html>'
    )


def _asset(name: str) -> str:
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def section(title: str, body: str, note: str = "") -> str:
    note_html = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{note_html}{body}</section>"


def _when(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def tiles(figures: Sequence[Figure]) -> str:
    """The verdict's figures, side by side."""
    shown = []
    for figure in figures:
        sign = {True: "✓", False: "✗", None: ""}[figure.good]
        css = {True: "good", False: "bad", None: ""}[figure.good]
        shown.append(
            f'<div class="tile {css}"><b>{escape(figure.value)}</b>'
            f"<span>{sign} {escape(figure.label)}</span></div>"
        )
    return f'<section class="tiles">{"".join(shown)}</section>' if shown else ""


def marks_of(audit: Sequence[AuditLine], started_at: float) -> list[Mark]:
    """Vertical lines for plots: what the audit log tells of."""
    return [
        Mark(at=line.at - started_at, label=line.text, kind=MARK_KINDS[line.kind])
        for line in audit
        if line.kind in MARK_KINDS
    ]


def audit_section(audit: Sequence[AuditLine], started_at: float, chain_head: str) -> str:
    """The whole audit log, each line with its figures folded away."""
    rows = []
    for line in audit:
        evidence = (
            msgspec.json.format(msgspec.json.encode(line.evidence), indent=2).decode()
            if line.evidence
            else ""
        )
        shown = (
            f"<details><summary>figures</summary><pre>{escape(evidence)}</pre></details>" if evidence else ""
        )
        css = MARK_KINDS.get(line.kind, "")
        rows.append(
            f'<tr class="{css}"><td class=n>{clock_label(line.at - started_at)}</td>'
            f"<td>{escape(line.actor)}</td><td><code>{escape(line.kind)}</code></td>"
            f"<td>{escape(line.text)}{shown}</td></tr>"
        )
    return section(
        "Audit log",
        table(("at", "who", "what", "in words"), rows),
        f"{len(audit)} decisions, each with the figures that led to it."
        + (f" A chain of hashes; the last is {escape(chain_head)}." if chain_head else ""),
    )


def audit_lines(rows: Sequence[Mapping[str, Any]]) -> list[AuditLine]:
    """Lines of rows of `engine.audit`."""
    return [
        AuditLine(
            at=a["at"].timestamp(),
            actor=a["actor"],
            kind=a["kind"],
            text=a["text"],
            evidence=decoded(a["evidence"]),
        )
        for a in rows
    ]


def mark_legend(marks: Sequence[Mark]) -> str:
    """What the vertical lines mean, those that there are."""
    kinds = {mark.kind for mark in marks}
    names = {
        "step": "a wave or step began",
        "breach": "a gate was breached, or something went back",
        "done": "finished",
    }
    shown = [f'<span class="key {k}"></span> {v}' for k, v in names.items() if k in kinds]
    return "Vertical lines: " + " · ".join(shown) if shown else ""


def table(heads: Sequence[str], rows: Sequence[str], *, figures_from: int | None = None) -> str:
    """A table of ready-made rows; from column `figures_from` on the heads stand over figures."""
    right = len(heads) if figures_from is None else figures_from
    head = "".join(f"<th{' class=n' if i >= right else ''}>{escape(h)}</th>" for i, h in enumerate(heads))
    body = "".join(rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def duration_figure(seconds: float | None) -> str:
    return "not measured" if seconds is None else value_label(seconds, "s")


def decoded(value: Any) -> dict[str, Any]:
    """A jsonb column, whether or not the pool decodes it."""
    decoded = msgspec.json.decode(value) if isinstance(value, str) else value
    assert isinstance(decoded, dict)
    return decoded
