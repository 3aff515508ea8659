"""Configurations (TOML), and what runs, tabulates and overlays them."""
