"""Rows come and go with what they hang on: whatever writers do, the target has the tenant's rows and no
other.

What must be there is asked of the source by the closure's own predicate, once all is quiet.
"""

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
import pytest_asyncio
from follow_world import World, rules, world

from fleetlift.core.tenant.closure import Policy, Reference
from fleetlift.store.embedded import EmbeddedPostgres
from tenant_world import Pair, fresh_pair

pytestmark = pytest.mark.asyncio(loop_scope="module")


SERVER_SETTINGS = {"fsync": "off"}


@pytest_asyncio.fixture(loop_scope="module")
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as fresh:
        yield fresh


TANGLE_DDL = """
CREATE TABLE owner (id int PRIMARY KEY, boss int REFERENCES owner DEFERRABLE INITIALLY DEFERRED, name text);
CREATE TABLE label (code text PRIMARY KEY, up text REFERENCES label DEFERRABLE INITIALLY DEFERRED, name text);
CREATE TABLE node (id int PRIMARY KEY, owner_id int REFERENCES owner DEFERRABLE INITIALLY DEFERRED,
  parent_id int REFERENCES node ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED,
  label text REFERENCES label DEFERRABLE INITIALLY DEFERRED, name text);
CREATE TABLE leaf (id int PRIMARY KEY,
  node_id int REFERENCES node ON UPDATE CASCADE ON DELETE CASCADE DEFERRABLE INITIALLY DEFERRED,
  other_id int REFERENCES node ON UPDATE CASCADE ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
  label text REFERENCES label DEFERRABLE INITIALLY DEFERRED, name text);
CREATE TABLE note (kind text, ref text, n int, body text, PRIMARY KEY (kind, ref, n));
CREATE TABLE loose (node_id int REFERENCES node ON UPDATE CASCADE ON DELETE CASCADE
  DEFERRABLE INITIALLY DEFERRED, body text);
"""
TANGLE_ROWS = """
INSERT INTO owner VALUES (1, NULL, 'one'), (2, NULL, 'two'), (3, 1, 'three'), (4, 3, 'four');
INSERT INTO label SELECT chr(97 + n), NULL, 'label ' || n FROM generate_series(0, 7) n;
UPDATE label SET up = chr(97 + (ascii(code) - 96) % 8) WHERE code < 'f';
INSERT INTO node SELECT n, CASE WHEN n % 3 < 2 THEN 1 + n % 4 END, CASE WHEN n > 4 THEN 1 + n % 4 END,
  chr(97 + n % 8), 'node ' || n FROM generate_series(1, 16) n;
INSERT INTO leaf SELECT n, 1 + n % 16, 1 + (n * 7) % 16, chr(97 + n % 8), 'leaf ' || n
  FROM generate_series(1, 24) n;
INSERT INTO note SELECT CASE WHEN n % 2 = 0 THEN 'node' ELSE 'leaf' END, (1 + n % 20)::text, n, 'note ' || n
  FROM generate_series(1, 40) n;
INSERT INTO loose SELECT 1 + n % 16, 'loose ' || n % 5 FROM generate_series(1, 30) n;
"""


def _note(to: str) -> Reference:
    return Reference(
        table="public.note", columns=("ref",), to=f"public.{to}", to_columns=("id",), when=(("kind", to),)
    )


TANGLED = rules(
    "public.owner.id",
    "1",
    _note("node"),
    _note("leaf"),
    policies={
        ("public.owner", ("boss",)): Policy.COPY,
        ("public.leaf", ("other_id",)): Policy.COPY,
        ("public.node", ("parent_id",)): Policy.OWN,
    },
    full_identity=("public.loose",),
)
"""A ring of nodes, owners and nodes that are shared beside owned ones, notes by text, rows without a key."""


