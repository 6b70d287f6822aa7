"""The tenant's changes come back to the source, where the other tenants live: their rows are left alone."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from follow_world import Direction, World, rules, world

from fleetlift.core.errors import Conflict
from fleetlift.store.embedded import EmbeddedPostgres
from fleetlift.tenant import follow_session
from fleetlift.tenant.follow import Follower
from tenant_world import fresh_pair

pytestmark = pytest.mark.asyncio(loop_scope="module")

USERS = """
CREATE TABLE owner (id int PRIMARY KEY, name text);
CREATE TABLE users (id int PRIMARY KEY, owner_id int REFERENCES owner, email text UNIQUE, nick text,
  gone boolean NOT NULL DEFAULT false, code text);
CREATE UNIQUE INDEX users_code ON users (code) WHERE NOT gone;
CREATE UNIQUE INDEX users_nick ON users (lower(nick)) WHERE NOT gone;
CREATE TABLE post (user_id int REFERENCES users ON UPDATE CASCADE ON DELETE CASCADE, n int, body text,
  PRIMARY KEY (user_id, n));
"""
ROWS = """
INSERT INTO owner VALUES (1, 'a'), (2, 'b');
INSERT INTO users SELECT n, 1 + n % 2, 'mail ' || n, 'nick ' || n FROM generate_series(1, 6) n;
INSERT INTO post SELECT u.id, n, 'post' FROM users u, generate_series(1, 3) n;
"""
OF_OTHERS = (
    "SELECT string_agg(u::text || ' ' || coalesce(p::text, ''), ';' ORDER BY u.id, p.n) "
    "FROM users u LEFT JOIN post p ON p.user_id = u.id WHERE u.owner_id = 2"
)


SERVER_SETTINGS = {"fsync": "off"}


class Back:
    """The way back of owner 1's rows, after the switch."""

    def __init__(self, w: World) -> None:
        self.w = w
        self.follower = Follower(
            w.pair.target,
            w.pair.source,
            w.closure,
            move="t",
            directory=w.directory,
            direction=Direction.REVERSE,
        )
        self.task: asyncio.Task[None] | None = None

    def run(self) -> "asyncio.Task[None]":
        self.task = asyncio.create_task(self.follower.run())
        return self.task

    async def arrived(self) -> None:
        """All that is committed on the target is on the source."""
        lsn = await self.w.target.fetchval("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint")
        assert await self.follower.reached(lsn, 20), self.follower.progress

    async def same(self) -> None:
        await self.arrived()
        assert not await self.w.differences()


@pytest_asyncio.fixture(loop_scope="module")
async def back(server: EmbeddedPostgres, tmp_path: Path) -> AsyncIterator[Back]:
    given = rules("public.owner.id", "1")
    async with fresh_pair(server) as pair, world(pair, tmp_path, given, ddl=USERS, rows=ROWS) as w:
        await w.follow()
        await w.stop()
        made = Back(w)
        await made.follower.prepare()
        yield made
        if made.task is not None:
            made.task.cancel()
            await asyncio.gather(made.task, return_exceptions=True)


CLASHES = {
    "key": ("(7, 1, 'ours', 'ours')", r"row \(id\) = \(7\) cannot go back"),
    "email": ("(1001, 1, 'theirs', 'ours')", r"\(id\) = \(1001\).*row \(id\) = \(7\).*users_email_key"),
    "code": (
        "(1001, 1, 'ours', 'ours', false, 'theirs')",
        r"\(id\) = \(1001\).*row \(id\) = \(7\).*users_code",
    ),
    "nick": ("(1001, 1, 'ours', 'THEIRS')", r"\(id\) = \(1001\).*row \(id\) = \(7\).*users_nick"),
}
CHANGED = "email = 'changed', nick = 'changed', code = 'changed'"
MENDED = {
    "source": f"UPDATE users SET id = 8, {CHANGED} WHERE id = 7",
    "source, deleted": "DELETE FROM users WHERE id = 7",
    "target": f"UPDATE users SET id = 1002, {CHANGED} WHERE id IN (7, 1001)",
    "target, deleted": "DELETE FROM users WHERE id IN (7, 1001)",
}


@pytest.mark.parametrize("mended", MENDED)
@pytest.mark.parametrize("clash", CLASHES)
async def test_another_tenants_row_in_the_way_is_left_alone(back: Back, clash: str, mended: str) -> None:
    """Nothing of the transaction is applied; once one of the two rows is another, it goes on."""
    w, (row, said) = back.w, CLASHES[clash]
    await w.source.execute(
        "INSERT INTO users VALUES (7, 2, 'theirs', 'theirs', false, 'theirs'); "
        "INSERT INTO post VALUES (7, 1, 'theirs')"
    )
    others = await w.source.fetchval(OF_OTHERS)
    task = back.run()
    await back.same()
    async with w.target.transaction():
        await w.target.execute("INSERT INTO users VALUES (1000, 1, 'first', 'first')")
        await w.target.execute(f"INSERT INTO users VALUES {row}")
        await w.target.execute(f"INSERT INTO post SELECT {row[1 : row.index(',')]}, 1, 'ours'")
    for again in (False, True):
        with pytest.raises(Conflict, match=said):
            await asyncio.wait_for(back.run() if again else task, 30)
        assert await w.source.fetchval(OF_OTHERS) == others
        assert not await w.source.fetchval("SELECT count(*) FROM users WHERE id >= 1000")
    await (w.source if mended.startswith("source") else w.target).execute(MENDED[mended])
    others = await w.source.fetchval(OF_OTHERS)
    back.run()
    await back.same()
    assert await w.source.fetchval(OF_OTHERS) == others


