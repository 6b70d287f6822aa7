"""`fleetlift device run` and `fleetlift device fleet`: device agents by hand, and by the dozen."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from fleetlift import log
from fleetlift.core.errors import BadInput
from fleetlift.core.identity import checked_device_id
from fleetlift.core.orders import Endpoint
from fleetlift.sides.legacy.side import host_and_port

app = typer.Typer(no_args_is_help=True)

Old = Annotated[str, typer.Option(help="The old side, as in tcp://127.0.0.1:7700.")]
State = Annotated[Path, typer.Option(help="Directory of the device's disk: outbox, counters, commands.")]
Devices = Annotated[int | None, typer.Option(min=1, help="How many; default: one a recorded trip, 57.")]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
DEFAULT_OLD = "tcp://127.0.0.1:7700"
STATUS_EVERY_S = 1.0


@app.command()
def run(
    device: Annotated[str, typer.Argument(help="The device's id.")],
    old: Old = DEFAULT_OLD,
    key_file: Annotated[
        Path | None,
        typer.Option(help="File with the device's key, or an inventory (JSON lines) that names the device."),
    ] = None,
    key_env: Annotated[
        str, typer.Option(help="Environment variable with the device's key.")
    ] = "FLEETLIFT_DEVICE_KEY",
    new: Annotated[
        str | None,
        typer.Option(help="Start on the new side, as in mqtt://127.0.0.1:1883 or mqtts://…; needs no key."),
    ] = None,
    new_key_env: Annotated[
        str, typer.Option(help="Environment variable with the password for --new.")
    ] = "FLEETLIFT_DEVICE_PASSWORD",
    ca: Annotated[Path | None, typer.Option(help="CA certificate (PEM) that --new is checked by.")] = None,
    state: State = Path("device-state"),
    every: Annotated[float, typer.Option(min=0.001, help="Seconds between two measurements.")] = 1.0,
    count: Annotated[
        int | None, typer.Option(help="Stop measuring after so many; then drain and end.")
    ] = None,
    durable: Annotated[
        bool, typer.Option("--durable", help="Survive a power cut too: fsync each write.")
    ] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run one device until SIGTERM or Ctrl-C, and tell what it does.

    It measures an example value every second. Its secrets come from files or the environment, never from the
    command line: the key for the old side, or with --new the password for the new one.
    """
    log.configure(level=log_level)
    checked_device_id(device)
    endpoint = None if new is None else _endpoint(new, ca)
    # one that is on the new side needs no key of the old one, unless it is to have a way back
    has_key = endpoint is None or key_file is not None or os.environ.get(key_env)
    key = _key(device, key_file, key_env) if has_key else ""
    password = os.environ.get(new_key_env, "")
    if endpoint is not None and not password:
        raise BadInput(f"--new needs the device's password for it in {new_key_env}")
    _run(_one(device, key, host_and_port(old), endpoint, password, state, every, count, durable))


@app.command(name="inventory")
def write_inventory(
    devices: Devices = None,
    inventory: Annotated[Path, typer.Option(help="The file; devices it already has keep their keys.")] = Path(
        "fleet-state/inventory.jsonl"
    ),
) -> None:
    """Write the fleet's inventory (ids, keys, attributes), as `fleetlift legacy serve --devices` takes it."""
    from fleetlift.device.fleet import make_inventory
    from fleetlift.device.recorded import vehicles

    chosen = vehicles(devices)
    make_inventory(inventory, chosen)
    typer.echo(f"{len(chosen)} devices in {inventory}")


@app.command()
def fleet(
    old: Old = DEFAULT_OLD,
    devices: Devices = None,
    speed: Annotated[float, typer.Option(min=0.01, help="How much faster than recorded they send.")] = 1.0,
    state: State = Path("fleet-state"),
    inventory: Annotated[
        Path | None,
        typer.Option(
            help="Inventory with the devices' keys; made when missing. Default: STATE/inventory.jsonl."
        ),
    ] = None,
    faulty_revision: Annotated[
        int | None, typer.Option(help="Hardware revision whose firmware misbehaves on the new side.")
    ] = None,
    drop: Annotated[float, typer.Option(min=0, max=1, help="Share of telemetry that it drops there.")] = 0.03,
    late: Annotated[float, typer.Option(min=0, help="Seconds by which it answers late in dry-run.")] = 1.5,
    status: Annotated[
        Path | None, typer.Option(help="JSON file written each second, and with the truth at the end.")
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, help="At SIGTERM: seconds to wait for empty outboxes.")
    ] = 5.0,
    durable: Annotated[
        bool, typer.Option("--durable", help="Survive a power cut too: fsync each write.")
    ] = False,
    log_level: LogLevel = "warning",
) -> None:
    """Run the recorded fleet: real vehicles, each played by a device agent in its own rhythm.

    SIGTERM stops the measurements, waits for outboxes to drain, writes the last status and ends. SIGUSR1
    only stops the measurements.
    """
    from fleetlift.device import fleet as fleets
    from fleetlift.device.recorded import vehicles
    from fleetlift.device.shell import Misbehaviour

    log.configure(level=log_level)
    chosen = vehicles(devices)
    path = inventory or state / "inventory.jsonl"
    keys = fleets.make_inventory(path, chosen)
    fault = Misbehaviour(drop_share=drop, late_in_dry_run_s=late)
    specs = fleets.specs_of(chosen, keys, faulty_revision=faulty_revision, misbehaviour=fault)
    _run(
        _many(
            fleets.Fleet(specs, old=host_and_port(old), state_dir=state, speed=speed, durable=durable),
            status,
            drain,
        )
    )


