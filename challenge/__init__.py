"""Challenges: random steps that a person does before the camera, and what the frames of them must show.

It imports `face_checks` and what lies below. The store keeps the challenges themselves.
"""
