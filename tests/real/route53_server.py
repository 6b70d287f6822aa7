"""A stand-in for AWS Route 53 that the real botocore talks to: the part of its XML API that the lever uses.

It is no Route 53: what it does follows the API's documentation (a batch is all or nothing, DELETE must name
exactly what stands, CREATE nothing that stands, simple and weighted records do not mix), not the service
itself.
"""

import contextlib
import threading
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

NAMESPACE = "https://route53.amazonaws.com/doc/2013-04-01/"

# One row: name, type, set identifier ("" for a simple record), weight, TTL, values.
Row = tuple[str, str, str, int | None, int, tuple[str, ...]]


class Refused(Exception):
    def __init__(self, status: int, code: str, text: str) -> None:
        super().__init__(text)
        self.status, self.code = status, code


class Route53Server:
    """`rows` are what stands in the only zone. Faults are attributes."""

    def __init__(self, zone: str, rows: list[Row]) -> None:
        self.zone, self.rows = zone, rows
        self.lose_answers = 0  # of so many changes, which are carried out
        self.refuse: Refused | None = None
        self.pending_polls = 1  # a change is INSYNC after so many questions
        self.batches: list[list[tuple[str, Row]]] = []
        self.changes: dict[str, int] = {}
        self._lock = threading.Lock()

    def change(self, body: bytes) -> str:
        root = ET.fromstring(body)
        batch: list[tuple[str, Row]] = []
        for change in root.iter(f"{{{NAMESPACE}}}Change"):
            batch.append((_text(change, "Action"), _row(change.find(f"{{{NAMESPACE}}}ResourceRecordSet"))))
        with self._lock:
            rows = list(self.rows)
            for action, row in batch:
                same = [one for one in rows if one[:3] == row[:3]]
                if action == "DELETE":
                    if row not in rows:
                        raise Refused(
                            400, "InvalidChangeBatch", f"Tried to delete {row[0]}, but it was not found"
                        )
                    rows.remove(row)
                elif same or any(one[:2] == row[:2] and bool(one[2]) != bool(row[2]) for one in rows):
                    raise Refused(
                        400, "InvalidChangeBatch", f"Tried to create {row[0]}, but it already exists"
                    )
                else:
                    rows.append(row)
            self.rows = rows
            self.batches.append(batch)
            name = f"C{len(self.changes) + 1}"
            self.changes[name] = self.pending_polls
        return name

    def status(self, name: str) -> str:
        with self._lock:
            left = self.changes[name]
            self.changes[name] = max(0, left - 1)
        return "PENDING" if left else "INSYNC"


def _text(element: ET.Element, name: str) -> str:
    found = element.find(f"{{{NAMESPACE}}}{name}")
    return "" if found is None or found.text is None else found.text


def _row(element: ET.Element | None) -> Row:
    assert element is not None
    values = tuple(one.text or "" for one in element.iter(f"{{{NAMESPACE}}}Value"))
    weight = _text(element, "Weight")
    return (
        _text(element, "Name"),
        _text(element, "Type"),
        _text(element, "SetIdentifier"),
        int(weight) if weight else None,
        int(_text(element, "TTL")),
        values,
    )


def _xml(row: Row) -> str:
    name, kind, identifier, weight, ttl_s, values = row
    weighted = f"<SetIdentifier>{identifier}</SetIdentifier><Weight>{weight}</Weight>" if identifier else ""
    records = "".join(f"<ResourceRecord><Value>{value}</Value></ResourceRecord>" for value in values)
    return (
        f"<ResourceRecordSet><Name>{name}</Name><Type>{kind}</Type>{weighted}<TTL>{ttl_s}</TTL>"
        f"<ResourceRecords>{records}</ResourceRecords></ResourceRecordSet>"
    )


def _handler(server: Route53Server) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, status: int, body: str) -> None:
            data = f'<?xml version="1.0"?>{body}'.encode()
            self.send_response(status)
            self.send_header("content-type", "text/xml")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _handle(self, body: bytes) -> None:
            url = urlsplit(self.path)
            parts = url.path.strip("/").split("/")
            try:
                if server.refuse is not None:
                    raise server.refuse
                if parts[1] == "hostedzone" and parts[2] != server.zone:
                    raise Refused(404, "NoSuchHostedZone", f"No hosted zone found with ID: {parts[2]}")
                if parts[1] == "change":
                    name = parts[2]
                    self._answer(200, self._info("GetChangeResponse", name, server.status(name)))
                elif self.command == "POST":
                    name = server.change(body)
                    if server.lose_answers:
                        server.lose_answers -= 1
                        self.close_connection = True
                        return
                    self._answer(200, self._info("ChangeResourceRecordSetsResponse", name, "PENDING"))
                else:
                    name, kind = (parse_qs(url.query)[key][0] for key in ("name", "type"))
                    rows = sorted(row for row in server.rows if (row[0], row[1]) >= (name, kind))[:100]
                    inner = "".join(map(_xml, rows))
                    self._answer(
                        200,
                        f'<ListResourceRecordSetsResponse xmlns="{NAMESPACE}"><ResourceRecordSets>{inner}'
                        "</ResourceRecordSets><IsTruncated>false</IsTruncated><MaxItems>100</MaxItems>"
                        "</ListResourceRecordSetsResponse>",
                    )
            except Refused as refused:
                self._answer(
                    refused.status,
                    f'<ErrorResponse xmlns="{NAMESPACE}"><Error><Type>Sender</Type>'
                    f"<Code>{refused.code}</Code>"
                    f"<Message>{refused}</Message></Error><RequestId>1</RequestId></ErrorResponse>",
                )

        def _info(self, outer: str, name: str, status: str) -> str:
            return (
                f'<{outer} xmlns="{NAMESPACE}"><ChangeInfo><Id>/change/{name}</Id><Status>{status}</Status>'
                f"<SubmittedAt>2026-01-01T00:00:00Z</SubmittedAt></ChangeInfo></{outer}>"
            )

        def do_GET(self) -> None:
            self._handle(b"")

        def do_POST(self) -> None:
            self._handle(self.rfile.read(int(self.headers["content-length"])))

    return Handler


@contextlib.contextmanager
def serving(server: Route53Server) -> Iterator[str]:
    """Its URL."""
    listener = ThreadingHTTPServer(("127.0.0.1", 0), _handler(server))
    listener.daemon_threads = True
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}"
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
