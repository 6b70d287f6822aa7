"""Gates: the grammar they are written in, and the verdict on a measurement.

    telemetry.completeness >= 99.99%
    telemetry.delay.p99 <= 1.2 x old              a ratio to the old side, measured in the same window
    commands.latency.p95 <= 1.2 x old or 250ms    whichever of the two asks less
    commands.success >= old - 0.5%                no worse than the old side by more than half a point
    {sql: "SELECT …", must: "<= 5"}
    {prometheus: "http://127.0.0.1:9090", query: "…", must: ">= 0.99"}

A sample's `value` is in the metric's unit: percent (0 to 100), seconds, or a count. `n` is the size of
what it was computed from, `old` and `old_n` the same for the old side. `evidence["summary"]` is the phrase
that follows the figures in a verdict's reason ("412 of 15,310 missing, 6 devices").

Some figures are counted: every message and every device is accounted for, and the figure is what it is.
Others are samples of what could as well have come out otherwise; with a `confidence` they are judged by
bounds on what they stand for (`core/sampled.py`), which hold however often a gate is looked at.
"""

import difflib
import math
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Final

import msgspec
from msgspec.structs import replace

from fleetlift.core.errors import BadInput
from fleetlift.core.metrics import METRICS, Better, Metric
from fleetlift.core.migration import GateResult, Sample, Verdict
from fleetlift.core.sampled import Figure, Limit, assess, compared, measured, still_needed
from fleetlift.core.units import Quantity, format_count, format_duration, format_quantity, parse_quantity


class Source(StrEnum):
    METRIC = "metric"
    SQL = "sql"
    PROMETHEUS = "prometheus"


class Op(StrEnum):
    LE = "<="
    GE = ">="
    LT = "<"
    GT = ">"
    EQ = "=="


class Gate(msgspec.Struct, frozen=True, kw_only=True):
    """One condition. `limit` is absolute, `ratio` times the old side's figure; with both the laxer holds.

    `margin` is how much worse than that the value may be. `text` names the gate everywhere: on screen, in the
    audit log, as the key of its sample. `confidence` None: figures are compared as they are.
    """

    text: str
    op: Op
    metric: str = ""  # of METRICS; "" for a free query
    source: Source = Source.METRIC
    limit: float | None = None
    ratio: float | None = None
    margin: float = 0.0
    unit: str = ""
    at_least: int = 0
    query: str = ""
    url: str = ""  # of the Prometheus server
    confidence: float | None = None

    @property
    def zero_tolerance(self) -> bool:
        """True for a count of harm that must be nought: it is watched at every moment, whatever n is."""
        metric = METRICS.get(self.metric)
        return (
            metric is not None
            and metric.unit == ""
            and self.limit == 0
            and self.ratio is None
            and self.op in (Op.EQ, Op.LE)
        )

    @property
    def sampled(self) -> bool:
        metric = METRICS.get(self.metric)
        return metric is not None and metric.sampled

    @property
    def bounded(self) -> bool:
        """True when a verdict takes bounds, and not the figure alone."""
        return self.sampled and self.confidence is not None and not self.zero_tolerance


EXPECTED: Final = (
    "a gate such as 'telemetry.completeness >= 99.99%', 'commands.latency.p95 <= 1.2 x old or 250ms' "
    "or 'commands.executed_twice == 0'"
)
_GATE = re.compile(r"\s*([A-Za-z][\w.\-]*)\s*(<=|>=|==|<|>|=|!=)\s*(.+?)\s*", re.ASCII | re.DOTALL)
_MUST = re.compile(r"\s*(<=|>=|==|<|>|=|!=)\s*(.+?)\s*", re.ASCII | re.DOTALL)
_RATIO = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,6})?)\s*(?:x|×|\*)\s*(?:old|control)", re.ASCII)
_BESIDE = re.compile(r"(?:old|control)(?:\s*([+-])\s*(.+))?", re.ASCII | re.DOTALL)
_UNITS: Final = {
    "%": "a percentage such as 99.9%",
    "s": "a duration such as 250ms",
    "/s": "a rate such as 9900/s",
    "": "a plain number",
}


