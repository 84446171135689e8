"""Programs that compare methods; each module's docstring has its command and its files."""
