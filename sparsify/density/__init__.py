"""Density: how many weights every layer keeps, and which at first."""
