"""`fleetlift dns`: what servers answer for the names that devices come by, and what stands against a move."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Annotated, Any

import typer

from fleetlift.core.errors import BadInput

app = typer.Typer(
    help="Names that devices come by: what servers answer, and what stands against a move.",
    no_args_is_help=True,
)

Names = Annotated[list[str], typer.Argument(help="Names such as iot.example.com.", metavar="NAME...")]
Kind = Annotated[str, typer.Option("--type", help="A, AAAA or CNAME.")]
Zone = Annotated[str, typer.Option("--zone", help="The zone that holds the names.", show_default=False)]
Primary = Annotated[
    str, typer.Option("--primary", help="HOST:PORT of the server that takes updates.", show_default=False)
]
Servers = Annotated[
    list[str] | None,
    typer.Option("--server", help="HOST:PORT of another authoritative server; may be repeated."),
]
KeySource = Annotated[
    str,
    typer.Option("--key", help="Where the TSIG key is: env:VARIABLE, or a file that only you may read."),
]
Route53Zone = Annotated[
    str, typer.Option("--route53", help="Id of a hosted zone of Route 53 instead.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


@app.command()
def show(
    names: Names,
    kind: Kind = "A",
    zone: Zone = "",
    primary: Primary = "",
    server: Servers = None,
    route53: Route53Zone = "",
    as_json: Json = False,
) -> None:
    """What each authoritative server answers for the names now."""
    from fleetlift.cli.screen import listing

    async def ask(provider: Any) -> list[dict[str, Any]]:
        from fleetlift.core.dns import checked_name

        rows = []
        for name in map(checked_name, names):
            for where, answer in (await provider.authoritative(name, _type(kind))).items():
                text = isinstance(answer, str)
                rows.append(
                    {
                        "name": name,
                        "server": where,
                        "type": kind,
                        "ttl_s": None if text else answer.ttl_s,
                        "values": [] if text else list(answer.values),
                        "weights": {} if text else {one.id: one.weight for one in answer.weights},
                        "problem": answer if text else "",
                    }
                )
        return rows

    listing(
        _with_provider(zone, primary, server, "", route53, ask),
        [
            ("Name", lambda one: one["name"]),
            ("Server", lambda one: one["server"]),
            ("TTL", lambda one: "" if one["ttl_s"] is None else f"{one['ttl_s']} s"),
            ("Answers", lambda one: one["problem"] or " ".join(one["values"])),
            ("Weights", lambda one: " ".join(f"{name}={n}" for name, n in one["weights"].items())),
        ],
        as_json=as_json,
        empty="No answer.",
        more=False,
    )


@app.command()
def check(
    names: Names,
    new: Annotated[list[str], typer.Option("--new", help="An address of the new side; may be repeated.")],
    old: Annotated[
        list[str] | None,
        typer.Option("--old", help="An address of the old side; default: what stands there."),
    ] = None,
    kind: Kind = "A",
    zone: Zone = "",
    primary: Primary = "",
    server: Servers = None,
    key: KeySource = "env:FLEETLIFT_DNS_KEY",
    route53: Route53Zone = "",
    tls_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Check both sides' certificates on this port.")
    ] = 0,
    ca: Annotated[str, typer.Option("--ca", help="PEM file of whom devices trust.", show_default=False)] = "",
    as_json: Json = False,
) -> None:
    """All that stands against moving the names to new addresses. Changes nothing.

    Exit status 1 when something does. The right to change is shown by writing what stands there already.
    """
    from fleetlift.cli.screen import emit_json, say

    async def ask(provider: Any) -> list[dict[str, str]]:
        from fleetlift.core.dns import DnsRecord
        from fleetlift.levers.dns import DnsLever

        records = [
            DnsRecord(name=name, type=_type(kind), new=tuple(new), old=tuple(old or ()), tls_port=tls_port)
            for name in names
        ]
        found = await DnsLever(provider, records, ca_file=ca).check()
        return [{"name": one.name, "text": one.text} for one in found]

    problems = _with_provider(zone, primary, server, key, route53, ask)
    if as_json:
        emit_json(problems)
    for one in [] if as_json else problems:
        say("failed", f"{one['name']}: {one['text']}")
    if problems:
        raise typer.Exit(1)
    if not as_json:
        say("ok", "Nothing stands against it.")


def _type(text: str) -> Any:
    from fleetlift.core.dns import RecordType

    try:
        return RecordType(text.upper())
    except ValueError:
        raise BadInput(f"--type {text}: give A, AAAA or CNAME") from None


def _with_provider(
    zone: str,
    primary: str,
    servers: list[str] | None,
    key: str,
    route53: str,
    call: Callable[[Any], Coroutine[Any, Any, Any]],
) -> Any:
    from fleetlift.levers.rfc2136 import Rfc2136, read_key
    from fleetlift.levers.route53 import Route53

    if bool(route53) == bool(zone):
        raise BadInput("give --zone and --primary for a server with dynamic updates, or --route53 for AWS")
    if zone and not primary:
        raise BadInput("give --primary, HOST:PORT of the server that takes updates of the zone")

    async def run() -> Any:
        provider = (
            Route53(route53, servers=servers or ())
            if route53
            else Rfc2136(zone, primary=primary, key=read_key(key) if key else None, servers=servers or ())
        )
        try:
            return await call(provider)
        finally:
            await provider.close()

    return asyncio.run(run())
