"""The training program: from a config to a finished run."""
