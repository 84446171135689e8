"""What was trained, outside of the program: packed weights and inference that gives the same answers."""
