"""Whole migrations on a simulated clock, network and disk: the real agent, controller and codecs."""
