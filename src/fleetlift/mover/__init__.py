"""Carries out tenants' moves: a file for each kind of step, the rounds that want them, the streams."""