def parse_gate(text: str, *, at_least: int | None = None) -> Gate:
    """The gate that `metric op limit` names. Raises BadInput with what was expected."""
    if len(text) > 500 or not (match := _GATE.fullmatch(text)):
        raise BadInput(f"{text[:120]!r} is not {EXPECTED}")
    name, op_text, limit_text = match.groups()
    if (metric := METRICS.get(name)) is None:
        raise BadInput(f"{name!r} is not a metric{did_you_mean(name, METRICS)}; known: {', '.join(METRICS)}")
    op = _op(op_text)
    limits = _limits(limit_text, metric)
    if limits.ratio is not None and op is Op.EQ:
        raise BadInput(f"{text.strip()!r}: a limit beside the old side needs <= or >=")
    harm = {Better.LOWER: (Op.LE, Op.LT, Op.EQ), Better.HIGHER: (Op.GE, Op.GT, Op.EQ)}[metric.better]
    if op not in harm:
        raise BadInput(
            f"{text.strip()!r} asks for the worse: "
            f"{name} is better {metric.better}; use {harm[0]} or {harm[1]}"
        )
    if metric.unit == "%" and limits.limit is not None and limits.limit > 100:
        raise BadInput(f"{text.strip()!r} can never hold: more than 100 %")
    return Gate(
        text=f"{name} {op} {_limit_text(limits, metric)}",
        op=op,
        metric=name,
        limit=limits.limit,
        ratio=limits.ratio,
        margin=limits.margin,
        unit=metric.unit,
        at_least=metric.at_least if at_least is None else at_least,
    )


def parse_query_gate(
    source: Source, query: str, must: str, *, url: str = "", name: str = "", at_least: int = 0
) -> Gate:
    """A gate on what a query returns: one number, compared by `must` (`<= 5`). Raises BadInput."""
    query = query.strip()
    if not query:
        raise BadInput(f"the {source} query is empty")
    if not (match := _MUST.fullmatch(must)):
        raise BadInput(f"{must!r} is not a comparison such as '<= 5', '== 0' or '>= 99%'")
    op, quantity = _op(match[1]), parse_quantity(match[2])
    label = name.strip() or f"{source}: {' '.join(query.split())}"
    return Gate(
        text=f"{label} {op} {_plain(quantity.value, quantity.unit)}",
        op=op,
        source=source,
        limit=quantity.value,
        unit=quantity.unit,
        at_least=at_least,
        query=query,
        url=url,
    )


