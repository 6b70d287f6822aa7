"""What a device may do on the bus, and the signed paper that says so to NATS Server.

Source: NATS ADR-26 (authorization callouts), NATS JWT claims version 2.
"""

import base64
import hashlib
import re
import time
from typing import Any

import msgspec
import nkeys

from fleetlift.core.identity import DEVICE_ID

_CLIENT_SUFFIX = re.compile(r"[a-zA-Z0-9:_/-]{1,128}")


def device_of(username: str) -> str | None:
    """The device id in an MQTT user name, which AWS's SDKs follow with `?` and figures of their own."""
    name = username.partition("?")[0]
    return name if DEVICE_ID.fullmatch(name) else None


def client_id_fits(device: str, client_id: str) -> bool:
    """A device calls itself by its id, or by its id, `/` and a suffix for further connections."""
    name, slash, suffix = client_id.partition("/")
    return name == device and (not slash or _CLIENT_SUFFIX.fullmatch(suffix) is not None)


def publish_subjects(device: str) -> list[str]:
    """Subjects a device may publish to: its telemetry, requests to its shadows, answers to its commands."""
    shadow = f"$aws.things.{device}.shadow"
    return [
        f"dt.{device}",
        f"dt.{device}.>",
        *(f"{shadow}.{verb}" for verb in ("get", "update", "delete")),
        *(f"{shadow}.name.*.{verb}" for verb in ("get", "update", "delete")),
        f"$aws.commands.things.{device}.executions.*.response.json",
    ]


def subscribe_subjects(device: str) -> list[str]:
    """Subjects a device may subscribe to: its shadows' answers, its commands, what became of its replies."""
    commands = f"$aws.commands.things.{device}.executions.*"
    return [
        f"$aws.things.{device}.shadow",  # an MQTT filter x/# also selects x
        f"$aws.things.{device}.shadow.>",
        f"{commands}.request.json",
        f"{commands}.response.accepted.json",
        f"{commands}.response.rejected.json",
        "$MQTT.sub.>",  # where the server hands over what waited for the device; MQTT cannot name it
    ]


class Signer:
    """Signs permits with the account key that the server was told to trust."""

    def __init__(self, seed: str, account: str) -> None:
        self._key = nkeys.from_seed(seed.encode())
        self._issuer: str = self._key.public_key.decode()
        self._account = account
        self._header = _base64(msgspec.json.encode({"typ": "JWT", "alg": "ed25519-nkey"}))

    def permit(self, device: str, *, user_nkey: str, server_id: str) -> bytes:
        """The answer that lets a device in, with exactly its own topics."""
        user = self._jwt(
            {
                "sub": user_nkey,
                "aud": self._account,
                "name": device,
                "nats": {
                    "pub": {"allow": publish_subjects(device)},
                    "sub": {"allow": subscribe_subjects(device)},
                    "subs": -1,
                    "data": -1,
                    "payload": -1,
                    # A device's secret opens the MQTT listener and nothing else.
                    "allowed_connection_types": ["MQTT", "MQTT_WS"],
                    "type": "user",
                    "version": 2,
                },
            }
        )
        return self._answer({"jwt": user.decode()}, user_nkey, server_id)

    def refusal(self, reason: str, *, user_nkey: str, server_id: str) -> bytes:
        """The answer that keeps a device out. The reason reaches the server's log, never the device."""
        return self._answer({"error": reason}, user_nkey, server_id)

    def _answer(self, content: dict[str, Any], user_nkey: str, server_id: str) -> bytes:
        return self._jwt(
            {
                "sub": user_nkey,
                "aud": server_id,
                "nats": {**content, "type": "authorization_response", "version": 2},
            }
        )

    def _jwt(self, claims: dict[str, Any]) -> bytes:
        claims = {"iss": self._issuer, "iat": int(time.time()), **claims}
        claims["jti"] = (
            base64.b32encode(hashlib.sha256(msgspec.json.encode(claims)).digest()).decode().rstrip("=")
        )
        signed = self._header + b"." + _base64(msgspec.json.encode(claims))
        signature: bytes = self._key.sign(signed)
        return signed + b"." + _base64(signature)


class _ClientInfo(msgspec.Struct):
    type: str = ""
    mqtt_id: str = ""
    host: str = ""


class _ConnectOptions(msgspec.Struct):
    user: str = ""
    pass_: str = msgspec.field(default="", name="pass")


class _ServerId(msgspec.Struct):
    id: str = ""


class SignInRequest(msgspec.Struct):
    """What the server asks of the callout: who wants in, and how it proves that."""

    server_id: _ServerId
    user_nkey: str
    client_info: _ClientInfo = msgspec.field(default_factory=_ClientInfo)
    connect_opts: _ConnectOptions = msgspec.field(default_factory=_ConnectOptions)


class _RequestClaims(msgspec.Struct):
    nats: SignInRequest


def read_request(token: bytes) -> SignInRequest:
    """The request in the server's JWT. Raises ValueError.

    Its signature is not checked: only the server can publish where it came from.
    """
    parts = token.split(b".")
    if len(parts) != 3:
        raise ValueError("not a JWT")
    body = base64.urlsafe_b64decode(parts[1] + b"=" * (-len(parts[1]) % 4))
    try:
        return msgspec.json.decode(body, type=_RequestClaims).nats
    except msgspec.MsgspecError as problem:
        raise ValueError(str(problem)) from None


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")
