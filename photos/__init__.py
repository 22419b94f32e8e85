"""Turns the bytes of a photo into pixels.

It knows no face and no request. It imports only `errors`, `logs` and libraries.
"""
