"""Which certificate a server shows for a name, and whether a device may believe it."""

import asyncio
import contextlib
import ssl

import msgspec


class Shown(msgspec.Struct, frozen=True, kw_only=True):
    """`expires_at` (Unix seconds) when the certificate is valid for the name; else `problem` says why not."""

    expires_at: float = 0.0
    problem: str = ""


async def certificate_of(
    name: str, host: str, port: int, *, ca_file: str = "", timeout_s: float = 10.0
) -> Shown:
    """Connect to `host` as a device does that asked DNS for `name`. `ca_file`: whom it trusts; empty: the
    system's store."""
    try:
        context = ssl.create_default_context(cafile=ca_file or None)
    except OSError as error:
        return Shown(problem=f"the authority's file {ca_file} cannot be read ({error.strerror or error})")
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context, server_hostname=name)
    except ssl.SSLCertVerificationError as error:
        return Shown(problem=f"its certificate is refused for {name}: {error.verify_message}")
    except ssl.SSLError as error:
        return Shown(problem=f"no TLS with it ({error.reason or error})")
    except TimeoutError:
        return Shown(problem=f"no answer within {timeout_s:g} s")
    except OSError as error:
        return Shown(problem=f"cannot be reached ({(error.strerror or str(error)).lower()})")
    try:
        shown = writer.get_extra_info("peercert")
        return Shown(expires_at=float(ssl.cert_time_to_seconds(shown["notAfter"])))
    finally:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
