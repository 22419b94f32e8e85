"""Owns the operator's commands that a running service never needs; `commands.py` imports one when it is asked for."""
