"""Block replacement: which blocks are low precision (plans), how they run (paths), what is minimised (objective)."""