def did_you_mean(word: str, known: Mapping[str, object] | tuple[str, ...] | list[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {str(close[0])!r}?)" if close else ""


def _op(text: str) -> Op:
    if text == "=":
        return Op.EQ
    if text == "!=":
        raise BadInput("'!=' is not a gate's comparison: use <=, >=, <, > or ==")
    return Op(text)


class _Limits(msgspec.Struct):
    limit: float | None = None
    ratio: float | None = None
    margin: float = 0.0


def _limits(text: str, metric: Metric) -> _Limits:
    found = _Limits()
    for part in re.split(r"\s+or\s+", text):
        times, beside = _RATIO.fullmatch(part), _BESIDE.fullmatch(part)
        if times or beside:
            if not metric.has_old:
                raise BadInput(
                    f"{metric.name} has no counterpart on the old side: give {_UNITS[metric.unit]}"
                )
            if found.ratio is not None:
                raise BadInput(f"{text!r}: one limit beside the old side is enough")
            found.ratio = float(times[1]) if times else 1.0
            if beside and beside[1]:
                found.margin = _margin(part, beside[1], beside[2], metric)
            continue
        quantity: Quantity = parse_quantity(part)
        if found.limit is not None:
            raise BadInput(f"{text!r}: one limit is enough")
        if quantity.unit != metric.unit:
            raise BadInput(f"{metric.name} is compared with {_UNITS[metric.unit]}, not with {part!r}")
        found.limit = quantity.value
    return found


def _margin(part: str, sign: str, text: str, metric: Metric) -> float:
    """How much worse than the old side is allowed: `old - 0.5%`, in percentage points, or `old + 100ms`."""
    quantity = parse_quantity(text)
    if quantity.unit != metric.unit:
        raise BadInput(f"{part!r}: the margin of {metric.name} is {_UNITS[metric.unit]}")
    worse = "-" if metric.better is Better.HIGHER else "+"
    if sign != worse:
        raise BadInput(
            f"{part!r} asks for better than the old side: {metric.name} is better {metric.better}; "
            f"write 'old {worse} {text.strip()}' for what is still good enough"
        )
    return quantity.value


def _limit_text(limits: _Limits, metric: Metric) -> str:
    parts = (
        []
        if limits.ratio is None
        else [_beside_text(limits.ratio, limits.margin, metric.better, metric.unit)]
    )
    if limits.limit is not None:
        parts.append(_plain(limits.limit, metric.unit))
    return " or ".join(parts)


def _beside_text(ratio: float, margin: float, better: Better, unit: str) -> str:
    if margin:
        return f"old {'-' if better is Better.HIGHER else '+'} {_plain(margin, unit)}"
    return f"{ratio:g} x old"


def _plain(value: float, unit: str) -> str:
    number = f"{value:.9f}".rstrip("0").rstrip(".")
    if unit == "s" and value < 1:
        return f"{value * 1000:.6f}".rstrip("0").rstrip(".") + "ms"
    return number + unit


def judge(gate: Gate, sample: Sample | None) -> GateResult:
    """The verdict on one measurement: advance, hold or revert, with one line of figures.

    Missing data never advances: no sample, no value, a value that is not a number, an n below the gate's
    minimum, no figure of the old side where the limit needs one. Such a result has `missing` set. A count
    of harm with no tolerance reverts as soon as it is above nought, however small n is.

    The result carries the sample it was computed from, in a form that JSON keeps: judging that again, also
    after it was stored, gives the same result.
    """
    sample = _storable(sample)
    if sample.value is None:
        return _missing(gate, sample, "no data")
    value = sample.value
    if gate.zero_tolerance and value > 0:
        return _result(gate, sample, Verdict.REVERT, 0.0)
    if sample.n < gate.at_least:
        return _missing(gate, sample, _too_few(gate, sample.n))
    limit, comparable = _resolved(gate, sample)
    if limit is None or not (comparable or _holds(gate.op, value, limit)):
        return _missing(gate, sample, f"the old side has too little to compare with (n = {sample.old_n})")
    if gate.bounded:
        return _judge_bounds(gate, sample, limit, comparable)
    verdict = Verdict.ADVANCE if _holds(gate.op, value, limit) else Verdict.REVERT
    return _result(gate, sample, verdict, limit)


def _resolved(gate: Gate, sample: Sample) -> tuple[float | None, bool]:
    """The limit in the value's unit, and whether that is all that would be allowed."""
    if gate.ratio is None:
        return gate.limit, True
    old = sample.old
    if old is None or not math.isfinite(gate.ratio * old) or sample.old_n < max(gate.at_least, 1):
        return gate.limit, False
    worse = -gate.margin if gate.op in (Op.GE, Op.GT) else gate.margin
    return _laxer(gate.op, gate.ratio * old + worse, gate.limit), True


def _judge_bounds(gate: Gate, sample: Sample, limit: float, comparable: bool) -> GateResult:
    """Advance or revert when the bounds are sure of it; else hold, and say what is still needed."""
    assert gate.confidence is not None and sample.value is not None
    metric, asked = METRICS[gate.metric], limit_of(gate, comparable=comparable)
    if not measured(asked, sample) or (asked.ratio is not None and not compared(asked, sample)):
        return _missing(gate, sample, "the measurement has no sums that a bound can be computed from")
    found = assess(asked, sample, gate.confidence)
    sure = f"{100 * gate.confidence:g} % sure"
    low, high = format_quantity(max(found.low, 0.0), gate.unit), format_quantity(found.high, gate.unit)
    best, worst = (found.high, found.low) if asked.higher else (found.low, found.high)
    if found.within:
        return _result(
            gate,
            sample,
            Verdict.ADVANCE,
            limit,
            worst,
            f"{f'at least {low}' if asked.higher else f'at most {high}'}, {sure}",
        )
    if found.beyond and comparable:
        return _result(
            gate,
            sample,
            Verdict.REVERT,
            limit,
            best,
            f"{f'at most {high}' if asked.higher else f'at least {low}'}, {sure}",
        )
    between = f"{low} to {high}" if math.isfinite(found.high) else f"{low} or more"
    needed = _needed(metric, sample, still_needed(asked, sample, gate.confidence))
    return _result(gate, sample, Verdict.HOLD, limit, worst, f"{between}, {sure}", needed)


def _storable(sample: Sample | None) -> Sample:
    """`sample` without figures that are no numbers: JSON has none, and none may count as a measurement."""
    if sample is None:
        return Sample(value=None)
    if sample.old is not None and not math.isfinite(sample.old):
        sample = replace(sample, old=None)  # a limit without end would let everything pass
    if sample.value is not None and not math.isfinite(sample.value):
        summary = str(sample.evidence.get("summary", ""))
        why = "the measurement is not a number" + (f"; {summary}" if summary else "")
        sample = replace(sample, value=None, evidence={**sample.evidence, "summary": why})
    return sample


def _too_few(gate: Gate, n: int) -> str:
    metric = METRICS.get(gate.metric)
    return f"{format_count(n)} {metric.counts if metric else 'rows'} are too few (at least {gate.at_least})"


def _laxer(op: Op, relative: float, absolute: float | None) -> float:
    if absolute is None:
        return relative
    return max(relative, absolute) if op in (Op.LE, Op.LT) else min(relative, absolute)


def _holds(op: Op, value: float, limit: float) -> bool:
    same = math.isclose(value, limit, rel_tol=1e-9, abs_tol=1e-12)
    match op:
        case Op.LE:
            return value < limit or same
        case Op.GE:
            return value > limit or same
        case Op.LT:
            return value < limit and not same
        case Op.GT:
            return value > limit and not same
        case Op.EQ:
            return same


_FAILS: Final = {Op.LE: ">", Op.GE: "<", Op.LT: ">=", Op.GT: "<=", Op.EQ: "!="}


def limit_of(gate: Gate, *, comparable: bool = True) -> Limit:
    """What bounds are asked of a metric's gate; without `comparable` only its absolute limit counts."""
    metric = METRICS[gate.metric]
    return Limit(
        figure=metric.figure,
        higher=metric.better is Better.HIGHER,
        absolute=gate.limit,
        ratio=gate.ratio if comparable else None,
        margin=gate.margin,
        quantile=_quantile(gate.metric),
    )


def _quantile(metric: str) -> float:
    """0.95 of `commands.latency.p95`; 0 of a metric that is no quantile."""
    _, _, last = metric.rpartition(".p")
    return int(last) / 100 if last.isdigit() else 0.0


def _needed(metric: Metric, sample: Sample, times: float | None) -> str:
    """What is still to come before this can be decided, should things go on as they do."""
    if times is None:
        return "too near to the limit, or too few devices, to be told apart soon"
    more = (
        []
        if metric.figure is Figure.RATE
        else [f"{format_count(_round(sample.n * (times - 1)))} more {metric.counts}"]
    )
    if sample.over_s > 0:
        more.append(format_duration(_round(sample.over_s * (times - 1))))
    return f"needs about {', '.join(more)}" if more else f"needs about {times:.1f} times as much"


def _round(value: float) -> int:
    """Upwards, to two figures: what is still needed is a guess."""
    size: int = 10 ** max(0, math.floor(math.log10(max(value, 1))) - 1)
    return math.ceil(value / size) * size


def _result(
    gate: Gate, sample: Sample, verdict: Verdict, limit: float, bound: float | None = None, *more: str
) -> GateResult:
    assert sample.value is not None
    name = gate.metric or gate.text.rsplit(f" {gate.op} ", 1)[0]
    value, asked = _exact(sample.value, limit, gate.unit), format_quantity(limit, gate.unit)
    if verdict is Verdict.HOLD:
        figures = f"{name} {value}, not decided yet whether {gate.op} {asked}"
    else:
        figures = f"{name} {value} {gate.op if verdict is Verdict.ADVANCE else _FAILS[gate.op]} {asked}"
    notes = list(more)
    if gate.ratio is not None and sample.old is not None:
        better = METRICS[gate.metric].better
        beside = _beside_text(gate.ratio, gate.margin, better, gate.unit)
        notes.append(f"{beside} {format_quantity(sample.old, gate.unit)}")
    if summary := str(sample.evidence.get("summary", "")):
        notes.append(summary)
    elif sample.n:
        notes.append(f"n = {format_count(sample.n)}")
    return GateResult(
        gate=gate.text,
        verdict=verdict,
        why=figures + (f" ({'; '.join(notes)})" if notes else ""),
        value=sample.value,
        limit=limit,
        unit=gate.unit,
        n=sample.n,
        old=sample.old,
        evidence=dict(sample.evidence),
        sample=sample,
        undecided=verdict is Verdict.HOLD,
        bound=bound if bound is not None and math.isfinite(bound) else None,
    )


def _exact(value: float, limit: float, unit: str) -> str:
    """`value` for a reason line, never rounded until it looks like the limit it has missed."""
    text = format_quantity(value, unit)
    if value != limit and text == format_quantity(limit, unit):
        return f"{value:.9g}{' ' + unit if unit else ''}"
    return text


def _missing(gate: Gate, sample: Sample, what: str) -> GateResult:
    summary = str(sample.evidence.get("summary", ""))
    return GateResult(
        gate=gate.text,
        verdict=Verdict.HOLD,
        why=f"{gate.metric or gate.text}: {what}" + (f" ({summary})" if summary else ""),
        value=sample.value,
        limit=gate.limit,
        unit=gate.unit,
        n=sample.n,
        old=sample.old,
        evidence=dict(sample.evidence),
        missing=True,
        sample=sample,
    )
