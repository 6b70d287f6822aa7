"""`fleetlift tenant explain`: which rows of a database are one tenant's, before any of them moves."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fleetlift.cli.client import Json
from fleetlift.core.errors import BadInput, Unavailable

if TYPE_CHECKING:
    from rich.text import Text

    from fleetlift.core.tenant.closure import Closure
    from fleetlift.core.tenant.explanation import Explanation, Why
    from fleetlift.core.tenant.schema import Table

app = typer.Typer(help="Tenants' data.", no_args_is_help=True)


@app.command()
def explain(
    plan: Annotated[
        Path | None, typer.Option("--plan", help="A tenant's plan; its 'copy' step says which rows.")
    ] = None,
    from_env: Annotated[
        str, typer.Option("--from-env", help="Without a plan: environment variable with the source's URL.")
    ] = "",
    root: Annotated[
        str, typer.Option("--root", help="Without a plan: the tenant's row, such as customers.id=42.")
    ] = "",
    tables: Annotated[
        Path | None,
        typer.Option("--tables", help="Without a plan: YAML file with what a plan has under 'tables:'."),
    ] = None,
    why: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--why", metavar="TABLE KEY", help="Of one row: what brings it along, or why it does not come."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show which rows a tenant's move would take along, by which references, and what would leak.

    Reads the source in one snapshot and writes nothing. Exit status 1 when a row of another tenant would come
    along, or something cannot be moved as it is.
    """
    import asyncio

    from fleetlift.cli.screen import emit_json, out

    url, root_text, said = _asked(plan, from_env, root, tables)
    closure, answer = asyncio.run(_answer(url, root_text, said, why))
    from fleetlift.core.tenant.explanation import Explanation

    if isinstance(answer, Explanation):
        if as_json:
            emit_json(_as_json(answer))
        else:
            for line in explanation_lines(answer):
                out().print(line, soft_wrap=True)
        if not answer.ok:
            raise typer.Exit(1)
    elif as_json:
        emit_json(_as_json(answer))
    else:
        for line in why_lines(answer, closure):
            out().print(line, soft_wrap=True)


def _asked(
    plan: Path | None, from_env: str, root: str, tables: Path | None
) -> tuple[str, str, Mapping[str, Any]]:
    """The source's URL, the root and what is said of tables."""
    if plan is not None:
        if from_env or root or tables:
            raise BadInput("--plan says it all: leave out --from-env, --root and --tables")
        from fleetlift.core.tenant.plan import TenantPlan
        from fleetlift.migrate.tenant_check import url_of
        from fleetlift.migrate.tenant_planfile import load_any_plan

        read = load_any_plan(plan)
        if not isinstance(read, TenantPlan):
            raise BadInput(f"{plan}: this is a fleet's plan; only a tenant's ('tenant:') has rows to explain")
        return url_of(read.source), read.copy.root, read.copy.tables
    if not from_env or not root:
        raise BadInput("give --plan PLAN, or --from-env NAME and --root TABLE.COLUMN=VALUE")
    url = os.environ.get(from_env)
    if not url:
        raise BadInput(f"the environment variable {from_env} is not set: it has the source's URL")
    return url, root, read_tables(tables) if tables else {}


def read_tables(path: Path) -> Mapping[str, Any]:
    """What a plan has under `tables:`, from a file of its own. Raises BadInput with file and line."""
    from fleetlift.core.tenant.rules import BadRules, check_syntax
    from fleetlift.yamlfile import BadFile, NodeReader, Problem, compose, read_text

    node = compose(read_text(path, "file"), str(path), what="file", shown_in="docs/tenant-rows.md")

    class Reader(NodeReader):
        def plain(self, node: Any, key: str) -> Any:
            kind = type(node).__name__
            if kind == "MappingNode":
                parts = self._mapping(node, key, "a mapping") or {}
                return {name: self.plain(value, f"{key}.{name}") for name, value in parts.items()}
            if kind == "SequenceNode":
                return [self.plain(item, key) for item in node.value]
            return self._text(node, key, "a text, a list or a mapping")

    reader = Reader()
    parts = reader._mapping(node, "", "tables with what to know of them, such as {currency: all}") or {}
    said = {name: reader.plain(value, name) for name, value in parts.items()}
    if not reader.problems:
        try:
            check_syntax(said)
        except BadRules as bad:
            for key, text in bad.problems:
                mark = parts[key.partition(".")[0] if key not in parts else key].start_mark
                reader.problems.append(
                    Problem(line=mark.line + 1, column=mark.column + 1, key=key, text=text)
                )
    if reader.problems:
        raise BadFile(str(path), reader.problems)
    return said


async def _answer(
    url: str, root: str, tables: Mapping[str, Any], asked: tuple[str, str] | None
) -> "tuple[Closure, Explanation | Why]":
    import asyncpg

    from fleetlift.core.tenant.derive import closure_of
    from fleetlift.core.tenant.rules import parse_rules, table_called
    from fleetlift.tenant.explain import explain as explain_all
    from fleetlift.tenant.introspect import read_schema
    from fleetlift.tenant.why import why as explain_one

    try:
        conn = await asyncpg.connect(
            url, timeout=10.0, server_settings={"application_name": "fleetlift explain"}
        )
    except (OSError, TimeoutError, ValueError, asyncpg.PostgresError, asyncpg.InterfaceError) as error:
        raise Unavailable(f"the source cannot be reached: {error}") from error
    try:
        schema = await read_schema(conn)
        closure = closure_of(schema, parse_rules(root, tables, schema))
        if asked is None:
            return closure, await explain_all(conn, closure)
        table = table_called(schema, asked[0])
        return closure, await explain_one(conn, closure, table.name, key_of(table, asked[1]))
    except asyncpg.PostgresError as error:
        raise BadInput(f"the source answers: {error}") from error
    finally:
        await conn.close()


