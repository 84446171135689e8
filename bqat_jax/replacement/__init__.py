"""Block replacement: plans (which blocks are low precision), paths (how they run) and the objective."""
