"""The commands that print the figures of README and docs; README.md says which prints which."""
