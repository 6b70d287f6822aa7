"""Fleetlift itself as the new side of a migration: registry, routes, orders by shadow, probes, evidence.

It speaks to the backend's own database and log. Whatever is down shows as `Unavailable`; everything here may
be repeated.
"""

import base64
import contextlib
import hashlib
import hmac
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
from nats.errors import Error as NatsError

from fleetlift.backend import alive, commands, registry, shadows
from fleetlift.backend.shadows import Services
from fleetlift.bus.subjects import STORED, STREAM
from fleetlift.config import own_key
from fleetlift.core.command import Path as CommandPath
from fleetlift.core.errors import BadInput, Unavailable
from fleetlift.core.jsonvalue import JsonObject
from fleetlift.core.migration import DeviceObservation, FleetDevice
from fleetlift.core.orders import (
    PROBE_COMMAND,
    SHADOW_NAME,
    DevicePhase,
    DeviceReport,
    Endpoint,
    Flags,
    Orders,
)
from fleetlift.log import get_logger
from fleetlift.sides.base import FeedItem, Side, SideCommand
from fleetlift.sides.sightings import Sightings
from fleetlift.store import commands as command_store
from fleetlift.store import devices as device_store
from fleetlift.store import presence as presence_store
from fleetlift.store import shadows as shadow_store

log = get_logger(__name__)

KEY_FILE = "engine.key"
CHUNK = 1000  # devices a transaction
PROBE_MARGIN_S = 10.0
LOG_END_S = 2.0
PRESENCE_ROLE = "state"
_NOT_FOUND = 404
_GONE = (OSError, TimeoutError, asyncpg.PostgresConnectionError, asyncpg.InterfaceError)


class _StreamState(msgspec.Struct, frozen=True):
    last_seq: int


class _Message(msgspec.Struct, frozen=True):
    seq: int = 0


class _Refusal(msgspec.Struct, frozen=True):
    code: int = 0
    description: str = ""


class _Last(msgspec.Struct, frozen=True):
    message: _Message = _Message()
    error: _Refusal | None = None


class _StreamInfo(msgspec.Struct, frozen=True):
    created: datetime
    state: _StreamState


def engine_key(data_dir: Path) -> bytes:
    """The engine's secret in `DIR/engine.key` (mode 0600), drawn when there is none yet."""
    return own_key(data_dir / KEY_FILE)


def credential_of(key: bytes, device: str) -> str:
    """The password that a device signs in to the new side with; the same every time it is asked for."""
    digest = hmac.new(key, b"device credential\0" + device.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).decode().rstrip("=")


@contextlib.contextmanager
def _reachable() -> Iterator[None]:
    """Turn what drivers say of a database that is away into Unavailable."""
    try:
        yield
    except _GONE as error:
        raise Unavailable(
            f"the new side's database does not answer ({type(error).__name__}): see that it runs"
        ) from error


