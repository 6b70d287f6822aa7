"""`fleetlift capture` and `fleetlift replay`: record real traffic, and play it against another side."""

import asyncio
import os
import re
import signal
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import msgspec
import typer

from fleetlift import log
from fleetlift.core.errors import BadInput
from fleetlift.core.units import format_count, parse_duration, parse_share

if TYPE_CHECKING:
    from fleetlift.core.capture import Manifest
    from fleetlift.load.capture import Progress
    from fleetlift.load.replay import Api, Outcome, Replay

T = TypeVar("T")

REFRESH_S = 0.5
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
Json = Annotated[bool, typer.Option("--json", help="Print the account as JSON, for programs.")]


def capture(
    to: Annotated[Path, typer.Option("--to", metavar="DIR", help="A new directory for the capture.")],
    share: Annotated[
        str, typer.Option(metavar="PERCENT", help="Of so many devices, as in 5%: the same ones each time.")
    ] = "100%",
    devices: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Only these devices, an id a line.")
    ] = None,
    tenant: Annotated[str | None, typer.Option(help="Only this tenant's devices.")] = None,
    feed: Annotated[
        str, typer.Option(metavar="SIDE", help="What this other side's feed brings, as legacy.")
    ] = "",
    time_for: Annotated[str, typer.Option("--for", help="How long, as in 10m, 2h.")] = "10m",
    max_bytes: Annotated[str, typer.Option("--max-bytes", help="Stop at so much on disk.")] = "10GiB",
    rules: Annotated[
        Path | None,
        typer.Option("--mask", metavar="FILE", help="More masking rules (YAML), beside the defaults."),
    ] = None,
    pseudonyms: Annotated[
        Path | None,
        typer.Option(
            metavar="KEYFILE", help="Give devices other names, by a key in this file; made if missing."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a capture that was killed or interrupted.")
    ] = False,
    recover: Annotated[
        bool, typer.Option("--recover", help="Close a capture that was killed, and record nothing.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Read a capture whole, balance its account, record nothing.")
    ] = False,
    data: Annotated[
        Path, typer.Option("--data", metavar="DIR", help="Data directory of the running backend.")
    ] = Path("fleetlift-data"),
    log_level: LogLevel = "warning",
    as_json: Json = False,
) -> None:
    """Record real device traffic of the backend that runs on this machine, with a proof that it is complete.

    Secrets are masked. Ctrl-C ends it early, with what there is. Exit status 1 when the capture is not proven
    complete; docs/capture.md tells what is recorded, what is not, and the format.
    """
    from fleetlift.core.capture import shortfalls
    from fleetlift.load import capture_file

    log.configure(level=log_level)
    if recover:
        manifest = capture_file.recover(to).manifest
    elif check:
        manifest = capture_file.read_manifest(to)
        for _ in capture_file.read_capture(to):
            pass
    else:
        manifest = _record(
            to=to,
            share=share,
            devices=devices,
            tenant=tenant,
            feed=feed,
            for_s=parse_duration(time_for),
            max_bytes=parse_bytes(max_bytes),
            rules=rules,
            pseudonyms=pseudonyms,
            resume=resume,
            data=data,
            quiet=as_json,
        )
    missing = shortfalls(manifest)
    _tell_capture(to, manifest, missing, as_json)
    if missing:
        raise typer.Exit(1)


