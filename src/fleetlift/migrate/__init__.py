"""The engine: controller, measurements, journal, report, emergency path."""
