"""One run: its directory and files, where it stands, how it is stopped, and whether it is the one that is asked for."""
