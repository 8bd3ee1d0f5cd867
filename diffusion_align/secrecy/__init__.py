"""Secrecy: what a secret is, and the one redactor that keeps it out of all that is written."""
