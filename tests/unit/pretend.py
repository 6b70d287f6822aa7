"""A small pretended fleet with both its sides, stepped by a clock of its own, for the tests of `decide`."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from fleetlift.core.decide import OWN_METRICS, begin, decide
from fleetlift.core.gates import parse_gate
from fleetlift.core.migration import (
    AuditEntry,
    Decision,
    DeviceObservation,
    FleetDevice,
    MemberState,
    MigrationState,
    Observations,
    Phase,
    Request,
    RequestKind,
    Sample,
    Tell,
)
from fleetlift.core.orders import DevicePhase, DeviceReport, Flags, LinkFlag, TelemetryFlag
from fleetlift.core.plan import Fleet, Move, OnBreach, Plan, SideSpec, Step, gates_of, ladder
from fleetlift.core.units import parse_share

START = 1_800_000_000.0


def plan(
    *,
    waves: tuple[str, ...] = ("1 device", "10%", "50%", "100%"),
    moves: tuple[Move, ...] = (Move.TELEMETRY,),
    gates: tuple[str, ...] = ("telemetry.completeness >= 99%",),
    bake_s: float = 20.0,
    on_breach: OnBreach = OnBreach.REVERT,
    canaries: tuple[str, ...] = (),
    stages: Mapping[Move, tuple[str, ...]] | None = None,
    **step: Any,
) -> Plan:
    """A plan with one step a move; every step has the same waves and gates."""
    of = {
        Move.TELEMETRY: ("both", "new"),
        Move.COMMANDS: ("dry-run", "both", "new"),
        Move.LINK: ("new",),
        **(stages or {}),
    }
    return Plan(
        name="connect",
        fleet=Fleet(tenant="carshare", canaries=canaries),
        old=SideSpec(kind="legacy", address="tcp://127.0.0.1:7700"),
        new=SideSpec(kind="fleetlift", address="default"),
        on_breach=on_breach,
        steps=tuple(
            Step(
                move=move,
                stages=of[move],
                waves=tuple(parse_share(text) for text in waves),
                bake_s=bake_s,
                gates=tuple(parse_gate(text) for text in gates),
                **{"settle_s": 15.0, "retry_after_s": 60.0, **step},
            )
            for move in moves
        ),
    )


class PretendDevice:
    """Obeys the newest order it has heard of a round later; `goes_back` makes its tries fail."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.online = True
        self.seen = True
        self.goes_back = False
        self.deaf = False  # connected, but answers nothing
        self.since = START - 1000
        self.flags = Flags()
        self.epoch = 0
        self.pending: tuple[int, Flags] | None = None
        self.report: DeviceReport | None = None
        self.report_by_new: DeviceReport | None = None
        self.new_telemetry_at: float | None = None
        self.old_telemetry_at: float | None = None

    def told(self, epoch: int, flags: Flags) -> None:
        held = max(self.epoch, self.pending[0] if self.pending else 0)
        if epoch > held:
            self.pending = (epoch, flags)

    def step(self, now: float, new_up: bool) -> None:
        if not self.online or self.deaf:
            return
        if self.pending is not None:
            self.epoch, flags = self.pending
            self.pending = None
            if flags.needs_new and (self.goes_back or not new_up):
                self.flags = Flags()
                self.report = DeviceReport(
                    epoch=self.epoch, phase=DevicePhase.WENT_BACK, flags=Flags(), reason="try failed"
                )
            else:
                self.flags = flags
                phase = DevicePhase.MOVED if flags.needs_new else DevicePhase.OLD
                self.report = DeviceReport(epoch=self.epoch, phase=phase, flags=flags)
                if flags.needs_new:
                    self.report_by_new = self.report
        if self.flags.telemetry is not TelemetryFlag.OLD and new_up:
            self.new_telemetry_at = now
        if self.flags.telemetry is not TelemetryFlag.NEW:
            self.old_telemetry_at = now

    def observation(self) -> DeviceObservation:
        there = self.online
        return DeviceObservation(
            connected_old=there and self.flags.link is LinkFlag.BOTH,
            connected_new=there and self.flags.needs_new,
            report=self.report,
            report_by_new=self.report_by_new,
            new_telemetry_at=self.new_telemetry_at,
            old_telemetry_at=self.old_telemetry_at,
        )


