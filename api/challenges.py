"""Challenges over HTTP: the route that issues one, and what the other routes read of one."""

from __future__ import annotations

from flask import Flask, Response, jsonify, request

from api.access import scope
from api.request_fields import read_field, read_frames, receive_form
from api.request_log import current_record
from challenge.judge import not_attempted
from challenge.steps import MAX_FRAME_BYTES, MAX_FRAMES, Attempt, draw_steps
from errors import FaceError
from settings import Settings
from store.challenges import CHALLENGE_SECONDS, ChallengeStore, new_challenge

# The form fields of a challenge, which the routes that take one read.
FIELDS = ("challenge_id", "frame")


def add_challenge_route(app: Flask, settings: Settings, store: ChallengeStore) -> None:
    """Give `app` the route `POST /challenges`, if a route takes challenges."""
    if {settings.challenge, settings.challenge_sign_up, settings.challenge_verify} == {"off"}:
        return

    @app.post("/challenges", provide_automatic_options=False)
    @scope("app")
    def issue_challenge() -> Response:
        receive_form()
        challenge = new_challenge(_owner(), draw_steps())
        store.add_challenge(challenge)
        return jsonify(
            status="success",
            message="Do the steps in order before the camera, and send the frames with the photo.",
            challenge_id=challenge.challenge_id,
            steps=challenge.steps,
            expires_in=int(CHALLENGE_SECONDS),
            frames={"min": len(challenge.steps), "max": MAX_FRAMES},
        )


def allow_frames(mode: str) -> None:
    """Let the request be larger by a challenge's frames, where the route takes challenges."""
    if mode != "off":
        request.max_content_length = (request.max_content_length or 0) + MAX_FRAMES * MAX_FRAME_BYTES


def fields_of(mode: str) -> tuple[str, ...]:
    """The form fields that a route reads for challenges in this mode: off, accept or require."""
    return () if mode == "off" else FIELDS


def read_attempt(mode: str, store: ChallengeStore) -> Attempt | None:
    """Use the challenge that the request names, and return its steps and the frames; None if none is sent or read.

    The challenge is used up whatever becomes of the request.

    Args:
        mode: off, accept or require.
        store: where the challenges are.

    Raises:
        FaceError: `challenge_required`; `challenge_used`; `challenge_expired`; `bad_request`: the field is sent twice.
    """
    if mode == "off":
        return None
    challenge_id = read_field("challenge_id", "bad_request")
    frames = read_frames()
    if challenge_id is None and not frames and mode == "accept":
        return None
    if not challenge_id:
        raise not_attempted("challenge_required", {"min": 1})
    try:
        challenge = store.use_challenge(challenge_id, _owner())
    except FaceError as error:
        if error.code != "challenge_expired":
            raise
        raise not_attempted("challenge_expired", {"max": CHALLENGE_SECONDS}) from error
    return Attempt(challenge.steps, tuple(frames))


def _owner() -> str:
    """Whose challenge it is: the API key's hash, not its name, which another key can get after a revocation."""
    api_key = current_record().api_key
    return api_key.sha256 if api_key else ""
