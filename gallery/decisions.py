"""Decides who is enrolled: search, comparison, the duplicate check, and enrolment as one step."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from engines.base import Template
from errors import FaceError
from gallery.in_memory import InMemoryCopy, InMemoryView, ModelFilter
from gallery.in_mongodb import IndexedCopy, IndexedView
from gallery.snapshot import SnapshotFolder
from gallery.templates import Candidate
from store.records import Enrolment, EnrolmentLog
from store.template_bytes import NORM_TOLERANCE

if TYPE_CHECKING:
    from store.mongo_vectors import MongoVectorIndex

REQUEST_KEY_SECONDS = 24 * 3600.0
# Each lost race is another process' success, so this many in a row means that something is wrong.
MAX_LOST_RACES = 1000
MAX_DECISION_WAIT_SECONDS = 10.0


# The gallery up to a place in the log.
GalleryView: TypeAlias = InMemoryView | IndexedView


@dataclass(frozen=True)
class NewFace:
    """A face to be enrolled, with the arguments of `Gallery.enrol`."""

    template: Template
    restored: Sequence[Template] = ()
    request_key: str | None = None
    quality: float | None = None


class Gallery:
    """The enrolled people of one model, each with one or several photos, for any number of threads.

    Every decision is made on a view that was caught up with the log after the request asked.
    Every method but `load`, `status` and `close` raises FaceError `database_unavailable` when the log cannot be read,
    and `not_ready` while it is read for the first time.

    Args:
        store: the records; prepared.
        model: the running model's name. Templates of another model are counted, never compared.
        dimension: d of its templates.
        plain_model: the model of records that name none; by default the running model, if the dimension fits.
        snapshot: keeps templates on local disk for a quick start; None for no snapshot.
        index: MongoDB's vector index, which then searches in place of this process.
    """

    def __init__(  # noqa: PLR0917 - the parts of a gallery
        self,
        store: EnrolmentLog,
        model: str,
        dimension: int,
        plain_model: str | None = None,
        snapshot: SnapshotFolder | None = None,
        index: MongoVectorIndex | None = None,
    ) -> None:
        self._store = store
        self._model = model
        self._dimension = dimension
        searchable = ModelFilter(model, dimension, plain_model)
        self._copy = (
            InMemoryCopy(store, searchable, snapshot) if index is None else IndexedCopy(store, searchable, index)
        )
        self._decision_lock = threading.Lock()

    def load(self, *, keep_trying: bool = True) -> None:
        """Read the snapshot and the log, trying again while the store cannot be reached.

        Call it before any other method, or never: meanwhile all others raise `not_ready`.

        Raises:
            FaceError: `database_unavailable` or `not_ready`; never with `keep_trying`.
        """
        self._copy.load(keep_trying=keep_trying)

    def refresh(self) -> None:
        """Apply the log's new entries."""
        self._copy.caught_up()

    def search(self, probe: Template) -> Candidate | None:
        """Return the best candidate of the whole gallery (1:N), or None when nobody is enrolled.

        The `cosine` of a person with several photos is their `person_score`.

        Args:
            probe: float32[d], L2-normalised; ValueError otherwise.
        """
        return next(iter(self.candidates(probe)), None)

    def candidates(self, probe: Template, k: int | None = 1, least: float = -np.inf) -> list[Candidate]:
        """Return the `k` best candidates (all, for None) whose cosine is at least `least`, the best first.

        Args:
            probe: float32[d], L2-normalised; ValueError otherwise.
            k: how many at most.
            least: the lowest cosine that counts.
        """
        probe = self._checked(probe)
        return self._copy.caught_up().search(probe, k, least)

    def compare(self, user_id: str, probe: Template) -> float:
        """Return the `person_score` of one person (1:1); FaceError `unknown_user`.

        Args:
            user_id: the person whom the probe claims to show.
            probe: float32[d], L2-normalised; ValueError otherwise.
        """
        probe = self._checked(probe)
        cosine = self._copy.caught_up().cosine(user_id, probe)
        if cosine is None:
            raise FaceError("unknown_user")
        return cosine

    def enrol(
        self,
        template: Template,
        *,
        duplicate_cosine: float,
        restored: Sequence[Template] = (),
        request_key: str | None = None,
        quality: float | None = None,
    ) -> str:
        """Enrol a person unless they are enrolled already, as one decision among all processes on the store.

        Args:
            template: float32[d], L2-normalised; ValueError otherwise.
            restored: the same of the face as it may have been before somebody changed the photo. The person whom one
                of them shows is enrolled already, too. They are not stored.
            duplicate_cosine: from this cosine up, the best candidate is the same person.
            request_key: the hash of the client's Idempotency-Key. If a request with the same hash enrolled a person
                within 24 hours, that person's user_id is returned.
            quality: of the photo, 0...1; None if it is not known.

        Returns:
            The user_id given to the person.

        Raises:
            FaceError: `duplicate_face`; `database_unavailable`, after which the person may be enrolled or not;
                `overloaded`.
        """
        probes = self._probes(template, restored)
        # The long search comes first, while other threads decide. The decision itself searches only what is new since.
        searched = self._copy.caught_up()
        settled = self._settled(searched, None, probes, duplicate_cosine, request_key)
        if settled is not None:
            return settled
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                settled = self._settled(view, searched, probes, duplicate_cosine, request_key)
                if settled is not None:
                    return settled
                enrolment = self._enrolment(probes[0], request_key, quality)
                if self._store.append(view.last + 1, [enrolment]):
                    return enrolment.user_id
                searched = view
        raise _overloaded()

    def enrolled_by(self, request_key: str) -> str | None:
        """Return the user_id of a known person that an earlier request with this key got, or None.

        Raises:
            FaceError: `database_unavailable`; `not_ready`.
        """
        self._copy.caught_up()
        return self._earlier(request_key)

    def _earlier(self, request_key: str) -> str | None:
        """As `enrolled_by`, in a view that was caught up already."""
        earlier = self._store.find_request(request_key, time.time() - REQUEST_KEY_SECONDS)
        return earlier if earlier is not None and self._copy.knows(earlier) else None

    def _settled(
        self,
        view: GalleryView,
        searched: GalleryView | None,
        probes: Sequence[Template],
        duplicate_cosine: float,
        request_key: str | None,
    ) -> str | None:
        """Return the user_id that an earlier attempt of this request enrolled, if any; FaceError `duplicate_face`."""
        # The store is asked after `view` was caught up. So if an earlier attempt of this request enrolled the person,
        # it is found here, before the search below can call it a duplicate.
        earlier = None if request_key is None else self._earlier(request_key)
        if earlier is not None:
            return earlier
        if _is_duplicate(view, probes, duplicate_cosine, searched):
            raise FaceError("duplicate_face")
        return None

    def enrol_many(
        self,
        faces: Sequence[NewFace],
        *,
        duplicate_cosine: float,
    ) -> list[str | None]:
        """Enrol many people, except those who are enrolled already or appear earlier in the list.

        This takes one round trip to the store, or a few when other processes enrol meanwhile.

        Args:
            faces: each with the arguments of `enrol`; ValueError for a template that is not L2-normalised.
            duplicate_cosine: from this cosine up, two templates are the same person's.

        Returns:
            For each face the user_id given to the person, or None where the face is enrolled already.

        Raises:
            FaceError: `database_unavailable`, after which any of them may be enrolled or not; `overloaded`.
        """
        probes = [self._probes(face.template, face.restored) for face in faces]
        user_ids: list[str | None] = [None] * len(faces)
        start = 0
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                chosen: dict[int, Enrolment] = {}
                for index in range(start, len(faces)):
                    of_face = probes[index]
                    among = np.stack([one.template for one in chosen.values()]) if chosen else None
                    # `not <`, so that a threshold that is not a number refuses.
                    is_repeated = among is not None and not (np.stack(of_face) @ among.T).max() < duplicate_cosine
                    if not is_repeated and not _is_duplicate(view, of_face, duplicate_cosine):
                        chosen[index] = self._enrolment(of_face[0], faces[index].request_key, faces[index].quality)
                stored = self._store.append(view.last + 1, list(chosen.values())) if chosen else 0
                for index, enrolment in list(chosen.items())[:stored]:
                    user_ids[index] = enrolment.user_id
                if stored == len(chosen):
                    return user_ids
                # All before the first that was not stored are decided; decide the rest on what the log has now.
                start = list(chosen)[stored]
        raise _overloaded()

    def add_photo(
        self,
        user_id: str,
        template: Template,
        *,
        match_cosine: float,
        duplicate_cosine: float,
        max_photos: int,
        request_key: str | None = None,
        quality: float | None = None,
    ) -> int:
        """Add a photo to an enrolled person, as one decision among all processes on the store.

        At `max_photos` it takes the place of the oldest photo. Which one goes made no difference to the misses that
        could be measured (docs/concepts.md), and so a face that changes over the years is followed.

        Args:
            user_id: the person.
            template: float32[d], L2-normalised; ValueError otherwise.
            match_cosine: from this score up, the photo shows that person.
            duplicate_cosine: from this score up, the photo shows another person.
            max_photos: how many photos a person may have; at least 1.
            request_key: the hash of the client's Idempotency-Key. A request with the same hash that added a photo
                within 24 hours is answered alike.
            quality: of the photo, 0...1; None if it is not known.

        Returns:
            How many photos the person has now.

        Raises:
            FaceError: `unknown_user`; `no_match`; `duplicate_face`; `idempotency_conflict`; `database_unavailable`,
                after which the photo may be added or not; `overloaded`.
        """
        added = self._enrolment(self._checked(template), request_key, quality)
        photos = self._add_photo(user_id, added, match_cosine, duplicate_cosine, max_photos)
        assert photos is not None
        return photos

    def add_better_photo(
        self,
        user_id: str,
        template: Template,
        *,
        match_cosine: float,
        duplicate_cosine: float,
        max_photos: int,
        quality: float,
    ) -> int | None:
        """Add a photo as `add_photo` does, if its quality is above that of every photo that the person has.

        A photo whose quality is not known counts as the worst. Photos of other models do not count.

        Returns:
            How many photos the person has now; None if the photo is not better, and is not added.
        """
        added = self._enrolment(self._checked(template), quality=quality)
        # One record is read before everybody is searched: most photos are not better.
        if not self._is_better(self._copy.caught_up(), user_id, quality):
            return None
        return self._add_photo(user_id, added, match_cosine, duplicate_cosine, max_photos, only_better=True)

    def _add_photo(
        self,
        user_id: str,
        added: Enrolment,
        match_cosine: float,
        duplicate_cosine: float,
        max_photos: int,
        *,
        only_better: bool = False,
    ) -> int | None:
        template, request_key = added.template, added.request_key
        # The long search comes first, as in `enrol`.
        searched = self._copy.caught_up()
        if self._is_somebody_else(searched, None, user_id, template, duplicate_cosine):
            raise FaceError("duplicate_face")
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                score = view.cosine(user_id, template)
                if score is None:
                    raise FaceError("unknown_user")
                photos = view.photos(user_id)
                if self._is_added_already(user_id, request_key):
                    return len(photos)
                # Again, since another process may have added a better one meanwhile.
                if only_better and not self._is_better(view, user_id, added.quality or 0.0):
                    return None
                # `not >=`, so that a threshold that is not a number refuses.
                if not score >= match_cosine:
                    raise FaceError("no_match")
                if self._is_somebody_else(view, searched, user_id, template, duplicate_cosine):
                    raise FaceError("duplicate_face")
                removes = photos[0] if len(photos) >= max_photos else None
                enrolment = replace(
                    added, user_id=user_id, photo_id=str(uuid.uuid4()), timestamp=time.time(), removes=removes
                )
                if self._store.append(view.last + 1, [enrolment]):
                    if removes is not None:
                        self._copy.caught_up()  # as in `erase`
                    return len(photos) + (removes is None)
                searched = view
        raise _overloaded()

    def _is_better(self, view: GalleryView, user_id: str, quality: float) -> bool:
        """Whether this quality is above that of every photo of the person in the view."""
        person, places = self._store.find_person(user_id), view.photos(user_id)
        kept = [photo.quality or 0.0 for photo in person.photos if photo.seq in places] if person else []
        return quality > max(kept, default=0.0)

    def _is_added_already(self, user_id: str, request_key: str | None) -> bool:
        """Whether an earlier attempt of this request has added its photo."""
        if request_key is None:
            return False
        earlier = self._store.find_request(request_key, time.time() - REQUEST_KEY_SECONDS)
        if earlier is not None and earlier != user_id:
            raise FaceError("idempotency_conflict")
        return earlier is not None

    @staticmethod
    def _is_somebody_else(
        view: GalleryView, searched: GalleryView | None, user_id: str, template: Template, duplicate_cosine: float
    ) -> bool:
        found = view.search(template, 2, after=_unsearched_after(view, searched))
        return any(one.user_id != user_id and not one.cosine < duplicate_cosine for one in found)

    def remove_photo(self, user_id: str, number: int) -> int:
        """Remove one photo of a person, here and in every process; return how many are left.

        Args:
            user_id: the person.
            number: the photo's `StoredPhoto.number`.

        Raises:
            FaceError: `unknown_user`; `unknown_photo`; `last_photo`, the person could not be found any more without it;
                `database_unavailable`, after which asking again is safe; `overloaded`.
        """
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                person = self._store.find_person(user_id)
                if person is None:
                    raise FaceError("unknown_user")
                removed = next((photo for photo in person.photos if photo.number == number), None)
                if removed is None:
                    raise FaceError("unknown_photo")
                searchable = view.photos(user_id)
                if len(searchable if removed.seq in searchable else person.photos) == 1:
                    raise FaceError("last_photo")
                if self._store.remove_photo(view.last + 1, removed.seq):
                    self._copy.caught_up()  # as in `erase`
                    return len(person.photos) - 1
        raise _overloaded()

    def erase(self, user_id: str) -> None:
        """Erase a person, of any model: from the store and from this process' memory and snapshot.

        Other processes apply the erasure before their next decision.

        Raises:
            FaceError: `unknown_user`; `database_unavailable`, after which asking again is safe; `overloaded`.
        """
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                if not self._copy.knows(user_id):
                    # Perhaps an erasure was logged and then cut off.
                    self._store.finish_erasures(user_id)
                    raise FaceError("unknown_user")
                if self._store.erase(view.last + 1, user_id):
                    # This process' own copy and snapshot hold the template until the erasure is applied to them.
                    self._copy.caught_up()
                    return
        raise _overloaded()

    def status(self) -> dict[str, Any]:
        """Return counts for people and monitors, as of the last catching up, without asking the store."""
        return self._copy.status()

    def close(self) -> None:
        """Write what is missing in the snapshot."""
        self._copy.close()

    def _probes(self, template: Template, restored: Sequence[Template]) -> list[Template]:
        """The templates that a new face is searched by; the first is the one that is stored."""
        return [self._checked(one) for one in (template, *restored)]

    def _checked(self, template: Template) -> Template:
        # One NaN would silently win every search, and the product of longer vectors is not a cosine.
        if template.shape != (self._dimension,) or not abs(float(np.linalg.norm(template)) - 1) <= NORM_TOLERANCE:
            raise ValueError(f"not one L2-normalised template of {self._dimension} dimensions")
        return np.ascontiguousarray(template, np.float32)

    def _enrolment(self, template: Template, request_key: str | None = None, quality: float | None = None) -> Enrolment:
        return Enrolment(str(uuid.uuid4()), template, self._model, time.time(), request_key, quality=quality)

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """Let one thread decide at a time: threads of one process would only lose races to each other."""
        if not self._decision_lock.acquire(timeout=MAX_DECISION_WAIT_SECONDS):
            raise _overloaded()
        try:
            yield
        finally:
            self._decision_lock.release()


def _is_duplicate(
    view: GalleryView, probes: Sequence[Template], duplicate_cosine: float, searched: GalleryView | None = None
) -> bool:
    """Whether one of a face's templates shows somebody whom the view holds."""
    after = _unsearched_after(view, searched)
    best = (candidate for probe in probes for candidate in view.search(probe, after=after))
    # `not <`, so that a threshold that is not a number refuses.
    return any(not candidate.cosine < duplicate_cosine for candidate in best)


def _unsearched_after(view: GalleryView, searched: GalleryView | None) -> int:
    """Return the place behind which `view` has people whom a search of the earlier view has not seen."""
    # A photo that was added or removed changes the score of a person who was searched before.
    return searched.last if searched is not None and searched.photo_changes == view.photo_changes else 0


def _overloaded() -> FaceError:
    return FaceError("overloaded", headers={"Retry-After": "1"})
