"""The fleetlift command."""
