"""Everything that knows HTTP: routes, forms, answers, access, pages and the server.

Only this room and `app.py` import Flask. It imports `pipeline.py` and what lies below.
"""
