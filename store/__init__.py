"""The durable records and their encryption, the audit log, retention. Imports errors and libraries."""
