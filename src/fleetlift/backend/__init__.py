"""The services of a device backend: registry, telemetry, shadows, commands."""
