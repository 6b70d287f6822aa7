"""What people write first: one MQTT client, one INSERT a message. `ingest_vs_handwritten` compares with it.

Run as a program it takes `Where` as a JSON line on standard input and says `ready` once it has subscribed.
"""

import asyncio
import json
import sys
from datetime import UTC, datetime
from typing import Any

import asyncpg
import msgspec
import paho.mqtt.client as mqtt
import uvloop

TABLE = """
CREATE TABLE readings (
    id       bigserial PRIMARY KEY,
    device   text NOT NULL,
    channel  text NOT NULL,
    ts       timestamptz NOT NULL,
    seq      bigint NOT NULL,
    body     json NOT NULL
);
CREATE INDEX ON readings (device, ts);
"""
_INSERT = "INSERT INTO readings (device, channel, ts, seq, body) VALUES ($1, $2, $3, $4, $5)"


class Where(msgspec.Struct, frozen=True):
    """The broker, and the database."""

    host: str
    port: int
    database_url: str


def main() -> None:
    where = msgspec.json.decode(sys.stdin.readline(), type=Where)
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    connection = loop.run_until_complete(asyncpg.connect(where.database_url))

    def on_connect(client: Any, data: Any, flags: Any, reason: Any, properties: Any) -> None:
        client.subscribe("dt/#", qos=1)

    def on_subscribe(client: Any, data: Any, mid: Any, reasons: Any, properties: Any) -> None:
        print("ready", flush=True)

    def on_message(client: Any, data: Any, message: Any) -> None:
        # Acknowledged when this returns, so committed first: nothing is lost here either.
        _, device, channel = message.topic.split("/")
        reading = json.loads(message.payload)
        ts = datetime.fromtimestamp(reading["ts"], UTC)
        row = (device, channel, ts, reading["seq"], message.payload.decode())
        loop.run_until_complete(connection.execute(_INSERT, *row))

    client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2, client_id="consumer", clean_session=False)
    client.on_connect, client.on_subscribe, client.on_message = on_connect, on_subscribe, on_message
    client.connect(where.host, where.port, keepalive=60)
    client.loop_forever()


if __name__ == "__main__":
    main()
