"""`fleetlift telemetry`: what devices sent."""

from typing import Annotated

import typer

from fleetlift.cli.client import Data, Json, Limit, connect, segment

app = typer.Typer(help="What devices sent.", no_args_is_help=True)

Moment = Annotated[str | None, typer.Option(help="RFC 3339, as in 2026-01-31T12:00:00Z.", show_default=False)]


@app.command("list")
def list_(
    device: Annotated[str, typer.Argument(help="The device.")],
    channel: Annotated[
        str | None, typer.Option("--channel", help="Only this channel.", show_default=False)
    ] = None,
    since: Moment = None,
    until: Moment = None,
    newest: Annotated[bool, typer.Option("--newest", help="Newest first.")] = False,
    limit: Limit = 100,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List stored messages, oldest first."""
    from fleetlift.cli.screen import compact, listing, when

    with connect(data) as api:
        items, more = api.items(
            f"/devices/{segment(device)}/telemetry",
            limit,
            channel=channel,
            since=since,
            until=until,
            order="newest" if newest else "oldest",
        )
    listing(
        items,
        [
            ("At", lambda m: when(m["ts"])),
            ("Channel", lambda m: m["channel"]),
            ("Seq", lambda m: "" if m["seq"] is None else str(m["seq"])),
            ("Path", lambda m: m["path"]),
            ("Message", lambda m: compact(m["body"], 100)),
        ],
        as_json=as_json,
        empty="No message is stored.",
        more=more,
    )


@app.command()
def ledger(
    device: Annotated[str, typer.Argument(help="The device.")],
    data: Data = None,
    as_json: Json = False,
) -> None:
    """Show which messages came by which path, what is missing and what came twice, channel by channel."""
    from fleetlift.cli.screen import listing, when

    with connect(data) as api:
        items = api.get(f"/devices/{segment(device)}/ledger")["items"]
    listing(
        items,
        [
            ("Channel", lambda a: a["channel"]),
            ("Path", lambda a: a["path"]),
            ("Messages", lambda a: a["distinct"]),
            ("Missing", lambda a: a["missing"]),
            ("Doubles", lambda a: a["doubles"]),
            ("Numbers", lambda a: spans(a["ranges"], 3)),
            ("Gaps", lambda a: spans(a["gaps"], 3)),
            ("Last", lambda a: when(a["last_at"])),
        ],
        as_json=as_json,
        empty="Nothing has come from it.",
    )


def spans(ranges: list[list[int]], most: int) -> str:
    """Ranges of numbers in short: `1–5, 8, … 3 more`."""
    shown = [str(first) if first == last else f"{first}–{last}" for first, last in ranges[:most]]
    return ", ".join(shown) + (f", … {len(ranges) - most} more" if len(ranges) > most else "")


@app.command("dead-letters")
def dead_letters(
    device: Annotated[
        str | None, typer.Option("--device", help="Only of this device.", show_default=False)
    ] = None,
    limit: Limit = 100,
    data: Data = None,
    as_json: Json = False,
) -> None:
    """List messages that could not be stored, newest first, with the reason."""
    from fleetlift.cli.screen import listing, when

    with connect(data) as api:
        items, more = api.items("/dead-letters", limit, device=device)
    listing(
        items,
        [
            ("Received", lambda m: when(m["received_at"])),
            ("Device", lambda m: m["device"]),
            ("Topic", lambda m: m["topic"]),
            ("Bytes", lambda m: m["payload_bytes"]),
            ("Reason", lambda m: m["reason"]),
        ],
        as_json=as_json,
        empty="Every message could be stored.",
        more=more,
    )
