"""The simulated backend's database: registry, routes, shadows, presence, telemetry with its ledger.

Plain dictionaries. What is decided on the way in is decided by the core's own code: identities of messages,
shadow documents, command states, routes.
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec

from fleetlift.core import route as routes
from fleetlift.core import shadow as rules
from fleetlift.core import telemetry as messages
from fleetlift.core.command import Mode, Path
from fleetlift.core.delays import bucket
from fleetlift.core.migration import DeviceObservation, FleetDevice
from fleetlift.core.orders import PROBE_COMMAND, SHADOW_NAME, DeviceReport, Orders
from fleetlift.core.ranges import RangeSet
from fleetlift.core.shadow import Operation, Shadow, ShadowKey
from fleetlift.core.telemetry import MQTT_PATH, Telemetry
from fleetlift.simulate.commands import Commands

PROBE_MARGIN_S = 10.0
_OLD_EXECUTES = ("old", "dry-run")

Row = tuple[str, str, int, int]  # the primary key: device, channel, ts, key of the message
LogMessage = tuple[int, str, Mapping[str, str] | None, bytes, float]  # number, topic, headers, payload, at


class Account(msgspec.Struct):
    """What one path has brought of one channel of one device."""

    ranges: RangeSet
    received: int = 0
    doubles: int = 0
    last_at: float = 0.0


class Database:
    """Every call is one transaction; `up` False: there is none to be had."""

    def __init__(self, chance: random.Random) -> None:
        self.up = True
        self.devices: dict[str, dict[str, Any]] = {}
        self.routes: dict[str, routes.Route] = {}
        self.credentials: dict[str, str] = {}
        self.shadows: dict[str, Shadow] = {}
        self.presence: dict[str, float] = {}  # connected since
        self.connects: dict[str, list[float]] = {}
        self.rows: dict[Row, str] = {}  # the path of the copy that was stored
        self.ledger: dict[tuple[str, str], dict[str, Account]] = {}  # by (device, channel), then path
        self.delays: dict[tuple[str, str], list[tuple[float, int]]] = {}  # by (device, path): (at, bucket)
        self.heard: dict[str, list[float | None]] = {}  # newest telemetry by the new path and by others
        self.reports: dict[str, DeviceReport] = {}  # what shadows hold as reported
        self.dead_letters: list[str] = []
        self.telemetry_position = 0
        self.feed_positions: dict[str, str] = {}
        self.baselines: dict[str, tuple[int, dict[str, int]]] = {}
        self.commands = Commands(chance.getrandbits)

    # -- telemetry ---------------------------------------------------------------------------------------

    def take_telemetry(self, batch: Sequence[LogMessage]) -> Callable[[], None]:
        """What a batch of the log comes to; calling it commits rows, account and position together."""
        found = [messages.parse(topic, headers, payload, at) for _, topic, headers, payload, at in batch]
        position = batch[-1][0]

        def commit() -> None:
            self.store_rows(one for one in found if type(one) is Telemetry)
            self.dead_letters += [one.reason for one in found if type(one) is messages.DeadLetter]
            self.telemetry_position = position

        return commit

    def store_rows(self, rows: Iterable[Telemetry]) -> None:
        for row in rows:
            self.rows.setdefault((row.device, row.channel, row.ts_ms, row.msg_key), row.path)
            paths = self.ledger.setdefault((row.device, row.channel), {})
            if (account := paths.get(row.path)) is None:
                account = paths[row.path] = Account(RangeSet())
            account.received += 1
            account.last_at = max(account.last_at, row.received_at)
            times = self.heard.setdefault(row.device, [None, None])
            place = 0 if row.path == MQTT_PATH else 1
            times[place] = max(times[place] or 0.0, row.received_at)
            if row.seq is not None and not account.ranges.add(row.seq):
                account.doubles += 1
            self.delays.setdefault((row.device, row.path), []).append((row.received_at, bucket(row.delay_s)))

    def numbers(self) -> dict[str, dict[str, RangeSet]]:
        """The numbers of all rows, by device and channel."""
        found: dict[str, dict[str, RangeSet]] = {}
        for device, channel, _, key in self.rows:
            if key >= 0:
                channels = found.setdefault(device, {})
                if (numbers := channels.get(channel)) is None:
                    numbers = channels[channel] = RangeSet()
                numbers.add(key)
        return found

    # -- registry and routes -----------------------------------------------------------------------------

    def adopt(self, devices: Sequence[FleetDevice], migration: str) -> None:
        for device in devices:
            self.devices[device.id] = device.attributes
            self.routes.setdefault(device.id, routes.Route(migration=migration))

    def route(self, orders: Mapping[str, Orders]) -> dict[str, str]:
        """Write routes unless the store holds a newer epoch. Refusals by device."""
        refused = {}
        for device, order in orders.items():
            held = self.routes.get(device)
            if device not in self.devices:
                refused[device] = "not registered"
            elif (after := routes.ordered(held, order)) is not None:
                self.routes[device] = after
            elif held is None or (held.epoch, held.migration) != (order.epoch, order.migration):
                refused[device] = "a newer epoch was given already"
        return refused

    def follow(self, reports: Mapping[str, DeviceReport], now: float) -> None:
        for device, report in reports.items():
            held = self.routes.get(device)
            if held is None or (after := routes.followed(held, report)) is None:
                continue
            self.routes[device] = after
            path = Path.OLD if after.flags.commands.value in _OLD_EXECUTES else None
            path = Path.NEW if after.flags.commands.value == "new" else path
            if path is not None:
                self.commands.add_path(device, path, now, PROBE_COMMAND)

    def probe(self, device: str, order: Orders, now: float) -> None:
        """Queue the probe of a try, unless there is one that outlives it."""
        for command in self.commands.open.values():
            if (
                command.device == device
                and command.name == PROBE_COMMAND
                and command.created_by == str(order.epoch)
                and command.expires_at >= now + order.try_within_s
                and any(path.path is Path.NEW and path.ended_at is None for path in command.paths)
            ):
                return
        self.create_command(
            device,
            PROBE_COMMAND,
            expires_in_s=2 * order.try_within_s + PROBE_MARGIN_S,
            now=now,
            by=str(order.epoch),
        )

    def create_command(
        self, device: str, name: str, *, expires_in_s: float, now: float, by: str, mode: Mode = Mode.EXECUTE
    ) -> str:
        held = self.routes.get(device)
        return self.commands.create(
            device,
            name,
            expires_in_s=expires_in_s,
            mode=mode,
            route=held.flags.commands if held is not None else None,
            now=now,
            by=by,
        ).id

    # -- shadows -----------------------------------------------------------------------------------------

    def set_desired(self, device: str, order: Orders, now: float) -> str | None:
        """Make the desired state exactly this order. The reason when it is refused."""
        document = msgspec.to_builtins(msgspec.structs.replace(order, credential=None))
        stored = self.shadows.get(device)
        held = stored.desired if stored is not None else None
        epoch = (held or {}).get("epoch")
        if isinstance(epoch, int) and epoch > order.epoch:
            return f"the shadow holds order {epoch}, newer than {order.epoch}"
        if stored is None or not rules.same(held or {}, document):
            outcome = rules.update(stored, rules.Update(desired=rules.replacing(held, document)), now)
            if outcome.shadow is None:
                return "refused by the shadow"
            self.shadows[device] = outcome.shadow
        return None

    def shadow_request(self, device: str, operation: Operation, payload: bytes, now: float) -> rules.Outcome:
        key = ShadowKey(device, SHADOW_NAME)
        outcome = rules.handle(operation, key, self.shadows.get(device), payload, now)
        if outcome.shadow is not None:
            self.shadows[device] = outcome.shadow
            with contextlib.suppress(msgspec.ValidationError):
                self.reports[device] = msgspec.convert(outcome.shadow.reported, DeviceReport)
        return outcome

    def desired_epoch(self, device: str) -> int | None:
        """The epoch that the device has not reported yet, as its delta would say."""
        shadow = self.shadows.get(device)
        lacking = rules.delta(shadow) if shadow is not None else None
        epoch = lacking[0].get("epoch") if lacking is not None else None
        return epoch if isinstance(epoch, int) else None

    # -- what the engine asks ----------------------------------------------------------------------------

    def observe(self, devices: Sequence[str]) -> dict[str, DeviceObservation]:
        seen = {}
        nothing = (None, None)
        for device in devices:
            times = self.heard.get(device)
            report = self.reports.get(device)
            if report is not None or times is not None or device in self.presence:
                new_at, old_at = times or nothing
                seen[device] = DeviceObservation(
                    connected_new=device in self.presence,
                    report_by_new=report,
                    new_telemetry_at=new_at,
                    old_telemetry_at=old_at,
                )
        return seen
