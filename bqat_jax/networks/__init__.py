"""Networks in plain Flax Linen that know nothing of quantization, each cut into stem, blocks and head."""
