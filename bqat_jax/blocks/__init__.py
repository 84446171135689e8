"""Networks divided into blocks: the network interface of block replacement, chains, and wrappers of Linen modules."""