async def test_what_does_not_clash_is_not_in_the_way(back: Back) -> None:
    """A partial index keeps apart only what is in it, also while rows are put in one after the other."""
    w = back.w
    await w.source.execute("INSERT INTO users VALUES (7, 2, 'theirs', 'same', true, 'same')")
    others = await w.source.fetchval(OF_OTHERS)
    back.run()
    async with w.target.transaction():
        await w.target.execute("UPDATE users SET email = 'x' WHERE id = 2")
        await w.target.execute("UPDATE users SET email = 'mail 2' WHERE id = 4")
        await w.target.execute("UPDATE users SET email = 'mail 4', nick = 'same', code = 'same' WHERE id = 2")
        await w.target.execute("INSERT INTO users VALUES (1000, 1, 'more', 'SAME', true, 'same')")
    await back.same()
    assert back.follower.progress.reconnects  # so one after the other
    assert await w.source.fetchval(OF_OTHERS) == others


@pytest.mark.parametrize("piece", [1, 20_000])
async def test_what_a_transaction_takes_along_is_still_the_tenants(
    back: Back, monkeypatch: pytest.MonkeyPatch, piece: int
) -> None:
    """A parent is gone, or another, before its children are; a row comes, changes and goes in one."""
    monkeypatch.setattr(follow_session, "_PIECE_CHANGES", piece)
    w = back.w
    back.run()
    async with w.target.transaction():
        await w.target.execute("DELETE FROM users WHERE id = 2; UPDATE users SET id = 1004 WHERE id = 4")
        await w.target.execute("INSERT INTO users VALUES (2, 1, 'again'); INSERT INTO post VALUES (2, 2, '')")
        await w.target.execute("INSERT INTO users VALUES (1000, 1, 'new'); UPDATE users SET nick = id::text")
        await w.target.execute("INSERT INTO post VALUES (6, 9, 'new'); DELETE FROM post WHERE n = 9")
    await back.same()


async def test_a_row_may_be_nobodys_for_a_while(back: Back) -> None:
    """The tenant makes it, or lets go of it, and takes it as its own later."""
    w = back.w
    back.run()
    for statement in (
        "INSERT INTO users VALUES (1000, NULL, 'new'); INSERT INTO post VALUES (1000, 1, '')",
        "UPDATE users SET owner_id = NULL, nick = 'free' WHERE id IN (2, 4)",
        "UPDATE users SET nick = 'freer' || id WHERE id IN (2, 1000); UPDATE post SET body = 'x' WHERE n = 1",
        "UPDATE users SET owner_id = 1 WHERE id IN (2, 1000); UPDATE post SET body = 'y' WHERE n = 1",
        "DELETE FROM users WHERE owner_id IS NULL",
    ):
        if "'free'" in statement:
            await w.target.execute("UPDATE users SET gone = true WHERE id = 4")
        await w.target.execute(statement)
        await back.arrived()
    assert not await w.differences()
    assert not await w.source.fetchval("SELECT count(*) FROM users WHERE owner_id IS NULL")
    assert not await w.source.fetchval(
        "SELECT count(*) FROM post WHERE user_id NOT IN (SELECT id FROM users)"
    )
    assert back.follower.progress.not_carried == 0


async def test_what_another_tenant_has_taken_since_is_its(back: Back) -> None:
    """A row that the tenant let go and that somebody has changed since is not the tenant's to change."""
    w = back.w
    back.run()
    await w.target.execute("UPDATE users SET owner_id = NULL WHERE id = 2")
    await back.arrived()
    await w.source.execute("UPDATE users SET owner_id = 2 WHERE id = 2")
    others = await w.source.fetchval(OF_OTHERS)
    await w.target.execute(
        "UPDATE users SET nick = 'x' WHERE id = 2; UPDATE users SET nick = 'y' WHERE id = 4"
    )
    await back.arrived()
    assert await w.source.fetchval(OF_OTHERS) == others
    assert back.follower.progress.not_carried == 1
    await w.target.execute("UPDATE users SET owner_id = 1 WHERE id = 2")
    assert back.task is not None
    with pytest.raises(Conflict, match=r"row \(id\) = \(2\) cannot go back"):
        await asyncio.wait_for(back.task, 30)
    assert await w.source.fetchval(OF_OTHERS) == others
