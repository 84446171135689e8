"""The training program: state, step, optimizer, checkpoints, loop."""
