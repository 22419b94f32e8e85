"""Owns the decisions about who is enrolled: search, comparison, the duplicate check, and enrolment as one step."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engines.base import Template
from errors import FaceError
from gallery.in_memory import InMemoryCopy, Ours
from gallery.in_mongodb import IndexedCopy
from gallery.snapshot import SnapshotFolder
from gallery.templates import Candidate
from store.records import Enrolment, EnrolmentLog
from store.template_bytes import NORM_TOLERANCE

if TYPE_CHECKING:
    from store.mongo_vectors import MongoVectorIndex

REQUEST_KEY_SECONDS = 24 * 3600.0
# Each lost race is somebody else's success, so this many in a row means that something is wrong.
MAX_LOST_RACES = 1000
MAX_WAIT_SECONDS = 10.0


class GalleryView(Protocol):
    """The gallery up to a place in the log; `in_memory.InMemoryView` and `in_mongodb.IndexedView` say more."""

    @property
    def last(self) -> int: ...

    def search(
        self, probe: Template, k: int | None = 1, least: float = -np.inf, since: Any = None
    ) -> list[Candidate]: ...

    def cosine(self, user_id: str, probe: Template) -> float | None: ...


class GalleryCopy(Protocol):
    """What a process holds of the log: everything (`in_memory`), or its tail (`in_mongodb`)."""

    def caught_up(self, lost_races: int = 0) -> GalleryView: ...
    def knows(self, user_id: str) -> bool: ...
    def load(self, *, keep_trying: bool) -> None: ...
    def status(self) -> dict[str, Any]: ...
    def close(self) -> None: ...


class Gallery:
    """The enrolled people of one model, for any number of threads.

    Whatever is decided here is decided on a gallery that was caught up with the log after the question was asked.
    Every method but `load`, `status` and `close` raises FaceError `database_unavailable` when the log cannot be read,
    and `not_ready` while it is read for the first time.

    Args:
        store: the records; prepared.
        model: the running model's name. Templates of another model are counted, never compared.
        dimension: d of its templates.
        plain_model: the model of records that name none; by default the running one if their dimension is its own.
        snapshot: where templates are kept on local disk for a quick start; None keeps none.
        index: MongoDB's vector index, which then searches instead of this process.
    """

    def __init__(  # noqa: PLR0917 - what a gallery is made of
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
        ours = Ours(model, dimension, plain_model)
        self._copy: GalleryCopy = (
            InMemoryCopy(store, ours, snapshot) if index is None else IndexedCopy(store, ours, index)
        )
        self._decision_lock = threading.Lock()

    def load(self, *, keep_trying: bool = True) -> None:
        """Read everything there is, from the snapshot and the log, trying again while the store is out of reach.

        To be called first, or not at all: everything else answers `not_ready` meanwhile.

        Raises:
            FaceError: `database_unavailable` or `not_ready`; never with `keep_trying`.
        """
        self._copy.load(keep_trying=keep_trying)

    def refresh(self) -> None:
        """Apply what the log has gained."""
        self._copy.caught_up()

    def search(self, probe: Template) -> Candidate | None:
        """Return the best candidate of the whole gallery (1:N), or None when nobody is enrolled.

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
        """Return the cosine of `probe` to one person (1:1), the best of their templates; FaceError `unknown_user`.

        Args:
            user_id: whom the probe claims to be.
            probe: float32[d], L2-normalised; ValueError otherwise.
        """
        probe = self._checked(probe)
        cosine = self._copy.caught_up().cosine(user_id, probe)
        if cosine is None:
            raise FaceError("unknown_user")
        return cosine

    def enrol(self, template: Template, *, duplicate_cosine: float, request_key: str | None = None) -> str:
        """Enrol a person unless they are enrolled already, as one decision among all processes on the store.

        Args:
            template: float32[d], L2-normalised; ValueError otherwise.
            duplicate_cosine: from this cosine up, the best candidate is the same person.
            request_key: identifies the client's request; one that enrolled somebody within 24 hours answers alike.

        Returns:
            The user_id given to the person.

        Raises:
            FaceError: `duplicate_face`; `database_unavailable`, after which the person may be enrolled or not;
                `overloaded`.
        """
        template = self._checked(template)
        # The long search comes first, while others decide; within the decision only who was enrolled since is searched.
        searched = self._copy.caught_up()
        settled = self._settled(searched, None, template, duplicate_cosine, request_key)
        if settled is not None:
            return settled
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                settled = self._settled(view, searched, template, duplicate_cosine, request_key)
                if settled is not None:
                    return settled
                enrolment = self._enrolment(template, request_key)
                if self._store.append(view.last + 1, [enrolment]):
                    return enrolment.user_id
                searched = view
        raise _overloaded()

    def _settled(
        self,
        view: GalleryView,
        searched: GalleryView | None,
        template: Template,
        duplicate_cosine: float,
        request_key: str | None,
    ) -> str | None:
        """Return whom an earlier attempt of this request enrolled, None if nobody; FaceError `duplicate_face`."""
        # Asked of the store after `view` was caught up: whatever the search below can find, this has found if it is
        # the same request's.
        if request_key is not None:
            earlier = self._store.find_request(request_key, time.time() - REQUEST_KEY_SECONDS)
            if earlier is not None and self._copy.knows(earlier):
                return earlier
        if _is_duplicate(view, template, duplicate_cosine, searched):
            raise FaceError("duplicate_face")
        return None

    def enrol_many(
        self,
        templates: Sequence[Template],
        *,
        duplicate_cosine: float,
        request_keys: Sequence[str | None] | None = None,
    ) -> list[str | None]:
        """Enrol those of many people who are enrolled neither already nor earlier in the list.

        Their places in the log are taken in one round trip to the store, or in a few when others enrol meanwhile.

        Args:
            templates: float32[d] each, L2-normalised; ValueError otherwise.
            duplicate_cosine: from this cosine up, two templates are the same person's.
            request_keys: for each template, by what `EnrolmentLog.find_request` finds the enrolment again.

        Returns:
            For each template the user_id given to the person, or None where the face is enrolled already.

        Raises:
            FaceError: `database_unavailable`, after which any of them may be enrolled or not; `overloaded`.
        """
        checked = [self._checked(template) for template in templates]
        user_ids: list[str | None] = [None] * len(checked)
        start = 0
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                chosen: dict[int, Enrolment] = {}
                for index in range(start, len(checked)):
                    among = np.stack([one.template for one in chosen.values()]) if chosen else None
                    # `not <`, so that a threshold that is no number refuses.
                    again = among is not None and not np.vecdot(among, checked[index]).max() < duplicate_cosine
                    if not again and not _is_duplicate(view, checked[index], duplicate_cosine):
                        key = request_keys[index] if request_keys is not None else None
                        chosen[index] = self._enrolment(checked[index], key)
                stored = self._store.append(view.last + 1, list(chosen.values())) if chosen else 0
                for index, enrolment in list(chosen.items())[:stored]:
                    user_ids[index] = enrolment.user_id
                if stored == len(chosen):
                    return user_ids
                # Who comes before the first that was not stored is decided; the others are, on what the log has now.
                start = list(chosen)[stored]
        raise _overloaded()

    def erase(self, user_id: str) -> None:
        """Erase a person, of whatever model, here and in every process.

        Raises:
            FaceError: `unknown_user`; `database_unavailable`, after which to ask again is safe; `overloaded`.
        """
        with self._deciding():
            for attempt in range(MAX_LOST_RACES):
                view = self._copy.caught_up(attempt)
                if not self._copy.knows(user_id):
                    # Perhaps because an erasure got as far as the log and no further.
                    self._store.finish_erasures(user_id)
                    raise FaceError("unknown_user")
                if self._store.erase(view.last + 1, user_id):
                    return
        raise _overloaded()

    def status(self) -> dict[str, Any]:
        """Return counts for people and monitors, as of the last catching up, without asking the store."""
        return self._copy.status()

    def close(self) -> None:
        """Write what the snapshot lacks."""
        self._copy.close()

    def _checked(self, template: Template) -> Template:
        # One NaN would win every search silently, and a vector of another length would be no cosine.
        if template.shape != (self._dimension,) or not abs(float(np.linalg.norm(template)) - 1) <= NORM_TOLERANCE:
            raise ValueError(f"not one L2-normalised template of {self._dimension} dimensions")
        return np.ascontiguousarray(template, np.float32)

    def _enrolment(self, template: Template, request_key: str | None = None) -> Enrolment:
        return Enrolment(str(uuid.uuid4()), template, self._model, time.time(), request_key)

    @contextmanager
    def _deciding(self) -> Iterator[None]:
        """One decision at a time: threads of one process would only lose races to each other."""
        if not self._decision_lock.acquire(timeout=MAX_WAIT_SECONDS):
            raise _overloaded()
        try:
            yield
        finally:
            self._decision_lock.release()


def _is_duplicate(
    view: GalleryView, template: Template, duplicate_cosine: float, searched: GalleryView | None = None
) -> bool:
    best = view.search(template, since=searched)
    # `not <`, so that a threshold that is no number refuses.
    return bool(best) and not best[0].cosine < duplicate_cosine


def _overloaded() -> FaceError:
    return FaceError("overloaded", headers={"Retry-After": "1"})
