"""What several commands need: the prefixes, scoring, records, random models."""
