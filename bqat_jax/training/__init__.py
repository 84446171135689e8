"""Training, its pure parts: state, loss, step, optimizer, control of oscillations, measured strengths, evaluation."""