class Pretend:
    """A migration of a pretended fleet. `state` has been through JSON, as if read back from a store."""

    def __init__(self, the_plan: Plan, devices: int = 20, *, epoch: int = 0) -> None:
        self.plan = the_plan
        self.now = START
        self.devices = {name: PretendDevice(name) for name in (f"car-{n:03}" for n in range(devices))}
        self.selected: Callable[[str], bool] = lambda _: True
        self.samples: dict[str, Sample] = {
            gate.text: good_sample(gate.text) for gate in gates_of(the_plan) if gate.metric not in OWN_METRICS
        }
        self.old_up = self.new_up = self.readable = True
        self.requests: list[Request] = []
        self.audit: list[AuditEntry] = []
        self.decisions: list[Decision] = []
        self.tells: list[Tell] = []
        self._ids = 0
        self.state = self.stored(begin(the_plan, self.fleet() or (), epoch))

    def fleet(self) -> tuple[FleetDevice, ...] | None:
        if not self.readable:
            return None
        return tuple(
            FleetDevice(id=d.name, connected=d.online, since=d.since if d.seen else None)
            for d in self.devices.values()
            if self.selected(d.name)
        )

    def observe(self) -> Observations:
        return Observations(
            fleet=self.fleet(),
            devices={d.name: d.observation() for d in self.devices.values() if d.seen},
            samples=self.samples,
            requests=tuple(self.requests),
            old_up=self.old_up,
            new_up=self.new_up,
        )

    def ask(self, kind: RequestKind, **args: Any) -> None:
        self._ids += 1
        self.requests.append(Request(id=self._ids, kind=kind, actor="ana", at=self.now, args=args))

    def step(self, *, deliver: Callable[[Tell], bool] = lambda _: True, commit: bool = True) -> Decision:
        """One round: decide, store, tell; then the devices do what they do and a second passes."""
        decision = decide(self.plan, self.state, self.observe(), self.now)
        if commit:
            self.state = self.stored(decision.state)
            self.audit += decision.audit
            self.decisions.append(decision)
            self.requests = [r for r in self.requests if r.id not in decision.answered]
        rungs = ladder(self.plan)
        for tell in decision.actions:
            if deliver(tell):
                self.tells.append(tell)
                self.devices[tell.device].told(tell.epoch, rungs[tell.rung].flags)
        self.now += 1
        for device in self.devices.values():
            device.step(self.now, self.new_up)
        return decision

    def until(self, phase: Phase, *, within_s: float = 5000) -> None:
        end = self.now + within_s
        while self.state.phase is not phase:
            assert self.now < end, (self.state.phase, self.state.reason, self.state.rung, self.state.wave)
            self.step()

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step()

    def until_wave(self, rung: int, wave: int, *, within_s: float = 5000) -> None:
        end = self.now + within_s
        while (self.state.rung, self.state.wave) != (rung, wave) or self.state.wave_opened_at is None:
            assert self.now < end, (self.state.phase, self.state.reason, self.state.rung, self.state.wave)
            self.step()

    def kinds(self) -> list[str]:
        return [entry.kind for entry in self.audit]

    def on_new(self) -> set[str]:
        return {d.name for d in self.devices.values() if d.flags != Flags()}

    def members(self, state: MemberState) -> set[str]:
        return {m.device for m in self.state.members.values() if m.state is state}

    @staticmethod
    def stored(state: MigrationState) -> MigrationState:
        return msgspec.json.decode(msgspec.json.encode(state), type=MigrationState)


def good_sample(gate: str) -> Sample:
    """A sample with which the gate holds."""
    if "==" in gate:
        return Sample(value=0.0, n=1000)
    return Sample(value=100.0 if "%" in gate else 0.01, n=1000, old=0.02, old_n=1000)


def shake(pretend: Pretend, rng: random.Random) -> None:
    """Some faults of ordinary days: devices come and go, fail, fall deaf, and recover."""
    device = rng.choice(list(pretend.devices.values()))
    match rng.randrange(8):
        case 0:
            device.online, device.since = False, pretend.now
        case 1 | 2 | 3:
            device.online, device.since = True, pretend.now
            device.goes_back = device.deaf = False
        case 4:
            device.goes_back = True
        case 5:
            device.deaf = True
        case _:
            pass
