"""Reads multipart forms as clients really send them.

Werkzeug takes a part for a file if it has a file name, and gives the whole form up if a header is not UTF-8. Here a
part whose name the API knows is what the API knows it as: a photo without a file name is a photo, a text that was sent
as a file (a Blob) is a text. File names may be in any encoding.
"""

from __future__ import annotations

from itertools import chain
from typing import IO, Any

from flask import Request
from werkzeug.datastructures import FileStorage, Headers
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser, MultiPartParser
from werkzeug.sansio.multipart import Data, Epilogue, Event, Field, File, MultipartDecoder, NeedData

from errors import FaceError

# The form fields of all routes, by their kind.
PHOTO_FIELDS = frozenset({"file", "file1", "file2", "frame"})
TEXT_FIELDS = frozenset({"threshold", "user_id", "challenge_id"})

READ_BYTES = 64 * 1024


class _Decoder(MultipartDecoder):
    def next_event(self) -> Event:
        event = super().next_event()
        if isinstance(event, Field) and event.name in PHOTO_FIELDS:
            return File(name=event.name, headers=event.headers, filename="")
        if isinstance(event, File) and event.name in TEXT_FIELDS:
            return Field(name=event.name, headers=event.headers)
        return event

    def _parse_headers(self, data: bytes | bytearray) -> Headers:
        try:
            data.decode()
        except UnicodeDecodeError:  # a file name in GBK, Shift-JIS or Latin-1, whose letters nobody needs
            data = data.decode("latin-1").encode()
        return super()._parse_headers(data)


class _FormParser(FormDataParser):
    def parse(
        self, stream: IO[bytes], mimetype: str, content_length: int | None, options: dict[str, str] | None = None
    ) -> tuple[IO[bytes], Any, Any]:
        """Parse a form as the base class does; FaceError `bad_request` for one that is malformed or cut off."""
        boundary = (options or {}).get("boundary", "")
        if mimetype != "multipart/form-data":
            return super().parse(stream, mimetype, content_length, options)
        first = stream.read(READ_BYTES)
        if not first:  # some clients name the type of a form that they do not send
            return stream, self.cls(), self.cls()
        try:
            texts, files = self._parts(first, stream, boundary.encode("ascii"), content_length)
        except ValueError as error:
            raise FaceError("bad_request", "malformed_form") from error
        return stream, self.cls(texts), self.cls(files)

    def _parts(
        self, first: bytes, stream: IO[bytes], boundary: bytes, content_length: int | None
    ) -> tuple[list[tuple[str, str]], list[tuple[str, FileStorage]]]:
        """The texts and files, by their names, of the form that begins with `first` and goes on in `stream`.

        Raises:
            RequestEntityTooLarge: too many parts, or a text that is too long.
            ValueError: the form is malformed.
        """
        if not boundary:
            raise ValueError("no boundary")
        most_bytes = self.max_form_memory_size or 0
        decoder = _Decoder(boundary, most_bytes, max_parts=self.max_form_parts)
        library = MultiPartParser(self.stream_factory)
        texts, files = list[tuple[str, str]](), list[tuple[str, FileStorage]]()
        part: Field | File | None = None
        text, file = bytearray(), None
        for chunk in chain([first], iter(lambda: stream.read(READ_BYTES), b""), [None]):
            decoder.receive_data(chunk)
            while not isinstance(event := decoder.next_event(), (Epilogue, NeedData)):
                if isinstance(event, (Field, File)):
                    part, text = event, bytearray()
                    file = library.start_file_streaming(event, content_length) if isinstance(event, File) else None
                elif isinstance(event, Data) and part is not None:
                    if file is not None:
                        file.write(event.data)
                    elif len(text) + len(event.data) > most_bytes:
                        raise RequestEntityTooLarge
                    else:
                        text += event.data
                    if event.more_data:
                        continue
                    if isinstance(part, File) and file is not None:
                        file.seek(0)
                        files.append((part.name, FileStorage(file, part.filename, part.name, headers=part.headers)))
                    else:
                        texts.append((part.name, text.decode(library.get_part_charset(part.headers), "replace")))
        return texts, files


class FormRequest(Request):
    """A request whose forms are read as above."""

    form_data_parser_class = _FormParser
