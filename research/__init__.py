"""Programs that compare methods; each says its command and what it writes."""
