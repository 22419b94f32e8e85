"""The operator's commands: python app.py COMMAND.

A running service imports none of them but `cli`. They import `bootstrap.py` and what lies below.
"""