class FleetliftSide:
    """Implements `sides.base.Side` on the backend's own tables and log."""

    def __init__(
        self,
        services: Services,
        *,
        tenant: str,
        key: bytes,
        name: str = "fleetlift",
    ) -> None:
        self.name = name
        self._services = services
        self._pool = services.pool
        self._tenant = tenant
        self._key = key
        self._sightings = Sightings(services.pool)
        self._adopted: dict[str, str] = {}  # device: its attributes, as JSON, when it was last registered

    # -- preparing ---------------------------------------------------------------------------------------

    async def adopt(self, devices: Sequence[FleetDevice], migration: str) -> list[str]:
        """Make devices known here while they are still served by the old side.

        Registers those that are missing (tenant, attributes) and routes their commands by the old side, so
        that commands can be sent to them through Fleetlift from the first moment on. A route that is there
        already stays. Returns devices that belong to another tenant.
        """
        wanted = {d.id: d for d in devices}
        texts = {d.id: msgspec.json.encode(d.attributes, order="sorted").decode() for d in devices}
        todo = [device for device in wanted if self._adopted.get(device) != texts[device]]
        foreign: list[str] = []
        flags = Flags()
        for chunk in _chunks(todo):
            with _reachable():
                async with self._pool.acquire() as conn, conn.transaction():
                    rows = await conn.fetch(
                        "SELECT id, tenant, dialect, attributes::text AS attributes FROM device "
                        "WHERE id = ANY($1::text[])",
                        chunk,
                    )
                    there = {row["id"]: row for row in rows}
                    owners = await device_store.former_owners(conn, chunk)
                    owners |= {d: row["tenant"] for d, row in there.items()}
                    others = [d for d in chunk if owners.get(d, self._tenant) != self._tenant]
                    foreign.extend(others)
                    new = [
                        registry.NewDevice(
                            id=device,
                            tenant=self._tenant,
                            dialect=there[device]["dialect"] if device in there else "native",
                            attributes=_merged(there.get(device), wanted[device].attributes),
                        )
                        for device in chunk
                        if device not in others
                    ]
                    if new:
                        await registry.put_devices(conn, new, make_tenants=True)
                    await conn.execute(
                        "INSERT INTO device_route (device, epoch, migration, telemetry, commands, link) "
                        "SELECT d, 0, $2, $3, $4, $5 FROM unnest($1::text[]) d "
                        "ON CONFLICT (device) DO UPDATE SET migration = excluded.migration, released = false "
                        "WHERE device_route.telemetry = $3 AND device_route.commands = $4 "
                        "AND device_route.migration <> excluded.migration",
                        [device.id for device in new],
                        migration,
                        flags.telemetry.value,
                        flags.commands.value,
                        flags.link.value,
                    )
            self._adopted.update((device, texts[device]) for device in chunk if device not in others)
        return foreign

    def credential(self, device: str) -> str:
        return credential_of(self._key, device)

    # -- the side ----------------------------------------------------------------------------------------

    async def inventory(self) -> Sequence[FleetDevice]:
        """Every registered device of the tenant."""
        with _reachable():
            async with self._pool.acquire() as conn:
                found = await registry.select_devices(conn, tenant=self._tenant)
                seen = await presence_store.get_many(conn, [device.id for device in found])
        return [
            FleetDevice(
                id=device.id,
                attributes=dict(device.attributes),
                connected=device.id in seen and seen[device.id].connected,
                since=seen[device.id].since if device.id in seen else None,
            )
            for device in found
        ]

    async def withdraw(self, devices: Sequence[str], *, migration: str) -> None:
        """Let go of the old side, as `migration` is being released: commands are no longer taken for it, and
        `devices`, which stay with it for good, lose their credentials here. Safe to repeat."""
        with _reachable():
            await self._pool.execute(
                "UPDATE device_route SET released = true WHERE migration = $1 AND NOT released", migration
            )
        for chunk in _chunks(list(devices)):
            with _reachable():
                async with self._pool.acquire() as conn:
                    await registry.withdraw_generated(conn, chunk)

    async def deliver(self, orders: Mapping[str, Orders]) -> Mapping[str, str]:
        """Route, shadow and, where the new side is to be tried, credential and probe; refusals by device.

        The route goes first: it decides, in the store, which epoch is newest, and an older one stops here.
        """
        refused: dict[str, str] = {}
        for chunk in _chunks(list(orders)):
            with _reachable():
                async with self._pool.acquire() as conn:
                    rows = await conn.fetch(
                        "SELECT id FROM device WHERE id = ANY($1::text[]) AND tenant = $2",
                        chunk,
                        self._tenant,
                    )
                    mine = {row["id"] for row in rows}
                    accepted = await self._route(conn, {d: orders[d] for d in chunk if d in mine})
                    newest = [d for d in chunk if d in accepted]
                    for device in chunk:
                        if device not in mine:
                            refused[device] = f"not registered for tenant {self._tenant!r}"
                        elif device not in accepted:
                            refused[device] = "a newer epoch was given already"
                    trying = [d for d in newest if orders[d].flags.needs_new]
                    if trying:
                        for device in await registry.grant_generated(
                            conn, {device: self.credential(device) for device in trying}
                        ):
                            refused[device] = "not registered at the new side"
                # The device has its credential from the order that came by the old side; here it would lie
                # in a document that is stored as it is.
                documents = {
                    device: msgspec.to_builtins(msgspec.structs.replace(orders[device], credential=None))
                    for device in newest
                    if device not in refused
                }
                refused |= await shadows.set_desired_many(
                    self._services, documents, name=SHADOW_NAME, refuse=self._older(orders)
                )
                await self._probe([d for d in trying if d not in refused], orders)
        return refused

    async def _route(self, conn: Any, orders: Mapping[str, Orders]) -> set[str]:
        """Write routes unless the store holds a newer epoch. Returns the devices whose order is newest.

        Between a side that alone executes and the other one, commands go by both until the device has said
        what it obeys (`follow_reports`): by the new one alone they would not be executed while it still obeys
        the old one, and the other way round. The device refuses the second copy.
        """
        await conn.execute(
            "INSERT INTO device_route (device, epoch, migration, telemetry, commands, link, both_since) "
            "SELECT o.*, CASE WHEN o.telemetry = 'both' THEN now() END "
            "FROM unnest($1::text[], $2::bigint[], $3::text[], $4::text[], $5::text[], $6::text[]) "
            "o(device, epoch, migration, telemetry, commands, link) "
            "ON CONFLICT (device) DO UPDATE SET epoch = excluded.epoch, migration = excluded.migration, "
            "released = false, "
            "telemetry = excluded.telemetry, link = excluded.link, updated_at = now(), "
            f"both_since = {_both_since('device_route', 'excluded')}, "
            "commands = CASE WHEN (device_route.commands, excluded.commands) IN "
            "(('old', 'new'), ('dry-run', 'new'), ('new', 'old'), ('new', 'dry-run')) "
            "THEN 'both' ELSE excluded.commands END "
            "WHERE device_route.epoch < excluded.epoch",
            list(orders),
            [o.epoch for o in orders.values()],
            [o.migration for o in orders.values()],
            [o.flags.telemetry.value for o in orders.values()],
            [o.flags.commands.value for o in orders.values()],
            [o.flags.link.value for o in orders.values()],
        )
        rows = await conn.fetch(
            "SELECT device FROM device_route r JOIN unnest($1::text[], $2::bigint[], $3::text[]) "
            "o(device, epoch, migration) USING (device) "
            "WHERE r.epoch = o.epoch AND r.migration = o.migration",
            list(orders),
            [o.epoch for o in orders.values()],
            [o.migration for o in orders.values()],
        )
        return {row["device"] for row in rows}

    async def follow_reports(self, reports: Mapping[str, DeviceReport]) -> None:
        """Route commands as devices say that they obey, unless a newer order was given meanwhile.

        A device that went back by itself, or was brought back while this side was away, is reached by the
        side that it trusts now, also by commands under way to the other one: those go by both from here on.
        The epoch stays: what a device says does not make later orders old.
        """
        settled = {d: r for d, r in reports.items() if r.phase is not DevicePhase.TRYING}
        for chunk in _chunks(list(settled)):
            said = [settled[device] for device in chunk]
            with _reachable():
                async with self._pool.acquire() as conn, conn.transaction():
                    changed = await conn.fetch(
                        "UPDATE device_route r SET telemetry = o.telemetry, commands = o.commands, "
                        f"link = o.link, updated_at = now(), both_since = {_both_since('r', 'o')} "
                        "FROM unnest($1::text[], $2::bigint[], $3::text[], "
                        "$4::text[], $5::text[]) o(device, epoch, telemetry, commands, link) "
                        "WHERE r.device = o.device AND r.epoch <= o.epoch AND EXISTS "
                        "(SELECT FROM device d WHERE d.id = r.device AND d.tenant = $6) AND "
                        "(r.telemetry, r.commands, r.link) IS DISTINCT FROM "
                        "(o.telemetry, o.commands, o.link) RETURNING r.device, r.commands",
                        chunk,
                        [report.epoch for report in said],
                        [report.flags.telemetry.value for report in said],
                        [report.flags.commands.value for report in said],
                        [report.flags.link.value for report in said],
                        self._tenant,
                    )
                    for path, flags in ((CommandPath.OLD, ("old", "dry-run")), (CommandPath.NEW, ("new",))):
                        devices = [row["device"] for row in changed if row["commands"] in flags]
                        await command_store.add_path(conn, devices, path, but=PROBE_COMMAND)

    @staticmethod
    def _older(orders: Mapping[str, Orders]) -> Callable[[str, JsonObject | None], str | None]:
        def refuse(device: str, held: JsonObject | None) -> str | None:
            epoch = (held or {}).get("epoch")
            if isinstance(epoch, int) and epoch > orders[device].epoch:
                return f"the shadow holds order {epoch}, newer than {orders[device].epoch}"
            return None

        return refuse

    async def _probe(self, devices: Sequence[str], orders: Mapping[str, Orders]) -> None:
        """Queue the probe command of a try for devices that have none that outlives the try."""
        if not devices:
            return
        now = time.time()
        async with self._pool.acquire() as conn:
            rows = await conn.fetch(
                "SELECT p.device, c.params->>'epoch' AS epoch, "
                "extract(epoch FROM max(c.expires_at))::float8 AS expires_at "
                "FROM command_path p JOIN command c ON c.id = p.command "
                "WHERE p.path = 'new' AND p.ended_at IS NULL AND p.device = ANY($1::text[]) AND c.name = $2 "
                "GROUP BY 1, 2",
                list(devices),
                PROBE_COMMAND,
            )
        outlive = {
            row["device"]
            for row in rows
            if row["epoch"] == str(orders[row["device"]].epoch)
            and row["expires_at"] >= now + orders[row["device"]].try_within_s
        }
        await commands.create_commands(
            self._services,
            [
                commands.NewCommand(
                    device=device,
                    name=PROBE_COMMAND,
                    params={"epoch": orders[device].epoch},
                    # An order may reach a device late; the probe must still be there for all of its try.
                    expires_in_s=2 * orders[device].try_within_s + PROBE_MARGIN_S,
                )
                for device in devices
                if device not in outlive
            ],
            principal=f"migration {orders[devices[0]].migration}",
        )

    async def reports(self) -> Mapping[str, DeviceReport]:
        """What devices report of themselves in their shadow `fleetlift`."""
        with _reachable():
            async with self._pool.acquire() as conn:
                return self._sightings.reports(await shadow_store.reported(conn, SHADOW_NAME))

    async def observe(self, devices: Sequence[str]) -> Mapping[str, DeviceObservation]:
        """Connection, report and newest telemetry (own path, and the other ones) of each device seen here."""
        if not self._services.nc.is_connected:
            raise Unavailable("the new side's NATS does not answer: devices cannot be moved there now")
        with _reachable():
            return await self._sightings.read(devices)

    async def log_end(self) -> tuple[datetime, int]:
        """When the log was created, and the number of its last message. Raises Unavailable."""
        try:
            answer = await self._services.nc.request(f"$JS.API.STREAM.INFO.{STREAM}", b"", timeout=LOG_END_S)
            info = msgspec.json.decode(answer.data, type=_StreamInfo)
        except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
            raise Unavailable(f"NATS does not tell about the log ({type(error).__name__})") from error
        return info.created, info.state.last_seq

    async def commands_end(self) -> tuple[datetime, int]:
        """When the log was created, and the number of its last answer to a command; 0: there is none."""
        created, _ = await self.log_end()
        last = 0
        for subject in commands.FILTERS:
            asked = msgspec.json.encode({"last_by_subj": STORED + subject})
            try:
                answer = await self._services.nc.request(
                    f"$JS.API.STREAM.MSG.GET.{STREAM}", asked, timeout=LOG_END_S
                )
                found = msgspec.json.decode(answer.data, type=_Last)
            except (NatsError, OSError, TimeoutError, msgspec.MsgspecError) as error:
                raise Unavailable(f"NATS does not tell about the log ({type(error).__name__})") from error
            if found.error is not None and found.error.code != _NOT_FOUND:
                raise Unavailable(f"NATS does not tell about the log ({found.error.description})")
            last = max(last, found.message.seq)
        return created, last

    async def presence_lost(self) -> str:
        """Why it is not known now who is connected, or ""."""
        if await alive.missing(self._services.nc, [PRESENCE_ROLE]):
            return f"the worker that keeps presence ({PRESENCE_ROLE}) does not answer"
        return ""

    async def send_command(self, command: SideCommand) -> None:
        raise BadInput("commands to this side are created in its own store: use backend.commands.create")

    async def feed(self, after: str) -> AsyncIterator[tuple[str, Sequence[FeedItem]]]:
        """This side's telemetry is in its own log already; there is nothing to bridge."""
        return
        yield after, ()

    async def close(self) -> None:
        """The pool and the publisher belong to the caller."""


