"""Who is enrolled: the copy of the enrolment log in memory, and every decision about it.

It imports `store` and what lies below.
"""
