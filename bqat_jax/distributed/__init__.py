"""Devices and processes: the mesh and what lies where on it, replicas, processes, requests to stop."""
