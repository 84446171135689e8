"""Measurements of speed and size; each program prints and stores a table."""
