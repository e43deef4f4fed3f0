"""The teacher writes labels, rationales and soft labels into the record store."""
