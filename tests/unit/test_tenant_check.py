"""What a check says of servers that are not at hand in a test: old ones."""

from typing import Any, cast

import pytest

from fleetlift.migrate.tenant_check import _of_target, _source_problems
from fleetlift.migrate.tenant_planfile import parse_tenant_plan
from fleetlift.store.pool import Conn

PLAN = """\
migration: small
tenant: acme
from: {postgresql: "postgresql://multi/cloud"}
to: {postgresql: "postgresql://acme/cloud"}
steps: [{copy: tenant data, root: customers.id = 2}]
"""


class Server:
    """Answers as a server of that version that is fit for a move otherwise."""

    def __init__(self, version: int) -> None:
        self.version = version

    async def fetchrow(self, _query: str) -> dict[str, Any]:
        return {
            "version": self.version,
            "wal_level": "logical",
            "standby": False,
            "slots": 10,
            "used": 0,
            "may_replicate": True,
            "may_publish": True,
            "me": "mover",
            "tables": 0,
        }


@pytest.mark.parametrize(("version", "fit"), [(130014, False), (140000, True), (170002, True)])
async def test_both_sides_are_as_new_as_following_needs(version: int, fit: bool) -> None:
    """Else the check is green and the first step is held, or the way back cannot be prepared."""
    server = cast(Conn, Server(version))
    source = await _source_problems(server, parse_tenant_plan(PLAN))
    target = await _of_target(server)
    if fit:
        assert source == target == []
    else:
        assert source == [
            "the source is PostgreSQL 13: the oldest that can be followed is 14; upgrade it first"
        ]
        assert target == [
            "the target is PostgreSQL 13: the oldest that can be followed is 14; upgrade it first"
        ]
