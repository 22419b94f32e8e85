"""Measurements: ratios side by side in one run. Developers run them; nothing of the service imports them."""
