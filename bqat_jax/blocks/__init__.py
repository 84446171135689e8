"""How a network is divided into blocks: what block replacement knows of one, chains of modules, a user's own module."""