def _record(
    *,
    to: Path,
    share: str,
    devices: Path | None,
    tenant: str | None,
    feed: str,
    for_s: float,
    max_bytes: int,
    rules: Path | None,
    pseudonyms: Path | None,
    resume: bool,
    data: Path,
    quiet: bool,
) -> "Manifest":
    from fleetlift.config import load_run, own_key
    from fleetlift.load.capture import Options, Progress, Selection
    from fleetlift.load.capture import capture as record

    percent = parse_share(share).percent if share.strip().endswith("%") else None
    if percent is None:
        raise BadInput(f"--share {share!r}: a share of devices is written in per cent, as in 5%")
    if pseudonyms is not None and to.resolve() in pseudonyms.resolve().parents:
        raise BadInput(f"--pseudonyms {pseudonyms}: keep the key outside of the capture, which is handed on")
    options = Options(
        to=to,
        for_s=for_s,
        selection=Selection(
            percent=percent, devices=None if devices is None else read_ids(devices), tenant=tenant, feed=feed
        ),
        max_bytes=max_bytes,
        rules=read_rules(rules),
        key=None if pseudonyms is None else own_key(pseudonyms),
        resume=resume,
    )
    settings = load_run(data)
    progress = Progress()

    async def run() -> "Manifest":
        stop = stopping()
        return await _shown(
            record(settings, options, stop=stop, progress=progress), lambda: _capturing(progress), quiet
        )

    return asyncio.run(run())


def read_ids(path: Path) -> frozenset[str]:
    """The device ids of a file, one a line; empty lines and `#` lines do not count."""
    lines = (line.strip() for line in _text(path).splitlines())
    found = frozenset(line for line in lines if line and not line.startswith("#"))
    if not found:
        raise BadInput(f"{path} names no device")
    return found


def read_rules(path: Path | None) -> Any:
    import yaml

    from fleetlift.core.masking import Rules

    if path is None:
        return Rules()
    try:
        return msgspec.convert(yaml.safe_load(_text(path)) or {}, Rules)
    except (yaml.YAMLError, msgspec.ValidationError) as problem:
        raise BadInput(f"{path}: {problem}") from None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as problem:
        raise BadInput(f"{path}: {getattr(problem, 'strerror', None) or problem}") from None


def replay(
    capture: Annotated[Path, typer.Argument(help="The capture's directory.")],
    to: Annotated[str, typer.Option("--to", metavar="URL", help="mqtt://HOST:PORT or mqtts://HOST:PORT.")],
    speed: Annotated[
        str, typer.Option(help="1x is its own rhythm, 2x twice as fast, as-fast as the side acknowledges.")
    ] = "1x",
    devices_map: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Identities (JSON): {"car-1": "replay-x"}; default replay-car-1.'),
    ] = None,
    credentials: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help='Their passwords (JSON lines): {"device": …, "password": …}.'),
    ] = None,
    provision: Annotated[
        bool, typer.Option("--provision", help="Make the identities by the side's API, and their passwords.")
    ] = False,
    tenant: Annotated[str, typer.Option(help="Of the identities: replay, or replay-….")] = "replay",
    no_registry: Annotated[
        bool,
        typer.Option("--no-registry", help="The side is a broker without Fleetlift's API: ask nobody."),
    ] = False,
    ca: Annotated[Path | None, typer.Option(help="CA certificate (PEM) that mqtts:// is checked by.")] = None,
    state: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Position and made passwords. Default: CAPTURE.replay beside it."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Begin again instead of going on.")] = False,
    give_up: Annotated[
        str, typer.Option("--give-up", help="How long nobody may answer before it stops.")
    ] = "60s",
    data: Annotated[
        Path | None,
        typer.Option(
            "--data", help="Data directory of the side, if local; its admin.env says where to call."
        ),
    ] = None,
    log_level: LogLevel = "warning",
    as_json: Json = False,
) -> None:
    """Play a capture against another side, in its own rhythm or faster, in order per device.

    Everything comes from identities of the replay, in a tenant of their own; commands go out as dry runs,
    marked. A side whose devices might be real is refused before anything is sent. Ctrl-C stops it, the same
    command goes on. Exit status 1 unless every message was acknowledged.
    """
    from fleetlift.load.replay import Options, Replay, read_credentials

    log.configure(level=log_level)
    scheme, _, address = to.partition("://")
    if scheme not in ("mqtt", "mqtts"):
        raise BadInput(f"--to {to}: expected mqtt://HOST:PORT or mqtts://HOST:PORT")
    from fleetlift.config import split_address

    host, port = split_address(address)
    options = Options(
        capture=capture,
        host=host,
        port=port,
        tls=scheme == "mqtts",
        ca=str(ca) if ca else "",
        speed=parse_speed(speed),
        state=state or capture.with_name(capture.resolve().name + ".replay"),
        names={} if devices_map is None else _names(devices_map),
        credentials={} if credentials is None else read_credentials(credentials),
        api=None if no_registry else _api(data),
        unchecked=no_registry,
        provision=provision,
        tenant=tenant,
        give_up_s=parse_duration(give_up),
        again=again,
    )

    async def run() -> "Outcome":
        playing = Replay(options, stop=stopping())
        return await _shown(playing.run(), lambda: _replaying(playing), as_json)

    outcome = asyncio.run(run())
    _tell_replay(outcome, as_json)
    if not outcome.finished or outcome.refused or outcome.failed:
        raise typer.Exit(1)


