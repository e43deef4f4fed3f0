"""The student learns labels, rationales and soft labels."""
