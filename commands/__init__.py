"""The operator commands: python app.py COMMAND. Imports everything but app.py."""
