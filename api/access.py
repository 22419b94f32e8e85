"""Owns who may call: API keys' scopes, web origins, rate limits, and the lock-out of guessed identities."""

from __future__ import annotations

import ipaddress
import logging
import math
import time
from collections.abc import Callable
from typing import TypeVar

from flask import Flask, Response, current_app, request
from limits import RateLimitItem, parse
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from limits.strategies import SlidingWindowCounterRateLimiter

from api.api_keys import KeyChain, KeysError
from api.request_record import current_record
from errors import FaceError
from settings import Settings, SettingsError

logger = logging.getLogger("face_api")

PUBLIC = "public"
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
# A network gives a household or a phone an IPv6 prefix of this length, and every address in it.
IPV6_PREFIX = 64
# What a reverse proxy adds to a request that it passes on.
PROXY_HEADERS = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")
# A storage that accepts connections and says nothing would hold each request, and soon every thread, for ever. Once it
# has failed, one request in so many seconds finds out whether it is back.
STORAGE_TIMEOUT_S = 2.0
STORAGE_PAUSE_S = 5.0

View = TypeVar("View", bound=Callable[..., object])
Result = TypeVar("Result")


def scope(name: str) -> Callable[[View], View]:
    """Mark a view with the scope that a key needs for it, or `PUBLIC`; a view that is not marked is for `ops`."""

    def mark(view: View) -> View:
        view.scope = name  # type: ignore[attr-defined]  # functions carry attributes, which types do not tell
        return view

    return mark


