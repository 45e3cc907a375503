"""Encoded contexts on disk: their files, the folder that holds them, and the thread that writes them."""
