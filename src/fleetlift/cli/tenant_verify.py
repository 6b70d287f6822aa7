"""What a verification of a tenant's rows looks like on a terminal."""

import msgspec

from fleetlift.cli.screen import emit_json, out, span
from fleetlift.core.tenant.verify_report import Kind, VerifyProgress, VerifyReport

WORDS = {
    Kind.MISSING: "missing on the target",
    Kind.FOREIGN: "on the target, but not the tenant's",
    Kind.DIFFERING: "differing",
    Kind.DOUBLED: "more often on the target than on the source",
    Kind.FORBIDDEN: "pointing, by a reference that stops the move, at rows that do not come",
    Kind.SURPLUS: "shared rows that nobody needs any more (blocks nothing)",
    Kind.UNSETTLED: "changed each time they were looked at (checked again in the freeze)",
}


def progress_line(at: VerifyProgress) -> str:
    """`1,200,000 of 2,000,000 rows compared, 800,000/s, 1 s left, 3 findings (public.device)`."""
    text = f"{at.rows:,} of {at.rows_total:,} rows compared, {at.rate_rows_s:,.0f}/s"
    if at.left_s is not None:
        text += f", {span(at.left_s)} left"
    if at.findings:
        text += f", {at.findings:,} findings"
    return f"{text} ({at.table})"


def show(report: VerifyReport, *, as_json: bool = False) -> bool:
    """Print what was found; True when nothing stands against a cutover."""
    if as_json:
        emit_json(msgspec.to_builtins(report))
        return not report.blocks
    for line in lines(report):
        out().print(line, soft_wrap=True, markup=False, highlight=False)
    return not report.blocks


def lines(report: VerifyReport) -> list[str]:
    shown = [f"{report.rows:,} rows compared in {span(report.took_s)}"]
    for kind, words in WORDS.items():
        if total := report.total(kind):
            shown.append(f"{total:,} rows {words}:")
            some = [one for one in report.findings if one.kind is kind][:20]
            for one in some:
                columns = f": {', '.join(one.columns)}" if one.columns else ""
                shown.append(f"  {one.table} ({', '.join(one.key)}){columns}")
            if total > len(some):
                shown.append(f"  … and {total - len(some):,} more")
    shown += [f"✗ {problem}" for problem in report.problems]
    shown.append("✗ The cutover is blocked." if report.blocks else "✓ Nothing is wrong.")
    return shown
