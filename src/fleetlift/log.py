"""Logging: one line of JSON an event, to standard error. Events are past tense, ids are fields."""

import logging
import os
import sys
from typing import cast

import structlog

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


def configure(*, level: str = "info", role: str = "") -> None:
    """Set up logging for this process. `level`: debug, info, warning or error. `role` is on every line."""
    threshold = LEVELS.get(level, logging.INFO)
    # Libraries speak through the standard module: only what they call a warning is worth a line.
    logging.basicConfig(
        stream=sys.stderr, level=max(threshold, logging.WARNING), format="%(name)s: %(message)s"
    )
    renderer = (
        structlog.dev.ConsoleRenderer()
        if sys.stderr.isatty()
        else structlog.processors.JSONRenderer(default=str)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.StackInfoRenderer(),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(threshold),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    if role:
        structlog.contextvars.bind_contextvars(role=role, pid=os.getpid())


def get_logger(name: str) -> structlog.stdlib.BoundLogger:
    """A logger whose events carry the module's name. `await` is never needed."""
    return cast("structlog.stdlib.BoundLogger", structlog.get_logger(module=name))
