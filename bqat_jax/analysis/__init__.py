"""What goes on inside a low-precision network: its gradients, features and quantizers, measured on some batches."""