def _run(work: Any) -> None:
    import uvloop

    _allow_many_connections()
    uvloop.run(work)


def _allow_many_connections() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _key(device: str, file: Path | None, variable: str) -> str:
    """The device's key. Raises BadInput when there is none to be found."""
    from fleetlift.device.fleet import read_inventory

    if file is not None:
        try:
            text = file.read_text().strip()
        except OSError as exc:
            raise BadInput(f"--key-file {file}: {exc.strerror}") from exc
        if not text.startswith("{"):
            return text
        if (entry := read_inventory(file).get(device)) is None:
            raise BadInput(f"--key-file {file}: no device {device!r} in this inventory")
        return entry.key
    if key := os.environ.get(variable, ""):
        return key
    raise BadInput(f"no key for {device}: give --key-file FILE, or put it into the variable {variable}")


def _endpoint(url: str, ca: Path | None) -> Endpoint:
    scheme, _, address = url.partition("://")
    if scheme not in ("mqtt", "mqtts"):
        raise BadInput(f"--new {url}: expected mqtt://HOST:PORT or mqtts://HOST:PORT")
    host, port = host_and_port(f"tcp://{address}")
    try:
        pem = ca.read_text() if ca is not None else None
    except OSError as exc:
        raise BadInput(f"--ca {ca}: {exc.strerror}") from exc
    return Endpoint(host=host, port=port, tls=scheme == "mqtts", ca_pem=pem)


def _stop_event() -> asyncio.Event:
    stop = asyncio.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    return stop


async def _one(
    device: str,
    key: str,
    old: tuple[str, int],
    new: Endpoint | None,
    password: str,
    state: Path,
    every_s: float,
    count: int | None,
    durable: bool,
) -> None:
    from fleetlift.core.command import Path as Side
    from fleetlift.core.orders import CommandsFlag, DevicePhase, Flags, LinkFlag, Orders, TelemetryFlag
    from fleetlift.device import messages as m
    from fleetlift.device.journal import Journal
    from fleetlift.device.shell import DeviceShell
    from fleetlift.device.vehicle import VehicleApplication

    stop = _stop_event()
    loop = asyncio.get_running_loop()
    journal = Journal(state, schedule=loop.call_later, durable=durable)
    if new is not None:
        record = journal.load(device).record
        flags = Flags(telemetry=TelemetryFlag.NEW, commands=CommandsFlag.NEW, link=LinkFlag.NEW)
        orders = Orders(
            epoch=max(record.epoch, 1), migration="by-hand", flags=flags, new=new, credential=password
        )
        moved = m.Record(epoch=orders.epoch, phase=DevicePhase.MOVED, flags=flags, orders=orders)
        journal.write(device, (m.RecordChanged(moved),))
        journal.flush()
    application = VehicleApplication()
    shell = DeviceShell(device, key, old=old, journal=journal, application=application, firmware="by-hand")
    application.on_health_s = shell.agent.set_health_every
    shell.start()
    said = ""
    produced, due = 0, loop.time()
    drained_by: float | None = None
    while not stop.is_set():
        agent = shell.agent
        now = loop.time()
        if now >= due and (count is None or produced < count):
            produced, due = produced + 1, due + every_s
            shell.produce(
                "example",
                b'{"uptime_s":%.3f,"locked":%s}' % (now, b"true" if application.locked else b"false"),
            )
        if count is not None and produced >= count:
            drained_by = drained_by or now + 30
            if agent.outbox_depth == 0 or now > drained_by:
                break
        flags = agent.flags
        state_now = (
            f"phase {agent.phase.value} (epoch {agent.record.epoch})  old {agent.link(Side.OLD).value}  "
            f"new {agent.link(Side.NEW).value}  telemetry {flags.telemetry.value}  "
            f"commands {flags.commands.value}  link {flags.link.value}"
            + (f"  {agent.record.reason}" if agent.record.reason else "")
        )
        if state_now != said:
            said = state_now
            _say(state_now)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(min(0.2, every_s)):
                await stop.wait()
    left = shell.agent.outbox_depth
    await shell.stop()
    journal.close()
    _say(f"stopped; {produced} measured, {left} in the outbox, {len(shell.executed)} commands executed")


def _say(text: str) -> None:
    typer.echo(f"{time.strftime('%H:%M:%S')}  {text}")
    sys.stdout.flush()


@contextlib.contextmanager
def _producing(fleet: Any) -> Iterator[None]:
    """SIGUSR1 stops the measurements while the block runs."""
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, fleet.pause_producing)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)


async def _many(fleet: Any, status: Path | None, drain_s: float) -> None:
    from fleetlift.device.fleet import write_whole

    stop = _stop_event()

    def write(*, final: bool = False) -> Any:
        now = fleet.status(final=final)
        if status is not None:
            write_whole(status, msgspec.json.encode(now))
        return now

    with _producing(fleet):
        await fleet.start()
        write()
        typer.echo(f"fleet of {len(fleet.specs)} devices running")
        sys.stdout.flush()
        while not stop.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_EVERY_S):
                    await stop.wait()
            write()
    fleet.pause_producing()
    drained = await fleet.drain(drain_s)
    last = write(final=True)
    await fleet.stop()
    typer.echo(
        f"fleet stopped: {last.produced} produced, {last.outbox} in outboxes"
        f"{'' if drained else ' (kept for the next start)'}, {last.executed} commands executed, "
        f"{last.executed_twice} twice, longest gap of service {last.longest_gap_s:.1f} s"
    )
