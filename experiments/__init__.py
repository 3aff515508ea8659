"""Configurations (TOML), and the commands that run, tabulate and plot them."""
