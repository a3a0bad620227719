"""Configurations and their checks; imports no torch."""
