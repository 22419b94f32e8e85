"""The operator's commands: `python app.py COMMAND`.

`cli.py` lists them, and each is a `Command` (`command.py`). A running service imports `cli.py` alone. Commands import
`bootstrap.py` and the layers below it.
"""
