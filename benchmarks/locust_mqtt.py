"""Locust's MQTT user in a process of its own, on one core: the peer of `load_vs_locust`.

Takes one JSON line (`Task`) on standard input, runs Locust as a library, and answers with one: `Did`.
"""

import os
import sys
import time
from typing import Any

import msgspec

WARM_S = 3.0  # until all are connected


class Task(msgspec.Struct, frozen=True, kw_only=True):
    """`window`: messages that each user sends before it waits; `selectors`: Locust's own way to wait."""

    host: str
    port: int
    users: int
    window: int
    seconds: float
    body: str
    selectors: bool


class Did(msgspec.Struct, frozen=True, kw_only=True):
    """`cpu`: of a core. Latencies are Locust's own: from the call to the PUBACK."""

    acknowledged: int
    failed: int
    seconds: float
    p50_s: float
    p99_s: float
    cpu: float

    @property
    def rate_s(self) -> float:
        return self.acknowledged / self.seconds


def play(given: Task) -> Did:
    """Only here is Locust loaded: it makes sockets and threads cooperative for the whole process."""
    from locust import constant, task  # noqa: I001 - before gevent and paho
    from locust.contrib.mqtt import MqttUser
    from locust.env import Environment

    import gevent  # type: ignore[import-untyped]

    body = given.body.encode()

    class Device(MqttUser):  # type: ignore[misc]
        host = given.host
        port = given.port
        wait_time = constant(0)
        use_loop_selectors = given.selectors

        def on_start(self) -> None:
            while not self.client.is_connected():
                gevent.sleep(0.01)
            self.topic = f"dt/{self.client.client_id}/status"

        @task  # type: ignore[untyped-decorator]
        def publish(self) -> None:
            for _ in range(given.window):
                info = self.client.publish(self.topic, body, qos=1)
            info.wait_for_publish()  # without turning in a loop, which would cost it more

    environment: Any = Environment(user_classes=[Device])
    environment.create_local_runner().start(given.users, spawn_rate=given.users)
    gevent.sleep(WARM_S)
    environment.stats.reset_all()
    cpu, began = time.process_time(), time.monotonic()
    gevent.sleep(given.seconds)
    took_s, used_s = time.monotonic() - began, time.process_time() - cpu
    published = [e for (name, _), e in environment.stats.entries.items() if name.startswith("publish")]
    total = environment.stats.total
    return Did(
        acknowledged=sum(e.num_requests - e.num_failures for e in published),
        failed=sum(e.num_failures for e in published),
        seconds=took_s,
        p50_s=(total.get_response_time_percentile(0.5) or 0) / 1000,
        p99_s=(total.get_response_time_percentile(0.99) or 0) / 1000,
        cpu=used_s / took_s,
    )


def main() -> None:
    given = msgspec.json.decode(sys.stdin.readline(), type=Task)
    sys.stdout.write(msgspec.json.encode(play(given)).decode() + "\n")
    sys.stdout.flush()
    os._exit(0)  # its users would say goodbye one by one


if __name__ == "__main__":
    main()
