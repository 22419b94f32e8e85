"""The durable records and their encryption, the audit log, and retention.

Only this room imports SQLite and MongoDB. It imports `engines.base` (what a template is) and what lies below.
"""