def key_of(table: "Table", text: str) -> Mapping[str, str]:
    """`17`, `17,2` in the key's order, or `device_id=17,number=2` (any columns)."""
    names = [column.name for column in table.columns]
    first, sign, _ = text.partition("=")
    if sign and first.strip() in names:
        pairs: dict[str, str] = {}
        last = ""
        for part in text.split(","):
            name, sign, value = part.partition("=")
            if sign and name.strip() in names:
                last = name.strip()
                pairs[last] = value
            else:
                pairs[last] += f",{part}"  # a comma within a value
        return pairs
    if not table.key:
        raise BadInput(f"{table.name} has no key: name the row as COLUMN=VALUE,COLUMN=VALUE")
    values = text.split(",", len(table.key) - 1)
    if len(values) != len(table.key):
        raise BadInput(
            f"{table.name} has the key ({', '.join(table.key)}): expected as many values, with ','"
        )
    return dict(zip(table.key, values, strict=True))


def _as_json(value: "Explanation | Why") -> Any:
    import msgspec

    from fleetlift.core.tenant.explanation import Explanation

    built = msgspec.to_builtins(value)
    if isinstance(value, Explanation):
        return {"ok": value.ok, "rows": value.rows, "bytes": value.bytes, **built}
    return {"comes": bool(value.chain), **built}


# -- on screen ----------------------------------------------------------------------------------------------

MARKS: Mapping[str, tuple[str, str]] = {
    "leak": ("✗", "red"),
    "refused": ("✗", "red"),
    "missing": ("!", "yellow"),
    "note": ("·", "grey58"),
}
HEADINGS: Mapping[str, str] = {
    "leak": "Leaks: rows of others that would come along, or that coming rows point at",
    "refused": "Cannot be moved as it is",
    "missing": "Stays, though it looks like the tenant's",
    "note": "To know",
}
FAINT = "grey58"


def explanation_lines(found: "Explanation") -> "Iterator[Text]":
    """The whole explanation as lines of text."""
    from rich.text import Text

    from fleetlift.core.tenant.derive import short

    head = Text(found.root, style="bold")
    head.append(
        f"  {found.rows:,} rows, about {size(found.bytes)}, in {len(found.tables)} tables", style=FAINT
    )
    yield head
    yield Text()
    width = max(len(short(one.table)) for one in found.tables)
    rows_width = max(len(f"{one.rows:,}") for one in found.tables)
    for one in found.tables:
        line = Text(f"{short(one.table):<{width}}  {one.part:<6}  {one.rows:>{rows_width},}")
        line.append(f" of {'' if one.total_exact else '~'}{one.total:,}", style=FAINT)
        line.append(f"  {size(one.bytes)}", style=FAINT)
        if one.owned and one.shared:
            line.append(f"  {one.owned:,} owned, {one.shared:,} shared", style="yellow")
        yield line
        for path in one.paths:
            yield Text(f"{'':<{width}}    {path}", style=FAINT)
    if found.tables_not_coming:
        names = ", ".join(short(name) for name in found.tables_not_coming)
        yield Text()
        yield Text(f"No rows of: {names}", style=FAINT)
    yield Text()
    yield Text("References", style="bold")
    for edge in found.edges:
        policy = f"{edge.policy}, else {edge.otherwise}" if edge.otherwise else f"{edge.policy}"
        line = Text(f"{policy:<17} {edge.text}")
        line.append("" if edge.chosen else "  (default)", style=FAINT)
        line.append("" if edge.declared else "  (not declared in the database)", style=FAINT)
        yield line
    last = ""
    for finding in found.findings:
        mark, style = MARKS[finding.severity]
        if finding.severity != last:
            last = finding.severity
            yield Text()
            yield Text(HEADINGS[last], style="bold")
        yield Text(f"{mark} ", style=style).append(finding.text, style=style if mark == "✗" else "")
        if finding.samples:
            more = " …" if finding.count > len(finding.samples) else ""
            yield Text(f"    {listed(finding.samples)}{more}", style=FAINT)
        if finding.advice:
            yield Text(f"  → {finding.advice}")
    yield Text()
    if found.ok:
        yield Text("✓ Nothing of another tenant comes along.", style="green")
    else:
        yield Text("✗ It cannot move like this.", style="red")


def listed(samples: Sequence[str]) -> str:
    return " | ".join(samples)


def why_lines(found: "Why", closure: "Closure") -> "Iterator[Text]":
    """The chain of one row, or the reasons."""
    from rich.text import Text

    from fleetlift.core.tenant.derive import short

    name = f"{short(found.table)} {found.key}"
    if not found.chain:
        yield Text("- ", style=FAINT).append(f"{name} does not come:")
        for reason in found.reasons:
            yield Text(f"    {reason}")
        return
    what = {"owned": "the tenant owns it", "shared": "shared, a coming row refers to it"}.get(
        found.part, "all of its table comes"
    )
    yield Text("✓ ", style="green").append(f"{name} comes: {what}")
    for link in found.chain[1:]:
        line = Text(f"    {short(link.table)} {link.key}")
        yield line.append(f"  by {link.by}", style=FAINT)


def size(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
