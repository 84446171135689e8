"""Devices and processes: mesh and sharding, replicas, processes, requests to stop."""