class Access:
    """The gate before every view. Limits and lock-outs hold once there are API keys; without, loopback alone calls.

    Raises:
        SettingsError: keys, limits or origins that cannot be used, or an address that is not safe without keys.
    """

    def __init__(self, settings: Settings) -> None:
        self._keys = KeyChain(settings)
        self._origins = frozenset(one.strip().rstrip("/") for one in settings.cors_origins.split(",") if one.strip())
        self._any_host = settings.allow_no_keys
        self._ask_again = 0.0  # when the storage of the limits, which is away, is asked again; 0: it is there
        self._per_key = _limit("RATE_LIMIT_KEY", settings.rate_limit_key)
        self._per_address = _limit("RATE_LIMIT_ADDRESS", settings.rate_limit_address)
        self._lockout = _limit("LOCKOUT", settings.lockout)
        try:
            self._limiter = SlidingWindowCounterRateLimiter(
                storage_from_string(settings.limits_storage, **_storage_options(settings.limits_storage))
            )
        except (ConfigurationError, StorageError, ValueError) as error:
            raise SettingsError(
                "LIMITS_STORAGE cannot be used: memory://, redis://host:6379 (with the package redis) or mongodb://..."
            ) from error
        known = f"HOST={settings.host}" if settings.host not in LOOPBACK_NAMES else ""
        known = known or (f"TRUSTED_PROXIES={settings.trusted_proxies}" if settings.trusted_proxies else "")
        if known and not (self._keys.needed or settings.allow_no_keys):
            raise SettingsError(
                f"there is no API key yet, and {known} is more than this machine: make one with "
                "`python app.py keys add NAME`, or set ALLOW_NO_KEYS=true if everybody who can connect may enrol"
            )
        if self._keys.needed:
            logger.info("API keys: %s", ", ".join(key.name for key in self._keys.current()))
        else:
            level = logging.INFO if settings.host in LOOPBACK_NAMES else logging.WARNING
            logger.log(level, "No API keys: whoever reaches %s may do everything", settings.host)

    def guard(self, app: Flask) -> None:
        """Stand before every view of `app`, and answer browsers' questions about origins."""
        app.before_request(self._admit)
        app.after_request(self._name_origin)

    def claim(self, user_id: str) -> None:
        """Count a comparison with one person; FaceError `rate_limited` while that person is locked out."""
        if self._lockout and self._keys.needed:
            self._count(self._lockout, "claim", user_id, sentence="locked_out")

    def proven(self, user_id: str) -> None:
        """Forget the failed comparisons with a person who has been verified."""
        if self._lockout and self._keys.needed:
            self._forget(self._lockout, user_id)

    def _forget(self, item: RateLimitItem, user_id: str) -> None:
        self._stored(lambda: self._limiter.clear(item, "claim", user_id))

    def _admit(self) -> Response | None:
        origin = request.headers.get("Origin")
        if origin is not None and not self._is_welcome(origin):
            raise FaceError("forbidden", "foreign_origin")
        if request.method == "OPTIONS" and origin in self._origins:
            return Response(status=204)
        view = current_app.view_functions.get(request.endpoint or "")
        needed = getattr(view, "scope", "ops")
        if view is None or needed == PUBLIC:
            return None
        record = current_record()
        record.origin_accepted = True
        if not self._needs_keys():
            # Whoever comes through a proxy comes from elsewhere, though the proxy is on this machine; and of what it
            # reads a page tells no origin, so that a web site whose own name points here shows by that name alone.
            proxied = any(name in request.headers for name in PROXY_HEADERS)
            if not self._any_host and (proxied or (request.method in ("GET", "HEAD") and not _named_as_this_machine())):
                raise FaceError("forbidden", "not_from_here")
            return None
        if self._per_address:
            self._count(self._per_address, "address", _network(request.remote_addr))
        name = self._name_of_key(needed)
        if self._per_key:
            self._count(self._per_key, "key", name)
        return None

    def _needs_keys(self) -> bool:
        self._readable(self._keys.current)
        return self._keys.needed

    @staticmethod
    def _readable(ask: Callable[[], Result]) -> Result:
        try:
            return ask()
        except KeysError as error:
            logger.exception("The API keys cannot be read, so nobody is let in")
            raise FaceError("not_ready", headers={"Retry-After": "30"}) from error

    def _name_of_key(self, needed: str) -> str:
        sent = request.headers.get("X-API-Key") or ""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        secret = token.strip() if kind.lower() == "bearer" else sent
        if not secret:
            raise FaceError("unauthorized", headers={"WWW-Authenticate": "Bearer"})
        key = self._readable(lambda: self._keys.find(secret))
        if key is None:
            raise FaceError(
                "unauthorized",
                "unknown_key",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        current_record().api_key_name = key.name  # the logs name the key of a refused request, too
        if needed not in key.scopes:
            raise FaceError("forbidden", "missing_scope", values={"scope": needed})
        return key.name

    def _is_welcome(self, origin: str) -> bool:
        if origin in self._origins:
            return True
        # A page of this very service. Without keys it must also be called by a name of this machine: else any web
        # site could have its own name point here, and be the same origin.
        safe = self._keys.needed or self._any_host or _named_as_this_machine()
        return origin.partition("://")[2] == request.host and safe

    def _name_origin(self, response: Response) -> Response:
        if self._origins:
            response.vary.add("Origin")
        origin = request.headers.get("Origin")
        if origin in self._origins:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "X-Request-ID, Retry-After"
            response.headers["Cross-Origin-Resource-Policy"] = "cross-origin"
            if request.method == "OPTIONS":
                response.headers["Access-Control-Allow-Methods"] = "GET, POST, DELETE"
                response.headers["Access-Control-Allow-Headers"] = (
                    "Authorization, X-API-Key, X-Request-ID, Idempotency-Key, Accept-Language"
                )
                response.headers["Access-Control-Max-Age"] = "3600"
        return response

    def _count(self, item: RateLimitItem, kind: str, whose: str, *, sentence: str | None = None) -> None:
        """Count one; FaceError `rate_limited`."""
        if self._stored(lambda: self._limiter.hit(item, kind, whose)):
            return
        reset = self._stored(lambda: self._limiter.get_window_stats(item, kind, whose).reset_time)
        wait = max(1, math.ceil(reset - time.time()))
        raise FaceError("rate_limited", sentence, headers={"Retry-After": str(wait)})

    def _stored(self, ask: Callable[[], Result]) -> Result:
        now, away = time.monotonic(), FaceError("not_ready", headers={"Retry-After": f"{STORAGE_PAUSE_S:g}"})
        if now < self._ask_again:
            raise away
        if self._ask_again:
            self._ask_again = now + STORAGE_PAUSE_S  # the others need not wait for what becomes of this one
        try:
            answer = ask()
        except StorageError as error:
            self._ask_again = time.monotonic() + STORAGE_PAUSE_S
            reason = type(error.__cause__).__name__
            logger.warning("LIMITS_STORAGE cannot be reached (%s): requests are turned away", reason)
            raise away from error
        self._ask_again = 0.0
        return answer


def _named_as_this_machine() -> bool:
    name, _, port = request.host.rpartition(":")
    return (name if port.isdigit() else request.host).strip("[]") in LOOPBACK_NAMES


def _storage_options(uri: str) -> dict[str, float | bool]:
    """How the storage of the limits is asked: never for long, and with one kind of error when it cannot be reached."""
    options: dict[str, float | bool] = {} if uri.startswith("memory") else {"wrap_exceptions": True}
    if uri.startswith("mongodb"):
        names = ("serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS")
        options |= dict.fromkeys(names, 1000 * STORAGE_TIMEOUT_S)
    elif uri.startswith(("redis", "valkey")):
        options |= dict.fromkeys(("socket_timeout", "socket_connect_timeout"), STORAGE_TIMEOUT_S)
    return options


def _limit(name: str, text: str) -> RateLimitItem | None:
    if text.strip().lower() in ("", "off"):  # an empty line of .env asks for the default, so that off needs a word
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(f"{name} is {text!r}, and no limit such as 60/minute, 10/15 minutes or off") from error


def _network(address: str | None) -> str:
    """Whom an address stands for: itself, or its IPv6 network; without the port that some proxies add."""
    text = (address or "").strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False).network_address)
    return str(parsed)
