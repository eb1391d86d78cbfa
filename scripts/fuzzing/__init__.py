"""What ``scripts/fuzz.py`` feeds to every reader, and how valid data are damaged."""