def parse_bytes(text: str) -> int:
    """`10GiB`, `500MB`, `1000000` as bytes. Raises BadInput."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]i?B|B)?", text.strip())
    if match is None:
        raise BadInput(f"{text!r}: write a size such as 500MB or 10GiB")
    unit = match[2] or "B"
    power = " KMGT".index(unit[0]) if unit != "B" else 0
    size = int(float(match[1]) * (1024 if "i" in unit else 1000) ** power)
    if size < 1_000_000:
        raise BadInput(f"{text!r}: give at least 1MB")
    return size


def parse_speed(text: str) -> float:
    """`2x` is 2.0; `as-fast` is 0. Raises BadInput."""
    if text == "as-fast":
        return 0.0
    try:
        speed = float(text.removesuffix("x"))
    except ValueError:
        speed = -1.0
    if not 0.001 <= speed <= 100_000:
        raise BadInput(f"--speed {text!r}: write 1x, 0.5x, 10x or as-fast")
    return speed


def _names(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(_text(path), type=dict[str, str])
    except msgspec.MsgspecError as problem:
        raise BadInput(
            f'{path}: expected a JSON object such as {{"car-1": "replay-x"}} ({problem})'
        ) from None


def _api(data: Path | None) -> "Api | None":
    """Who says whose the side's devices are; None: nobody is named."""
    from fleetlift.cli.client import DEFAULT_DATA, read_env
    from fleetlift.load.replay import Api

    path = (data or DEFAULT_DATA) / "admin.env"
    values: Mapping[str, str]
    if data is None and os.environ.get("FLEETLIFT_URL"):
        values = os.environ
    else:
        if not path.is_file():
            if data is not None:
                raise BadInput(f"--data {data}: there is no admin.env in it")
            return None
        values = read_env(path)
    return Api(values["FLEETLIFT_URL"], values.get("FLEETLIFT_TOKEN", ""), values.get("FLEETLIFT_CA", ""))


# -- on screen ------------------------------------------------------------------------------------------


def stopping() -> asyncio.Event:
    """Set by Ctrl-C and SIGTERM."""
    stop = asyncio.Event()
    for name in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(name, stop.set)
    return stop


async def _shown(work: Coroutine[Any, Any, T], line: Any, quiet: bool) -> T:
    """The result of `work`; meanwhile how it stands, on a terminal."""
    from rich.live import Live
    from rich.text import Text

    from fleetlift.cli import screen

    task = asyncio.ensure_future(work)
    console = screen.err()
    try:
        if quiet or not console.is_terminal:
            return await task
        with Live(console=console, auto_refresh=False, transient=True) as live:
            while not task.done():
                live.update(Text(line()), refresh=True)
                await asyncio.wait([task], timeout=REFRESH_S)
        return await task
    finally:
        task.cancel()


