"""Fleetlift moves a live fleet of devices from one IoT backend to another."""

__version__ = "0.1.0"
