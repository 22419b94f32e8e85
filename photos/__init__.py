"""Turns the bytes of a photo into pixels. Imports only errors and libraries."""
