"""Errors, files, settings and the machine; nothing about images or networks."""
