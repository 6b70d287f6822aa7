"""What is printed: the figures, where the time went, what has changed. All of it fits 80 columns."""

import textwrap
from collections.abc import Iterable, Sequence

from benchmarks.figures import Result
from benchmarks.machine import BUSY_MAX_CORES
from benchmarks.processes import Profile
from benchmarks.runs import Run

WIDTH = 80
SAME_WITHIN = 0.05  # single runs differ that much for no reason at all


def number(value: float, unit: str = "") -> str:
    """Three significant digits, or all before the point; with thousands apart."""
    size = abs(value)
    text = f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.3g}"
    if size and size < 0.001:
        text = f"{value:.1e}"
    return f"{text} {unit}".rstrip()


def figures(results: Sequence[Result], *, quick: bool = False) -> str:
    """The table, and below it what each limit is and what is to be said about each value."""
    lines = [f"{'figure':<22}{'value':>14}{'target':>13}{'limit':>14}{'ratio':>8}  verdict", "-" * WIDTH]
    notes: list[str] = []
    for r in results:
        sign = "≥" if r.better == "higher" else "≤"
        verdict = "INVALID" if r.invalid else "quick" if quick else "meets" if r.meets else "MISSES"
        lines.append(
            f"{r.name:<22}{number(r.value, r.unit):>14}{sign + ' ' + number(r.target):>13}"
            f"{number(r.limit) if r.limit is not None else '-':>14}"
            f"{number(r.ratio) if r.ratio is not None else '-':>8}  {verdict}"
        )
        if r.invalid:
            notes += _note(r.name, f"INVALID, does not count: {r.invalid}")
        if r.limit_is and r.limit is not None:
            notes += _note(r.name, f"limit: {r.limit_is}")
        for text in r.notes:
            notes += _note(r.name, text)
    if quick:
        notes += ["A quick run: too short to be compared with others."]
    return "\n".join([*lines, "", *notes]) if notes else "\n".join(lines)


def _note(name: str, text: str) -> list[str]:
    return textwrap.wrap(f"{name}: {text}", WIDTH, subsequent_indent="    ")


def profile(bench: str, found: Profile) -> str:
    """Who used the processor, and where in it."""
    lines = textwrap.wrap(
        f"{bench}, {found.what}: {number(found.machine_cores)} cores busy for {number(found.wall_s)} s", WIDTH
    )
    for share in found.shares:
        if share.cores < 0.005:
            continue
        count = f" ({share.processes} processes)" if share.processes > 1 else ""
        lines.append(f"  {number(share.cpu_s):>8} s CPU {share.cores:6.2f} cores  {share.name}{count}")
    lines.append(f"  {'':>14} {found.others_cores:6.2f} cores  kernel and processes of others")
    for hot in found.hot:
        lines.append(f"  {hot.name}, where it was running:" if hot.lines else f"  {hot.name}: {hot.problem}")
        lines += [f"    {line}"[:WIDTH] for line in hot.lines]
    return "\n".join(lines)


def comparison(before: Run, after: Run) -> str:
    """What has changed between two runs, figure by figure, with signs and words."""
    old = {r.name: r for r in before.figures}
    new = {r.name: r for r in after.figures}
    lines = [
        f"{before.at}  →  {after.at}",
        "",
        f"{'figure':<22}{'before':>14}{'after':>14}{'change':>10}  verdict",
        "-" * WIDTH,
    ]
    for name in dict.fromkeys([*old, *new]):
        lines.append(_change(name, old.get(name), new.get(name)))
    lines += ["", *_warnings(before, after)]
    return "\n".join(lines).rstrip()


def _change(name: str, old: Result | None, new: Result | None) -> str:
    if old is None or new is None:
        there = old or new
        assert there is not None
        shown = number(there.value, there.unit)
        before, after = (shown, "-") if new is None else ("-", shown)
        return f"{name:<22}{before:>14}{after:>14}{'':>10}  only in {'the first' if new is None else 'this'}"
    shown = f"{name:<22}{number(old.value, old.unit):>14}{number(new.value, new.unit):>14}"
    if old.invalid or new.invalid:
        return f"{shown}{'':>10}  not compared: invalid"
    if not old.value:
        return f"{shown}{'':>10}  not compared: was 0"
    change = new.value / old.value - 1
    return f"{shown}{change:>+10.1%}  {_word(change, new.better == 'higher')}"


def _word(change: float, higher_is_better: bool) -> str:
    if abs(change) <= SAME_WITHIN:
        return "= the same"
    return "+ better" if (change > 0) == higher_is_better else "- WORSE"


def _warnings(before: Run, after: Run) -> Iterable[str]:
    yield f"Within {SAME_WITHIN:.0%} counts as the same."
    for run in (before, after):
        if run.quick:
            yield f"{run.at} was a quick run: do not read much into it."
        if run.machine is not None and run.machine.busy_cores > BUSY_MAX_CORES:
            yield f"{run.at}: the machine was busy already ({number(run.machine.busy_cores)} cores)."
    one, two = before.machine, after.machine
    if one is not None and two is not None:
        for what in ("cores", "cpu", "memory_gb", "kernel", "filesystem"):
            if getattr(one, what) != getattr(two, what):
                yield f"Not the same machine: {what} was {getattr(one, what)}, is {getattr(two, what)}."
