"""The backends a fleet can move between, behind one small interface."""
