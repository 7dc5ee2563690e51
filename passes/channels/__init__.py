"""Channels: the same network with other widths."""
