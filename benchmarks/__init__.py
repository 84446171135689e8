"""Measurements of speed and size, apart from the tests: each prints and stores a table."""