class _Rate:
    """Messages a second over the last few looks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def __call__(self, now: float, count: int) -> float:
        self._seen = [*self._seen[-10:], (now, count)]
        (since, before), (until, after) = self._seen[0], self._seen[-1]
        return (after - before) / (until - since) if until > since else 0.0


_rate = _Rate()


def _capturing(progress: "Progress") -> str:
    import time

    from fleetlift.cli.screen import span

    left = span(max(0.0, progress.until_s - time.time())) if progress.until_s else "?"
    behind = f"   {format_count(progress.behind)} behind" if progress.behind else ""
    return (
        f"{progress.doing}   {format_count(progress.messages)} messages   "
        f"{_size(progress.payload_bytes)}, {_size(progress.stored_bytes)} on disk   "
        f"{_rate(time.monotonic(), progress.messages):,.0f}/s   {left} left{behind}"
    )


def _replaying(playing: "Replay") -> str:
    import time

    from fleetlift.cli.screen import span

    tally = playing.ends.tally
    done = tally.total - tally.open
    rate = _rate(time.monotonic(), done)
    left = span(tally.open / rate) if rate else "?"
    trouble = f"   {tally.refused} refused, {tally.failed} failed" if tally.refused or tally.failed else ""
    return (
        f"{playing.doing}   {format_count(done)} of {format_count(tally.total)} messages   "
        f"{format_count(playing.ends.waiting)} on their way   {rate:,.0f}/s   {left} left{trouble}"
    )


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:,.0f} {unit}" if unit == "B" else f"{count:,.1f} {unit}"
        count /= 1024
    raise AssertionError


def _tell_capture(to: Path, manifest: "Manifest", missing: list[str], as_json: bool) -> None:
    from fleetlift.cli.screen import details, emit_json, fail, say, span

    if as_json:
        shown = msgspec.to_builtins(manifest)
        shown["devices"] = len(manifest.devices)
        shown["segments"] = len(manifest.segments)
        emit_json({**shown, "complete": not missing, "missing": missing})
        return
    up = sum(up for up, _ in manifest.devices.values())
    down = sum(down for _, down in manifest.devices.values())
    lasted_s = (manifest.last_at_s or 0) - (manifest.first_at_s or 0)
    details(
        [
            ("Capture", str(to)),
            ("Messages", f"{format_count(up)} up, {format_count(down)} down, over {span(lasted_s)}"),
            ("Devices", format_count(len(manifest.devices))),
            ("Size", f"{_size(manifest.payload_bytes)}, {_size(manifest.stored_bytes)} on disk"),
            ("Offered", format_count(manifest.offered)),
            ("Captured", format_count(manifest.captured)),
            ("Secrets masked", format_count(manifest.masked)),
            *(
                [("Resumed", "once" if manifest.resumed == 1 else f"{manifest.resumed} times")]
                if manifest.resumed
                else []
            ),
        ]
    )
    if missing:
        fail("it is not proven complete: " + "; ".join(missing[:5]) + (" …" if len(missing) > 5 else ""))
    else:
        say("done", "Complete: everything that was offered was captured.")


def _tell_replay(outcome: "Outcome", as_json: bool) -> None:
    from fleetlift.cli.screen import details, emit_json, fail, say, span

    if as_json:
        emit_json(msgspec.to_builtins(outcome))
        return
    details(
        [
            ("Messages", format_count(outcome.total)),
            ("Played", f"{format_count(outcome.played)}, {format_count(outcome.again)} of them again"),
            ("Acknowledged", format_count(outcome.acknowledged)),
            ("Refused", format_count(outcome.refused)),
            ("Failed", format_count(outcome.failed)),
            ("Left out", format_count(outcome.left_out)),
            ("Took", span(outcome.took_s)),
            ("Acknowledged after", f"{outcome.ack_p50_s:.3f} s, 99%: {outcome.ack_p99_s:.3f} s"),
            *([("Held back", f"{outcome.held_s:.1f} s, for want of memory")] if outcome.held_s else []),
        ]
    )
    for reason, count in sorted(outcome.reasons.items(), key=lambda one: -one[1])[:10]:
        say("note", f"{format_count(count)}: {reason}")
    if not outcome.finished:
        fail(
            f"{format_count(outcome.open)} messages are still to be played ({outcome.reason})",
            "The same command goes on.",
        )
    elif outcome.refused or outcome.failed:
        fail("not every message was acknowledged")
    else:
        say("done", "Everything that is for replay was played and acknowledged.")
