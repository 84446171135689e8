"""Pure parts of training: state, loss, step, optimizer, oscillation control, measured strengths, evaluation."""
