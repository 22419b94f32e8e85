"""The commands backup and restore: everybody enrolled, in one file.

`backup_file.py` is the file's format. `command.py` writes it from a store and restores it into one. It imports what
every command may import.
"""