def _tangle_statement(rng: random.Random) -> str:
    def node() -> str:
        return str(rng.randint(1, 20))

    def maybe(value: str) -> str:
        return value if rng.random() < 0.8 else "NULL"

    def label() -> str:
        return f"'{chr(97 + rng.randint(0, 9))}'"

    name = f"'{rng.getrandbits(20):x}'"
    owner = str(rng.randint(1, 4))
    leaf = str(rng.randint(1, 30))
    return rng.choice(
        [
            f"INSERT INTO node VALUES ({node()}, {maybe(owner)}, {maybe(node())}, {maybe(label())}, {name}) "
            "ON CONFLICT DO NOTHING",
            f"INSERT INTO leaf VALUES ({leaf}, {node()}, {maybe(node())}, {maybe(label())}, {name}) "
            "ON CONFLICT DO NOTHING",
            f"UPDATE node SET owner_id = {maybe(owner)}, name = {name} WHERE id = {node()}",
            f"UPDATE node SET parent_id = {maybe(node())} WHERE id = {node()}",
            f"UPDATE node SET owner_id = NULL, parent_id = {node()} WHERE id = {node()}",
            f"UPDATE node SET id = {node()} WHERE id = {node()}",
            f"UPDATE node SET name = {name}, label = {maybe(label())} WHERE id % 3 = {rng.randint(0, 2)}",
            f"UPDATE leaf SET node_id = {node()} WHERE id = {leaf}",
            f"UPDATE leaf SET id = {leaf} WHERE id = {rng.randint(1, 30)}",
            f"UPDATE leaf SET other_id = {maybe(node())}, label = {maybe(label())} WHERE id = {leaf}",
            f"UPDATE leaf SET name = {name} WHERE id % 4 = {rng.randint(0, 3)}",
            f"DELETE FROM leaf WHERE id = {leaf}",
            f"DELETE FROM node WHERE id = {node()}",
            f"UPDATE node SET parent_id = NULL WHERE parent_id = {node()}",
            f"INSERT INTO label VALUES ({label()}, {maybe(label())}, {name}) ON CONFLICT (code) DO UPDATE "
            "SET name = EXCLUDED.name, up = EXCLUDED.up",
            f"UPDATE label SET up = {maybe(label())} WHERE code = {label()}",
            f"DELETE FROM label WHERE code = {label()}",
            f"UPDATE owner SET boss = {maybe(owner)}, name = {name} WHERE id = {rng.randint(1, 4)}",
            f"INSERT INTO note VALUES ('{rng.choice(('node', 'leaf', 'else'))}', '{rng.randint(1, 30)}', "
            f"{rng.randint(1, 50)}, {name}) ON CONFLICT DO NOTHING",
            f"UPDATE note SET ref = '{rng.randint(1, 30)}' WHERE n = {rng.randint(1, 50)}",
            f"UPDATE note SET body = {name} WHERE n % 5 = {rng.randint(0, 4)}",
            f"DELETE FROM note WHERE n = {rng.randint(1, 50)}",
            f"INSERT INTO loose VALUES ({node()}, 'loose {rng.randint(0, 4)}')",
            f"UPDATE loose SET body = 'loose {rng.randint(0, 4)}' WHERE node_id = {node()}",
            f"UPDATE loose SET node_id = {node()} WHERE node_id = {node()}",
            f"DELETE FROM loose WHERE ctid IN (SELECT ctid FROM loose WHERE node_id = {node()} LIMIT 1)",
        ]
    )


async def _write_tangle(w: World, rng: random.Random, transactions: int) -> None:
    """Transactions of several statements, some rolled back in part or whole, refused ones forgotten."""
    conn = await asyncpg.connect(w.pair.source)
    try:
        for _ in range(transactions):
            try:
                async with conn.transaction():
                    for _ in range(rng.choice((1, 1, 2, 5))):
                        try:
                            async with conn.transaction():
                                await conn.execute(_tangle_statement(rng))
                                if rng.random() < 0.1:
                                    raise asyncpg.DivisionByZeroError
                        except asyncpg.PostgresError:
                            pass
                    if rng.random() < 0.1:
                        raise asyncpg.DivisionByZeroError
            except asyncpg.PostgresError:
                pass
    finally:
        await conn.close()


@pytest.mark.parametrize("seed", range(4))
async def test_a_tangle_of_rows_comes_out_right(pair: Pair, tmp_path: Path, seed: int) -> None:
    """Rings, rows that are shared now and owned then, notes before what they are about, keys that change."""
    rng = random.Random(seed)
    async with world(pair, tmp_path, TANGLED, ddl=TANGLE_DDL, rows=TANGLE_ROWS) as w:
        snapshot = await w.prepare()
        w.run()
        await _write_tangle(w, rng, 60)
        await w.copy(snapshot)
        await _write_tangle(w, rng, 40)
        w.follower.start_applying()
        for _ in range(4):
            await asyncio.gather(*(_write_tangle(w, random.Random(rng.random()), 40) for _ in range(3)))
            await w.same()
