"""Logging: one line of JSON an event, to standard error. Events are past tense, ids are fields."""

import logging
import os
import sys
from typing import TextIO, cast

# For tracebacks on a developer's console structlog imports all of rich, where it is installed, though nobody
# looks at one: a fifth of what a worker's imports cost. Hidden for this moment, it is done without.
_hidden = "rich" not in sys.modules
if _hidden:
    sys.modules["rich"] = None  # type: ignore[assignment]
import structlog  # noqa: E402

if _hidden:
    del sys.modules["rich"]

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, level: str = "info", role: str = "", file: TextIO | None = None) -> None:
    """Set up logging for this process. `level`: debug, info, warning or error. `role` is on every line.

    `file` instead of standard error is for a process whose screen belongs to people.
    """
    output = file or sys.stderr
    threshold = LEVELS.get(level, logging.INFO)
    # Libraries speak through the standard module: only what they call a warning is worth a line.
    logging.basicConfig(
        stream=output, level=max(threshold, logging.WARNING), format="%(name)s: %(message)s", force=True
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            structlog.dev.ConsoleRenderer()
            if output.isatty()
            else structlog.processors.JSONRenderer(default=str),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(file=output),
        # Loggers are made at import, before a program has said where to log.
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    if role:
        structlog.contextvars.bind_contextvars(role=role, pid=os.getpid())


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events carry the module's name."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(module=name))


# Until a program says otherwise: warnings only, and never into what it prints.
configure(level="warning")
