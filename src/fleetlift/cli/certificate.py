"""`fleetlift migrate certificate` writes one, `fleetlift certificate` verifies it and shows the signing key.

Exit status of `verify`: 0 it holds, 1 it does not, 2 wrong use.
"""

import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from fleetlift.cli.client import DEFAULT_DATA, Data, Json, connect
from fleetlift.cli.migrate import Name, path_of, the_one

if TYPE_CHECKING:
    from fleetlift.core.verification import Verification

app = typer.Typer(
    help="Certificates of migrations: verify one, show the key that this instance signs with.",
    no_args_is_help=True,
)

of_migration = typer.Typer(help="Move a live fleet from one backend to another.")

BYTES_MAX = 2 * 1024**3


@of_migration.command("certificate")
def write(
    name: Name = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Where to write it.", show_default="NAME-certificate.json"),
    ] = None,
    so_far: Annotated[
        bool, typer.Option("--so-far", help="Also while the migration is not over; the file says so.")
    ] = False,
    data: Data = None,
) -> None:
    """Write the certificate: one signed file with the evidence of every decision. 'fleetlift certificate
    verify' checks it, on any machine."""
    from fleetlift.cli.screen import say

    with connect(data) as api:
        chosen = the_one(api, name)
        text = api.text(path_of(chosen, "/certificate"), so_far=so_far or None)
    target = output or Path(f"{chosen}-certificate.json")
    if str(target) == "-":
        sys.stdout.write(text)
        return
    target.write_bytes(text.encode())
    say("done", f"{target} ({-(-len(text) // 1024)} KiB); check it with 'fleetlift certificate verify'.")


@app.command()
def verify(
    file: Annotated[
        Path, typer.Argument(help="The certificate.", exists=True, dir_okay=False, readable=True)
    ],
    key: Annotated[
        str | None,
        typer.Option(
            "--key",
            help="The public key of who must have issued it: 'ed25519:…', or a file that holds it.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a certificate without server, database or network: that no byte was changed, and that every
    verdict follows from the figures in it. With --key also who issued it."""
    from fleetlift.cli.screen import emit_json
    from fleetlift.core.errors import BadInput
    from fleetlift.migrate.certificate import checked_key, verify_certificate

    if file.stat().st_size > BYTES_MAX:
        raise BadInput(f"{file} is larger than any certificate ({BYTES_MAX:,} bytes)")
    trusted = None
    if key is not None:
        try:
            trusted = checked_key(Path(key).read_text() if Path(key).is_file() else key)
        except (BadInput, UnicodeDecodeError) as error:
            raise typer.BadParameter(str(error), param_hint="--key") from None
    found = verify_certificate(file.read_bytes(), trusted_key=trusted)
    if as_json:
        emit_json(msgspec.to_builtins(found))
    else:
        show(found)
    raise typer.Exit(0 if found.ok else 1)


@app.command("key")
def show_key(
    data: Annotated[
        Path, typer.Option("--data", help="Data directory of the server, on this machine.")
    ] = DEFAULT_DATA,
    as_json: Json = False,
) -> None:
    """The public key that this instance signs certificates with. Hand it to auditors by a way they trust."""
    from fleetlift.cli.screen import emit_json
    from fleetlift.core.errors import Unavailable
    from fleetlift.migrate.certificate import public_text, signing_key

    if not (data / "admin.env").is_file():
        raise Unavailable(f"{data} is no server's data directory: name it with --data.")
    text = public_text(signing_key(data))
    if as_json:
        emit_json({"key": text})
    else:
        typer.echo(text)


def show(found: "Verification") -> None:
    """The checks as a table, what was wrong below each, and the result."""
    from rich.text import Text

    from fleetlift.cli.screen import details, note, out, signed

    console = out()
    if found.migration:
        over = found.phase + ("" if found.finished else ", not finished")
        stands = ", ".join(f"{count:,} {state}" for state, count in sorted(found.members.items()))
        details(
            [
                ("Migration", f"{found.migration} of tenant {found.tenant}: {over}"),
                ("From, to", f"{found.started_at} – {found.ended_at or ''}"),
                ("Issued", f"{found.issued_at} by Fleetlift {found.fleetlift}"),
                ("Devices", stands),
                ("Messages", f"{found.stored:,} stored, {found.missing:,} missing"),
                ("Commands", f"{found.commands:,}, executed twice {found.executed_twice:,}"),
            ]
        )
        console.print()
    for check in found.checks:
        line = signed("ok" if check.ok else "failed")
        line.pad_right(10 - line.cell_len)
        line.append(f"{check.name:<12}").append(check.detail, style="grey58")
        console.print(line, soft_wrap=True)
        for problem in check.problems:
            for part in textwrap.wrap(problem, max(console.width - 10, 40)):
                console.print(Text("          " + part, style="red"), soft_wrap=True)
    console.print()
    if not found.ok:
        console.print(signed("failed", "This certificate does not hold."))
        return
    console.print(signed("ok", "Every check has passed."))
    if not found.issuer_checked:
        note("Only its integrity was checked: with --key also that it is from whom it should be.")
