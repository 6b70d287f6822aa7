"""All of the target anew: which of its rows are owned or shared, and which nothing supports."""

from fleetlift.core.tenant.closure import Part
from fleetlift.core.tenant.schema import TableName, quoted_table
from fleetlift.tenant.apply import Writer, any_plan
from fleetlift.tenant.held import Held
from fleetlift.tenant.membership import matches, root_condition
from fleetlift.tenant.names import MOVE_SCHEMA
from fleetlift.tenant.reference import References, count_of, key_of


class Tidying:
    """Goes over the whole target, not only over what a batch changes."""

    def __init__(self, refs: References, held: Held, writer: Writer) -> None:
        self._refs = refs
        self._closure = refs.closure
        self._writer = writer
        self._conn = writer.conn
        self._held = held

    async def tidy(self) -> int:
        """Go over the whole target: take away owned rows that nothing supports, and shared ones that nothing
        refers to any more; note which rows of mixed tables are shared. Gives how many went."""
        took = 0
        async with any_plan(self._conn):
            await self._mark()
            for table in self._closure.order:
                if self._closure.parts[table] is Part.OWNED and table not in self._refs.mixed:
                    took += await self._remove(table, self._unsupported(table))
            took += await self._tidy_shared()
        return took

    async def mark_shared(self) -> None:
        """Note which rows of tables that also have owned ones are only referred to, after the copy."""
        if self._refs.mixed:
            async with any_plan(self._conn):
                await self._mark()

    def _unsupported(self, table: TableName) -> str:
        """True of rows `t` that no owned row supports, once rows that others hang on are marked."""
        if self._refs.is_inner(table):
            return "NOT EXISTS (SELECT 1 FROM fl_mark k WHERE k.o = t.tableoid AND k.c = t.ctid)"
        ways = [
            f"NOT EXISTS (SELECT 1 FROM {quoted_table(ref.edge.parent)} p JOIN fl_mark k "
            f"ON k.o = p.tableoid AND k.c = p.ctid WHERE {matches(self._closure, ref.edge, 't', 'p')})"
            for ref in self._refs.own[table]
        ]
        return " AND ".join(ways) or "true"

    async def _mark(self) -> None:
        """Find the owned rows that others hang on, from the root down, and say which of the others are
        shared."""
        conn = self._conn
        for name in ("fl_mark", "fl_cand"):
            await conn.execute(
                f"CREATE TEMP TABLE IF NOT EXISTS {name} (tab int, o oid, c tid, round int, "
                f"PRIMARY KEY (o, c)) ON COMMIT DELETE ROWS; TRUNCATE {name}"
            )
        self._held.cand_made = True
        marked = {
            t for t in self._closure.order if self._closure.parts[t] is Part.OWNED and self._refs.is_inner(t)
        }
        root = self._closure.root.table
        await conn.execute(
            f"INSERT INTO fl_mark SELECT {self._refs.number[root]}, c.tableoid, c.ctid, 0 "
            f"FROM {quoted_table(root)} c WHERE {root_condition(self._closure, 'c')}"
        )
        level, newest = 0, {root}
        while newest:
            following: set[TableName] = set()
            for table in sorted(newest, key=self._refs.number.__getitem__):
                for ref in self._refs.down[table]:
                    child = ref.edge.child
                    if child in marked and count_of(
                        await conn.execute(
                            f"INSERT INTO fl_mark SELECT DISTINCT {self._refs.number[child]}, c.tableoid, "
                            f"c.ctid, {level + 1} FROM fl_mark k JOIN {quoted_table(table)} p "
                            "ON p.tableoid = k.o AND p.ctid = k.c "
                            f"JOIN {quoted_table(child)} c ON {matches(self._closure, ref.edge, 'c', 'p')} "
                            f"WHERE k.tab = {self._refs.number[table]} AND k.round = {level} ON CONFLICT DO "
                            "NOTHING"
                        )
                    ):
                        following.add(child)
            level, newest = level + 1, following
        for table in self._refs.mixed:
            w = self._writer.of[table]
            await conn.execute(f"DELETE FROM {MOVE_SCHEMA}.shared_row WHERE table_name = $1", table)
            await conn.execute(
                f"INSERT INTO {MOVE_SCHEMA}.shared_row (table_name, key) "
                f"SELECT $1, {w.key_array} FROM {w.sql_name} t WHERE {self._unsupported(table)}",
                table,
            )
            self._held.forget_table(table)

    async def _tidy_shared(self) -> int:
        """Shared rows are needed when owned or whole rows refer to them, or needed shared ones do."""
        conn = self._conn
        shared = [
            t for t in self._closure.order if self._closure.parts[t] is Part.SHARED or t in self._refs.mixed
        ]
        if not shared:
            return 0
        await conn.execute("TRUNCATE fl_cand")
        names = set(shared)
        changed = True
        while changed:
            changed = False
            for table in shared:
                for ref in self._refs.brought[table]:
                    child = ref.edge.child
                    needed = "true"
                    if child in names:
                        needed = "EXISTS (SELECT 1 FROM fl_cand k WHERE k.o = c.tableoid AND k.c = c.ctid)"
                        if child in self._refs.mixed:
                            needed = f"({needed} OR NOT {self._held.is_shared_sql(child, 'c')})"
                    if count_of(
                        await conn.execute(
                            f"INSERT INTO fl_cand SELECT DISTINCT {self._refs.number[table]}, p.tableoid, "
                            "p.ctid, 0 "
                            f"FROM {quoted_table(child)} c JOIN {quoted_table(table)} p "
                            f"ON {matches(self._closure, ref.edge, 'c', 'p')} WHERE {needed} ON CONFLICT "
                            "DO NOTHING"
                        )
                    ) and table in {r.edge.child for t in shared for r in self._refs.brought[t]}:
                        changed = True
        took = 0
        for table in shared:
            lost = "NOT EXISTS (SELECT 1 FROM fl_cand k WHERE k.o = t.tableoid AND k.c = t.ctid)"
            if table in self._refs.mixed:
                lost += f" AND {self._held.is_shared_sql(table, 't')}"
            took += await self._remove(table, lost)
        return took

    async def _remove(self, table: TableName, condition: str) -> int:
        w = self._writer.of[table]
        key = w.key_array if w.key else "NULL::text[]"
        records = await self._conn.fetch(
            f"DELETE FROM {w.sql_name} t WHERE {condition} RETURNING {key} AS key"
        )
        keys = [key_of(record["key"]) for record in records] if w.key else []
        if records:
            self._held.touched(table, keys)
        if keys and table in self._refs.mixed:
            await self._held.unshare(table, keys)
        if records:
            self._held.forget_table(table)
        return len(records)
