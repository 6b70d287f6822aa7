"""After a release nothing of a move stays, whatever was there."""

from collections.abc import AsyncIterator
from pathlib import Path

import asyncpg
import pytest
from cutover_world import cloud_closure
from typer.testing import CliRunner

from fleetlift.cli.tenant_clean import app
from fleetlift.core.errors import Conflict, NotFound
from fleetlift.core.tenant.fence import Side
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant.emptying import drop_database
from fleetlift.tenant.fence import Fence
from fleetlift.tenant.follow import Direction, Follower
from fleetlift.tenant.leftovers import Kind, clean, leftovers
from fleetlift.testing import scratch_directory
from tenant_world import Pair, fill_cloud, fresh_pair

MOVE = "acme"


@pytest.fixture
async def pair(server: EmbeddedPostgres) -> AsyncIterator[Pair]:
    async with fresh_pair(server) as made:
        await fill_cloud(made.source, tenants=2, devices=2, values=1)
        await fill_cloud(made.target, tenants=2, devices=2, values=1)
        yield made


async def _litter(pair: Pair, move: str) -> None:
    """All that a move makes, on both sides."""
    closure = await cloud_closure(pair.source)
    with scratch_directory() as directory:
        for source, target, direction in (
            (pair.source, pair.target, Direction.FORWARD),
            (pair.target, pair.source, Direction.REVERSE),
        ):
            follower = Follower(
                source, target, closure, move=move, directory=Path(directory), direction=direction
            )
            await follower.prepare()
            await follower.release_snapshot()
    for url, side in ((pair.source, Side.SOURCE), (pair.target, Side.TARGET)):
        fence = Fence(url, closure, move=move, side=side)
        await fence.install()
        await fence.freeze(["public.users"], await fence.clock_ms() + 60_000)
        await fence.aclose()


async def _schema(url: str) -> set[str]:
    """Everything that a move could have changed, by name."""
    conn = await asyncpg.connect(url)
    try:
        return {
            row[0]
            for row in await conn.fetch("""
                SELECT 'relation ' || c.oid::regclass || c.relreplident::text FROM pg_class c
                UNION ALL SELECT 'schema ' || nspname FROM pg_namespace WHERE nspname !~ '^pg_(toast_)?temp'
                UNION ALL SELECT 'trigger ' || tgrelid::regclass || tgname || tgenabled::text FROM pg_trigger
                UNION ALL SELECT 'function ' || oid::regprocedure FROM pg_proc
                UNION ALL SELECT 'type ' || oid::regtype FROM pg_type
                UNION ALL SELECT 'publication ' || pubname FROM pg_publication
                UNION ALL SELECT 'slot ' || slot_name FROM pg_replication_slots
                  WHERE database = current_database()
                UNION ALL SELECT 'origin ' || roname FROM pg_replication_origin
                UNION ALL SELECT 'role ' || rolname FROM pg_roles
                UNION ALL SELECT 'default ' || oid FROM pg_default_acl""")
        }
    finally:
        await conn.close()


async def test_nothing_is_left_and_once_more_is_harmless(pair: Pair) -> None:
    urls = (pair.source, pair.target)
    before = [await _schema(url) for url in urls]
    await _litter(pair, MOVE)
    for url in urls:
        kinds = {one.kind for one in await leftovers(url, MOVE)}
        assert kinds >= {Kind.SLOT, Kind.PUBLICATION, Kind.FENCE, Kind.TRIGGER, Kind.SCHEMA}
    for url, other in (urls, urls[::-1]):
        assert await clean(url, MOVE, other_url=other)
        assert await clean(url, MOVE) == []
        assert await leftovers(url) == []
    assert [await _schema(url) for url in urls] == before


async def test_another_move_keeps_what_is_its_own(pair: Pair) -> None:
    await _litter(pair, "another")
    before = await _schema(pair.source)
    await _litter(pair, MOVE)
    await clean(pair.source, MOVE, other_url=pair.target)
    assert await leftovers(pair.source, MOVE) == []
    assert await _schema(pair.source) == before
    assert await leftovers(pair.source, "another")


async def test_a_noted_identity_is_put_back_on_the_other_side(pair: Pair) -> None:
    await _litter(pair, MOVE)
    source = await asyncpg.connect(pair.source)
    try:
        identity = "SELECT relreplident::text FROM pg_class WHERE relname = 'event_tag'"
        assert await source.fetchval(identity) == "f"
        with pytest.raises(Conflict, match=r"public.event_tag must be put back"):
            await clean(pair.target, MOVE)
        await clean(pair.target, MOVE, other_url=pair.source)
        assert await source.fetchval(identity) == "d"
    finally:
        await source.close()


async def test_a_slot_that_is_read_from_and_a_setting_go_too(pair: Pair) -> None:
    conn = await asyncpg.connect(pair.source)
    try:
        name = await conn.fetchval("SELECT current_database()")
        await conn.execute(f"ALTER DATABASE {name} SET fleetlift_fence.pass = 'x'")
        await conn.execute("CREATE PUBLICATION fleetlift_acme FOR TABLE device")
        await conn.execute("SELECT pg_create_logical_replication_slot('fleetlift_acme', 'pgoutput')")
    finally:
        await conn.close()
    closure = await cloud_closure(pair.source)
    with scratch_directory() as directory:
        follower = Follower(pair.source, pair.target, closure, move=MOVE, directory=directory)
        await follower.prepare()  # its walsender holds the slot's snapshot
        assert {one.kind for one in await leftovers(pair.source)} >= {Kind.SETTING, Kind.SLOT}
        await clean(pair.source, MOVE)
        assert await leftovers(pair.source) == []
        await follower.release_snapshot()


def test_the_command_lists_and_cleans(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, engine_loop: object
) -> None:
    monkeypatch.setenv("SOURCE_URL", pair.source)
    run = CliRunner().invoke(app, ["leftovers", "--from-env", "SOURCE_URL"])
    assert run.exit_code == 0, run.output
    assert "Nothing of a move is there" in run.output
    run = CliRunner().invoke(app, ["clean", MOVE, "--from-env", "SOURCE_URL", "--yes"])
    assert run.exit_code == 0, run.output
    assert pair.source not in run.output


async def test_a_role_that_is_called_like_us_is_the_operators(pair: Pair) -> None:
    conn = await asyncpg.connect(pair.source)
    try:
        await conn.execute("CREATE ROLE fleetlift_mover")
        assert await leftovers(pair.source) == await leftovers(pair.source, MOVE) == []
        await conn.execute("DROP ROLE fleetlift_mover")
    finally:
        await conn.close()


async def test_a_database_that_is_gone_has_nothing_left_in_it(pair: Pair) -> None:
    """What the other side has noted of its tables goes as well."""
    await _litter(pair, MOVE)
    await drop_database(pair.source)
    with pytest.raises(NotFound, match="no such database"):
        await clean(pair.source, MOVE)
    await clean(pair.target, MOVE, other_url=pair.source)
    assert await leftovers(pair.target) == []
