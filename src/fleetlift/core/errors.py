"""The tree of errors. Each says what happened, whose fault it was, and what to do.

FleetError
├── BadInput          the caller's fault: say what was expected (HTTP 400, MQTT: dead letter)
├── NotFound          the thing named does not exist (HTTP 404)
├── Conflict          the state does not allow it now (HTTP 409)
├── Forbidden         the role or tenant does not allow it (HTTP 403)
└── Unavailable       a part that is needed does not answer; retry (HTTP 503)
"""

from typing import ClassVar


class FleetError(Exception):
    """Root of all errors that Fleetlift raises on purpose."""

    status: ClassVar[int] = 500


class BadInput(FleetError):
    """What was given cannot be used as it is; the text says what was expected."""

    status = 400


class NotFound(FleetError):
    status = 404


class Forbidden(FleetError):
    status = 403


class Conflict(FleetError):
    status = 409


class Unavailable(FleetError):
    status = 503