def open_side(target: str, options: Mapping[str, str]) -> Side:
    """For `sides.open`: as the old side of a plan, Fleetlift is not built yet."""
    raise BadInput("`fleetlift` can only be the new side (`to:`) of a migration")


def endpoint_of(address: str, *, mqtt: str, mqtts: str, ca_pem: str | None) -> Endpoint:
    """Where devices are sent to: `default` is this backend's own listener, TLS before plain.

    `address` may name another one, as a load balancer's: `mqtt://host:port` or `mqtts://host:port`.
    Raises BadInput when it is neither.
    """
    if address in ("", "default"):
        address = f"mqtts://{mqtts}" if mqtts else f"mqtt://{mqtt}"
    scheme, _, rest = address.partition("://")
    host, colon, port = rest.rpartition(":")
    if scheme not in ("mqtt", "mqtts") or not colon or not host or not port.isdecimal():
        raise BadInput(f"{address!r}: the new side is `default`, mqtt://HOST:PORT or mqtts://HOST:PORT")
    host = {"0.0.0.0": "127.0.0.1", "[::]": "::1"}.get(host, host.strip("[]"))
    tls = scheme == "mqtts"
    return Endpoint(host=host, port=int(port), tls=tls, ca_pem=ca_pem if tls else None)


def _merged(row: asyncpg.Record | None, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """What the registry knows already stays, except where the old side says otherwise."""
    held: dict[str, Any] = msgspec.json.decode(row["attributes"]) if row is not None else {}
    return {**held, **attributes}


def _both_since(before: str, after: str) -> str:
    """SQL: since when a device sends to both sides without a break, by its route before and after."""
    return (
        f"CASE WHEN {after}.telemetry <> 'both' THEN NULL "
        f"WHEN {before}.telemetry = 'both' THEN {before}.both_since ELSE now() END"
    )


def _chunks(devices: Sequence[str]) -> Iterator[list[str]]:
    for start in range(0, len(devices), CHUNK):
        yield list(devices[start : start + CHUNK])
