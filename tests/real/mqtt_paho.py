"""A publisher by paho-mqtt, which knows nothing of this project: it counts what was acknowledged."""

import threading
from typing import Any

import paho.mqtt.client as mqtt


class PahoDevice:
    """Connects as a device and publishes with QoS 1, at most 65,535 messages (packet ids are not reused)."""

    def __init__(self, device: str, password: str, address: tuple[str, int]) -> None:
        self.device = device
        self.refused: list[str] = []
        self.connected = threading.Event()
        self._sent: dict[int, bytes] = {}
        self._acknowledged: list[int] = []  # packet ids; a PUBACK may be seen before `publish` has returned
        self._client = mqtt.Client(
            mqtt.CallbackAPIVersion.VERSION2, client_id=device, clean_session=False, protocol=mqtt.MQTTv311
        )
        self._client.username_pw_set(device, password)
        self._client.reconnect_delay_set(1, 1)
        self._client.on_connect = self._on_connect
        self._client.on_publish = self._on_publish
        self._client.connect_async(*address, keepalive=30)
        self._client.loop_start()

    def _on_connect(self, client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        if reason.is_failure:
            self.refused.append(str(reason))
        else:
            self.connected.set()

    def _on_publish(self, client: Any, data: Any, mid: int, reason: Any, properties: Any) -> None:
        self._acknowledged.append(mid)

    @property
    def acknowledged(self) -> set[bytes]:
        """The payloads that had a PUBACK."""
        return {self._sent[mid] for mid in list(self._acknowledged) if mid in self._sent}

    def publish(self, topic: str, payload: bytes) -> None:
        self._sent[self._client.publish(topic, payload, qos=1).mid] = payload

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
