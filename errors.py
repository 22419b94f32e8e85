"""The one error that clients see, and the table of its codes and sentences."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import Any

# code -> (HTTP status, default message). The codes and statuses are the API's contract and never change;
# a message may be reworded.
CODES: Mapping[str, tuple[int, str]] = MappingProxyType(
    {
        "no_file": (400, "No photo was sent."),
        "empty_file": (400, "The photo that was sent is empty."),
        "unreadable_image": (400, "The photo is damaged and could not be read. Please send it again."),
        "invalid_threshold": (400, "The threshold must be a number between the service's floor and 1."),
        "invalid_user_id": (400, "The user_id must be a UUID."),
        "bad_request": (400, "The request could not be understood."),
        "unknown_field": (400, "The request has a field that is not read."),
        "unauthorized": (401, "An API key is required."),
        "no_match": (401, "No matching face found"),
        "forbidden": (403, "This API key does not allow that."),
        "not_found": (404, "There is nothing at this address."),
        "unknown_user": (404, "Nobody is enrolled under this user_id."),
        "unknown_photo": (404, "This person has no photo with that number."),
        "method_not_allowed": (405, "This address does not accept that method."),
        "duplicate_face": (409, "This face already exists in the database"),
        "last_photo": (409, "This is the person's only photo. Erase the person instead."),
        "idempotency_conflict": (409, "This Idempotency-Key was used with another photo."),
        "challenge_used": (409, "This challenge was used already. Please ask for another one."),
        "file_too_large": (413, "The photo's file is too large."),
        "image_too_large": (413, "The photo has too many pixels."),
        "unsupported_format": (415, "Invalid file format. Please use JPG, JPEG, PNG, WebP or HEIC."),
        "no_face": (422, "No face was found in the photo."),
        "multiple_faces": (422, "More than one face was found in the photo."),
        "face_too_small": (422, "The face is too small in the photo."),
        "face_too_large": (422, "The face fills too much of the photo."),
        "face_cut_off": (422, "The face is cut off by the edge of the photo."),
        "blurred": (422, "The face is blurred."),
        "too_dark": (422, "The face is too dark."),
        "too_bright": (422, "The face is too bright."),
        "low_contrast": (422, "The face has too little contrast."),
        "uneven_light": (422, "The light on the face is too uneven."),
        "head_tilted": (422, "The head is tilted to one side."),
        "head_turned": (422, "The head is turned away."),
        "head_raised_or_lowered": (422, "The head is raised or lowered."),
        "unnatural_colour": (422, "The colours of the face are not natural."),
        "mask": (422, "A mask covers the face."),
        "sunglasses": (422, "Sunglasses cover the eyes."),
        "face_covered": (422, "Something covers part of the face."),
        "landmarks_hidden": (422, "The eyes, nose or mouth cannot be seen clearly."),
        "eyes_closed": (422, "The eyes are closed."),
        "distorted": (422, "The photo was stretched, or damaged by compression or noise."),
        "not_live": (422, "The photo does not seem to show a live person in front of the camera."),
        "liveness_not_assessed": (422, "It could not be determined whether the photo shows a live person."),
        "challenge_required": (422, "A challenge is required. Ask for one, then send it with the frames."),
        "challenge_expired": (422, "The challenge is too old or unknown. Please ask for another one."),
        "challenge_failed": (422, "The frames do not show what the challenge asks for."),
        "rate_limited": (429, "Too many requests. Please wait and try again."),
        "internal_error": (500, "Something went wrong on our side. Please try again."),
        "overloaded": (503, "The service is busy. Please try again shortly."),
        "database_unavailable": (503, "The database cannot be reached. Please try again shortly."),
        "not_ready": (503, "The service is not ready. Please try again shortly."),
    }
)

# Sentences that say more than the code's own message, with named values. Each has a translation, as the messages do.
SENTENCES: Mapping[str, str] = MappingProxyType(
    {
        "no_photo": "No photo was sent. Post it as the form-data field '{field}'.",
        "photo_elsewhere": "No photo was sent as the form-data field '{field}'. The request has a file as {received}.",
        "one_photo": "Send exactly one photo in the field '{field}'.",
        "field_once": "Send the field '{field}' once.",
        "misplaced_field": "The field '{field}' is not read there. Send it as form-data, to a route that takes it.",
        "misspelt_field": "There is no field '{field}'. Send it as '{known}'.",
        "threshold_range": "The threshold must be a number between {floor} and 1.",
        "idempotency_key": "The Idempotency-Key must be 1 to 255 visible ASCII characters.",
        "unknown_key": "This API key is not known.",
        "missing_scope": "This API key does not allow that: it lacks the scope {scope}.",
        "not_from_here": "Without API keys this service answers only its own machine, and no proxy.",
        "foreign_origin": "Pages of this web origin may not call this service.",
        "still_running": "An earlier attempt of this request is not finished yet. Please try again shortly.",
        "locked_out": "Too many failed attempts for this user_id. Please try again later.",
        "unreadable_file": "The file cannot be read.",
        "file_limit": "The photo's file is larger than {mebibytes} MiB.",
        "side_limit": "A side of the photo is longer than {pixels} pixels.",
        "pixel_limit": "The photo has {width}x{height} pixels; at most {megapixels} megapixels are read.",
        # A frame's sentence instead of its code's own.
        "frame_empty_file": "Frame {frame} is empty.",
        "frame_file_too_large": "The file of frame {frame} is larger than {kibibytes} KiB.",
        "frame_image_too_large": "Frame {frame} has too many pixels.",
        "frame_unreadable_image": "Frame {frame} is damaged and could not be read.",
        "frame_unsupported_format": "Frame {frame} is not a JPG, PNG, WebP or HEIC file.",
        "request_limit": "The request is larger than {request} MiB; a photo may have {mebibytes} MiB.",
        "challenges_off": "The field '{field}' is not read: this route takes no challenges, as the service is set.",
        "malformed_form": "The form is damaged or cut off and could not be read.",
        "accepted": "The photo passes every check.",
        "faces_match": "The faces match.",
        "faces_differ": "The faces do not match.",
    }
)


def english(sentence: str, values: Mapping[str, object] = MappingProxyType({})) -> str:
    """The text of a sentence: the message of a code, or one of `SENTENCES` with its values; KeyError if unknown."""
    text = CODES[sentence][1] if sentence in CODES else SENTENCES[sentence]
    return text.format_map(values)


class FaceError(Exception):
    """The reason why a request is refused: the code, sentence and status that the client gets.

    Raised where the fact is known; answered in one place, `api/responses.py`.

    Args:
        code: a key of `CODES`.
        sentence: which of `SENTENCES` the answer has; the code's own message if omitted.
        values: the values in that sentence.
        fields: more keys for the JSON body, such as `checks`.
        headers: more response headers, such as `Retry-After`.

    Raises:
        KeyError: the code, the sentence or one of its values does not exist.
    """

    def __init__(
        self,
        code: str,
        sentence: str | None = None,
        *,
        values: Mapping[str, object] | None = None,
        fields: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.code = code
        self.status = HTTPStatus(CODES[code][0])
        self.sentence, self.values = sentence or code, dict(values or {})
        self.message = english(self.sentence, self.values)
        self.fields = dict(fields or {})
        self.headers = dict(headers or {})
        super().__init__(f"{code}: {self.message}")


def too_large(max_file_bytes: int, max_request_bytes: int | None = None) -> FaceError:
    """`file_too_large`, with the limit in its sentence, and that of a request which may hold more than one photo."""
    values = {"mebibytes": f"{max_file_bytes / 2**20:.3g}", "request": f"{(max_request_bytes or 0) / 2**20:.3g}"}
    return FaceError("file_too_large", "request_limit" if max_request_bytes else "file_limit", values=values)
