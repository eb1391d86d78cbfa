"""Trained models for people: a prompt on a terminal, and a web page with a JSON interface."""
