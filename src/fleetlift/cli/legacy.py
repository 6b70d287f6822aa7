"""`fleetlift legacy`: the home-grown telemetry server, and what its owner asks of it."""

import asyncio
import json
import os
import resource
import signal
import uuid
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer

from fleetlift import log
from fleetlift.core.errors import BadInput, FleetError, Unavailable
from fleetlift.core.legacy import Mode
from fleetlift.sides.base import (
    CommandAnswered,
    FeedItem,
    PresenceChanged,
    ReportReceived,
    SideCommand,
    TelemetryReceived,
)
from fleetlift.sides.legacy.side import LegacySide, host_and_port
from fleetlift.sides.open import legacy_key

app = typer.Typer(
    no_args_is_help=True, help="A home-grown telemetry server of the old kind, to move away from."
)

Data = Annotated[Path, typer.Option("--data", help="The server's data directory.")]
Url = Annotated[
    str,
    typer.Option("--url", help="tcp://host:port of a server elsewhere; its key is in FLEETLIFT_LEGACY_KEY."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]

DEFAULT_DATA = Path("legacy-data")
ANSWER_GRACE_S = 40.0  # the server calls an unanswered command expired some 30 s after its expiry


@app.command()
def serve(
    data: Data = DEFAULT_DATA,
    listen: Annotated[str, typer.Option(help="Where to listen; port 0 takes a free one.")] = "127.0.0.1:7700",
    devices: Annotated[
        Path | None, typer.Option(help="Inventory to take in: CSV, or JSON lines {device, key, attributes}.")
    ] = None,
    dispatch_every: Annotated[
        float, typer.Option(min=0.01, max=60, help="Seconds between two looks into the outbox of commands.")
    ] = 0.2,
    heartbeat: Annotated[int, typer.Option(min=1, max=3600, help="Seconds a device may be silent.")] = 30,
    enroll: Annotated[
        bool, typer.Option("--enroll", help="Take in unknown devices with the key they first come with.")
    ] = False,
    keep_days: Annotated[
        float | None, typer.Option(min=0.001, help="Forget what is older; default: keep everything.")
    ] = None,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "warning",
) -> None:
    """Run the server until SIGTERM or Ctrl-C. Everything it acknowledges is in the data directory.

    The owner's key is in FLEETLIFT_LEGACY_KEY or, made at the first start, in DIR/owner.key.
    """
    import uvloop

    from fleetlift.sides.legacy.server import LegacyServer, read_inventory

    log.configure(level=log_level)
    host, port = host_and_port(f"tcp://{listen}")
    seeds = read_inventory(devices) if devices is not None else []
    _allow_many_connections()

    async def run() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        server = LegacyServer(
            data,
            host=host,
            port=port,
            owner_key=os.environ.get("FLEETLIFT_LEGACY_KEY"),
            dispatch_every_s=dispatch_every,
            heartbeat_s=heartbeat,
            enroll=enroll,
            keep_days=keep_days,
        )
        async with server:
            await server.register(seeds)
            typer.echo(f"legacy server ready on {server.url}")
            ends: set[asyncio.Future[Any]] = {asyncio.ensure_future(stop.wait()), server.broken}
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
            if server.broken.done():
                raise FleetError(
                    f"a part of the legacy server failed: {server.broken.exception()!r}; start it again"
                )

    try:
        uvloop.run(run())
    except OSError as exc:
        reason = (
            os.strerror(exc.errno).lower() if exc.errno else str(exc)
        )  # asyncio's own text repeats the address
        raise BadInput(f"cannot listen on {listen} ({reason}): give another --listen") from exc


@app.command(name="devices")
def list_devices(data: Data = DEFAULT_DATA, url: Url = "", as_json: Json = False) -> None:
    """The devices that the server knows, and whether they are connected."""

    async def run(side: LegacySide) -> None:
        for device in await side.inventory():
            if as_json:
                _print_json(device)
                continue
            since = f" since {_when(device.since)}" if device.since is not None else ""
            state = "connected" if device.connected else "away" if since else "never seen"
            typer.echo(f"{device.id}  {state}{since}  {json.dumps(device.attributes)}")

    _with_side(data, url, run)


@app.command()
def feed(
    data: Data = DEFAULT_DATA,
    url: Url = "",
    start: Annotated[int, typer.Option("--from", min=0, help="The position after which to begin.")] = 0,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Wait for more, or end at the newest.")
    ] = True,
    as_json: Json = False,
) -> None:
    """What the server received: telemetry, answers to commands, who came and went, reports."""

    async def run(side: LegacySide) -> None:
        end = None if follow else await _position(side)
        if end is not None and start >= end:
            return
        async with aclosing(side.feed(str(start))) as batches:
            async for position, items in batches:
                for item in items:
                    _print_item(item, as_json=as_json)
                if end is not None and int(position) >= end:
                    return

    _with_side(data, url, run)


