"""`fleetlift relay`: stands at the old address, and tells and lets go who still comes there."""

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from fleetlift import log
from fleetlift.core.errors import BadInput
from fleetlift.core.relaying import ProxyHeader, To, WhenNewDown

T = TypeVar("T")

app = typer.Typer(help="Stand at the old address and forward devices to the side they belong to.")

DEFAULT_DATA = Path("relay-data")

Data = Annotated[Path, typer.Option("--data", help="The relay's data directory.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.callback(invoke_without_command=True)
def relay(
    ctx: typer.Context,
    listen: Annotated[
        str, typer.Option(help="HOST:PORT, the address devices come to.", show_default=False)
    ] = "",
    old: Annotated[str, typer.Option(help="HOST:PORT of the old side.", show_default=False)] = "",
    new: Annotated[str, typer.Option(help="HOST:PORT of the new side.", show_default=False)] = "",
    data: Data = DEFAULT_DATA,
    admin: Annotated[str, typer.Option(help="HOST:PORT of its own API, on loopback.")] = "127.0.0.1:0",
    proxy_old: Annotated[
        ProxyHeader, typer.Option(help="Tell the old side who comes, by the PROXY protocol.")
    ] = ProxyHeader.NONE,
    proxy_new: Annotated[
        ProxyHeader, typer.Option(help="Tell the new side who comes, by the PROXY protocol.")
    ] = ProxyHeader.NONE,
    connections_max: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="More connections than these are refused.")
    ] = 100_000,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Forward each device that comes to the old address, to the old side or the new one, until SIGTERM.

    Plain TCP and TLS pass as they are. Whose a connection is, is read from its first bytes: MQTT client id,
    else TLS server name and address. Routes and the list of who came are kept in the data directory.
    """
    if ctx.invoked_subcommand is not None:
        return
    if not (listen and old and new):
        raise BadInput("give --listen, --old and --new, each as HOST:PORT; see fleetlift relay --help")

    import msgspec
    import uvloop

    from fleetlift.config import join_address, split_address, write_private
    from fleetlift.edge.relay import Relay
    from fleetlift.edge.relay_admin import own_token, serving_admin
    from fleetlift.levers.relay import RUN_FILE, RelayRun
    from fleetlift.supervise import locked_directory

    log.configure(level=log_level, role="relay")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each device is two
    forwarder = Relay(
        data,
        listen=split_address(listen),
        old=split_address(old),
        new=split_address(new),
        proxy_old=proxy_old,
        proxy_new=proxy_new,
        connections_max=min(connections_max, max(1, hard // 2 - 100)),
    )

    async def run() -> None:
        stop = asyncio.Event()
        for name in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(name, stop.set)
        async with (
            locked_directory(data),
            forwarder.serving(),
            serving_admin(forwarder, admin, own_token(data)) as url,
        ):
            shown = join_address(*forwarder.address)
            note = RelayRun(listen=shown, admin=url, pid=os.getpid())
            write_private(data / RUN_FILE, msgspec.json.encode(note).decode() + "\n")
            typer.echo(f"relay ready on {shown}")
            await stop.wait()

    uvloop.run(run())


@app.command()
def status(data: Data = DEFAULT_DATA, as_json: Json = False) -> None:
    """Connections to both sides, and what was counted."""
    from fleetlift.cli.screen import emit_json

    found = _ask(data, lambda control: control.status())
    values = _plain(found)
    if as_json:
        emit_json(values)
        return
    release = values.pop("release")
    for name, value in {**values, **{f"release {key}": one for key, one in release.items()}}.items():
        typer.echo(f"{name.replace('_', ' '):20} {value}")


@app.command()
def stragglers(
    data: Data = DEFAULT_DATA,
    since: Annotated[
        str, typer.Option(help="Only who came within this time, as 2h or 14d.", show_default=False)
    ] = "",
    as_json: Json = False,
) -> None:
    """Who still comes to the old address, and why in all likelihood."""
    import time

    from fleetlift.cli.screen import listing, when
    from fleetlift.core.units import parse_duration

    from_ = time.time() - parse_duration(since) if since else 0.0
    found = _ask(data, lambda control: control.stragglers(since=from_))
    listing(
        [_plain(one) for one in found],
        [
            ("Client", lambda one: one["client"]),
            ("From", lambda one: one["peer"]),
            ("First seen", lambda one: when(one["first_seen"])),
            ("Last seen", lambda one: when(one["last_seen"])),
            ("Connections", lambda one: f"{one['connections']:,}"),
            ("Open", lambda one: one["open_old"] + one["open_new"]),
            ("To", lambda one: one["side"]),
            ("Why", lambda one: one["reason"]),
        ],
        as_json=as_json,
        empty="Nobody has come to the old address.",
        more=False,
    )


@app.command()
def release(
    rate: Annotated[str, typer.Option(help="At most so many a second, as 5/s.")] = "10/s",
    data: Data = DEFAULT_DATA,
    everything: Annotated[
        bool, typer.Option("--everything", help="Also those that the routes keep on the old side.")
    ] = False,
    stop: Annotated[bool, typer.Option("--stop", help="Stop letting go.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Return when the last one is gone.")] = False,
    as_json: Json = False,
) -> None:
    """Let connections to the old side go gently, so that devices connect anew and are led to the new side."""
    from fleetlift.cli.screen import emit_json, say

    per_s = _rate(rate)

    async def work(control: Any) -> Any:
        if stop:
            return await control.stop_release()
        now = await control.release(per_s, everything=everything)
        while wait and now.running:
            await asyncio.sleep(0.2)
            now = await control.release_status()
        return now

    found = _ask(data, work)
    if as_json:
        emit_json(_plain(found))
        return
    text = f"{found.closed} let go, {found.left} left"
    say(
        "running" if found.running else "done",
        f"{text}, at most {per_s:g} a second." if found.running else f"{text}.",
    )
    if found.others and not everything:
        say("held", f"{found.others} stay on the old side, as the routes say; --everything lets them go too.")


@app.command()
def route(
    data: Data = DEFAULT_DATA,
    default: Annotated[
        To | None, typer.Option(help="Where clients without a rule go.", show_default=False)
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0, max=100, help="Per cent of the clients that go to the new side.", show_default=False
        ),
    ] = None,
    device: Annotated[
        list[str] | None, typer.Option("--device", help="CLIENT=old, CLIENT=new or CLIENT= to drop its rule.")
    ] = None,
    prefix: Annotated[
        list[str] | None, typer.Option("--prefix", help="The same for all clients whose id begins so.")
    ] = None,
    when_new_down: Annotated[
        WhenNewDown | None, typer.Option(help="What then becomes of connections.", show_default=False)
    ] = None,
) -> None:
    """Show the routing table, or change it at once for all connections to come."""
    from fleetlift.cli.screen import emit_json

    async def work(control: Any) -> Any:
        held = await control.routes()
        changes: dict[str, Any] = {
            "devices": _changed(held.devices, device or []),
            "prefixes": _changed(held.prefixes, prefix or []),
        }
        if default is not None:
            changes["default"] = default
        if share is not None:
            changes["share_percent"] = share
        if when_new_down is not None:
            changes["when_new_down"] = when_new_down
        return await control.change_routes(**changes)

    emit_json(_plain(_ask(data, work)))


def _changed(rules: Any, changes: list[str]) -> dict[str, To]:
    found = dict(rules)
    for text in changes:
        name, sign, side = text.rpartition("=")
        if not sign or not name or side not in ("", "old", "new"):
            raise BadInput(f"{text!r}: write NAME=old, NAME=new, or NAME= to drop the rule")
        found.pop(name, None)
        if side:
            found[name] = To(side)
    return found


def _rate(text: str) -> float:
    try:
        value = float(text.removesuffix("/s"))
    except ValueError:
        value = 0.0
    if not value > 0:
        raise BadInput(f"--rate {text!r}: write a number a second, as 5/s")
    return value


def _plain(value: Any) -> Any:
    import msgspec

    return msgspec.to_builtins(value)


def _ask(data: Path, call: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
    from fleetlift.levers.relay import RelayControl

    async def run() -> T:
        async with RelayControl.of(data) as control:
            return await call(control)

    return asyncio.run(run())
