"""What devices publish with QoS 0: it is in no log, and is seen only by who listens at that moment."""

import asyncio
from collections.abc import Callable, Sequence

from fleetlift.bus.wire import Wire, connect
from fleetlift.config import Settings
from fleetlift.core.errors import Unavailable
from fleetlift.log import get_logger

log = get_logger(__name__)

_RETRY_S = 0.5

# (subject, payload), from within the event loop: must be quick and must not raise
OnLive = Callable[[str, bytes], None]


async def listen(settings: Settings, *, subjects: Sequence[str], name: str, deliver: OnLive) -> None:
    """Hand every QoS 0 message on `subjects` to `deliver`, until cancelled; a lost connection comes back.

    What devices publish with QoS 1 reaches a subscriber too; it is left out here, being read from the log.
    """

    def on_message(subject: bytes, reply: bytes, headers: bytes, payload: bytes) -> None:
        if b"Nmqtt-Pub:0" in headers or b"Nmqtt-Pub: 0" in headers:
            deliver(subject.decode(), payload)

    while True:
        wire: Wire | None = None
        try:
            wire = await connect(
                settings.nats_url,
                user=settings.nats_svc_user,
                password=settings.nats_svc_password,
                ca=settings.nats_ca,
                name=f"live {name}",
                on_message=on_message,
            )
            for number, subject in enumerate(subjects, 1):
                wire.send(b"SUB %s %d\r\n" % (subject.encode(), number))
            log.debug("live_listener_lost", listener=name, reason=await wire.closed)
        except Unavailable as problem:
            log.debug("live_listener_waits", listener=name, reason=str(problem))
        finally:
            if wire is not None:
                wire.close()
        await asyncio.sleep(_RETRY_S)