@app.command()
def send(
    device: Annotated[str, typer.Argument(help="The device.")],
    name: Annotated[str, typer.Argument(help="The command, as in lock.")],
    params: Annotated[str, typer.Option(help="A JSON object.")] = "{}",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask whether it would be executed.")] = False,
    expires_in: Annotated[float, typer.Option(min=0.1, help="Seconds it may wait for the device.")] = 30.0,
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Wait for the answer.")] = True,
    data: Data = DEFAULT_DATA,
    url: Url = "",
    as_json: Json = False,
) -> None:
    """Send a command to a device. Exit status 1 when it did not succeed."""
    try:
        values = msgspec.json.decode(params, type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise BadInput(f"--params must be a JSON object: {exc}") from exc

    async def run(side: LegacySide) -> None:
        now = datetime.now(UTC).timestamp()
        command = SideCommand(
            id=str(uuid.uuid4()),
            device=device,
            name=name,
            params=values,
            mode=(Mode.DRY_RUN if dry_run else Mode.EXECUTE).value,
            expires_at=now + expires_in,
        )
        if not wait:
            await side.send_command(command)
            _print_json({"id": command.id}) if as_json else typer.echo(command.id)
            return
        answer = await _sent_and_answered(side, command)
        if as_json:
            _print_json(answer)
        else:
            typer.echo(f"{command.id}  {answer.status}  {json.dumps(answer.detail)}")
        if answer.status not in ("succeeded", "would-execute"):
            raise typer.Exit(1)

    _with_side(data, url, run)


async def _position(side: LegacySide) -> int:
    """Where the server's feed stands."""
    async with aclosing(side.feed("now")) as batches:
        async for position, _ in batches:
            return int(position)
    raise Unavailable("the legacy server's feed ended at once: see that it runs, and try again")


async def _sent_and_answered(side: LegacySide, command: SideCommand) -> CommandAnswered:
    """Send it, and return its final answer."""
    within_s = command.expires_at - datetime.now(UTC).timestamp() + ANSWER_GRACE_S
    async with asyncio.timeout(within_s), aclosing(side.feed("now")) as batches:
        sent = False
        async for _, items in batches:
            if not sent:  # only now, so that the answer cannot come before somebody listens
                await side.send_command(command)
                sent = True
            for item in items:
                if (
                    isinstance(item, CommandAnswered)
                    and item.command == command.id
                    and item.status != "acknowledged"
                ):
                    return item
    raise Unavailable(f"command {command.id} is sent, but its answer was not seen: look into the feed")


def _with_side(data: Path, url: str, work: Callable[[LegacySide], Coroutine[Any, Any, None]]) -> None:
    """Do `work` with the server at `url`, or else the one that runs from `data`."""
    if url:
        key = legacy_key({})
    else:
        address = data / "address"
        if not address.is_file():
            raise Unavailable(
                f"no legacy server is known: {address} does not exist. Start one with"
                f" 'fleetlift legacy serve --data {data}', or name one with --data or --url"
            )
        url = f"tcp://{address.read_text().strip()}"
        in_file = not os.environ.get("FLEETLIFT_LEGACY_KEY")
        key = legacy_key({"key_file": str(data / "owner.key")} if in_file else {})

    async def run() -> None:
        side = LegacySide(url, key)
        try:
            await work(side)
        finally:
            await side.close()

    try:
        asyncio.run(run())
    except TimeoutError as exc:
        raise Unavailable("no answer in time: the device may be away; look into the feed") from exc
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def _print_item(item: FeedItem, *, as_json: bool) -> None:
    if as_json:
        # A body is the device's own JSON: it goes out as it came, not in base64.
        document = msgspec.to_builtins(item, builtin_types=(bytes,))
        if isinstance(item, TelemetryReceived):
            document["body"] = item.body.decode(errors="replace")
        typer.echo(json.dumps(document))
        return
    match item:
        case TelemetryReceived():
            what = f"{item.channel} #{item.seq} {item.body.decode(errors='replace')}"
            at = item.received_at
        case CommandAnswered():
            what, at = f"command {item.command} {item.status} {json.dumps(item.detail)}", item.at
        case PresenceChanged():
            what, at = f"{'connected' if item.connected else 'away'}: {item.reason}", item.at
        case ReportReceived():
            what, at = f"reports {msgspec.json.encode(item.report).decode()}", item.at
    typer.echo(f"{_when(at)}  {item.device}  {what}")


def _print_json(value: object) -> None:
    typer.echo(msgspec.json.encode(value).decode())


def _when(at: float | None) -> str:
    return datetime.fromtimestamp(at or 0.0, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _allow_many_connections() -> None:
    """As many open files as the system lets this user have: each device is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


if __name__ == "__main__":
    app()
