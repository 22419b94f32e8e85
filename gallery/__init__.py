"""Who is enrolled, and the decisions about it. Imports store and what lies below."""
