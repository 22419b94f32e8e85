"""The commands that take many photos through the pipeline: import and reembed.

They share the list of photos (`photo_list.py`), the processing (`processing.py`) and the report (`report.py`). A
command that is run again continues where its report ends.
"""
