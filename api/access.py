"""Decides who may call: API keys' scopes, web origins, rate limits, and the lock-out of guessed identities."""

from __future__ import annotations

import ipaddress
import logging
import math
import re
import time
from collections.abc import Callable
from typing import TypeVar

from flask import Flask, Response, current_app, request
from limits import RateLimitItem, parse
from limits.errors import ConfigurationError, StorageError
from limits.storage import storage_from_string
from limits.strategies import SlidingWindowCounterRateLimiter

from api.api_keys import ApiKey, ApiKeysError, KeyChain
from api.request_log import current_record
from errors import FaceError
from settings import LOOPBACK_NAMES, Settings, SettingsError

logger = logging.getLogger(__name__)

PUBLIC = "public"
# A network gives a household or a phone all addresses of an IPv6 prefix of this length.
IPV6_PREFIX_BITS = 64
# Headers that a reverse proxy adds to a request.
PROXY_HEADERS = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")
# A storage of the limits that accepts connections but never answers would hold every thread for ever.
STORAGE_TIMEOUT_S = 2.0
# After a failure of that storage, one request in this many seconds tries it again.
STORAGE_PAUSE_S = 5.0
# A web origin as browsers write it. Apps have schemes of their own, such as capacitor://localhost.
_ORIGIN = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<host>[a-z0-9._-]+|\[[0-9a-f:.]+\])(?P<port>:[0-9]{1,5})?")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}

View = TypeVar("View", bound=Callable[..., object])
Result = TypeVar("Result")


def scope(name: str) -> Callable[[View], View]:
    """Mark a view with the scope that an API key needs for it, or `PUBLIC`. An unmarked view needs `ops`."""

    def mark(view: View) -> View:
        view.scope = name  # type: ignore[attr-defined]  # functions carry attributes that types do not describe
        return view

    return mark


class Access:
    """The gate before every view. With API keys, limits and lock-outs hold; without, only this machine may call.

    Raises:
        SettingsError: API keys, limits or origins that cannot be used, or an address that is not safe without keys.
    """

    def __init__(self, settings: Settings) -> None:
        self._api_keys = KeyChain(settings)
        self._origins = parse_origins(settings.cors_origins)
        self._any_host = settings.allow_no_keys
        self._next_storage_try = 0.0  # by time.monotonic; 0 while the storage of the limits works
        self._per_api_key = _limit("RATE_LIMIT_KEY", settings.rate_limit_key)
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
        if not (settings.is_local or self._api_keys.needed or settings.allow_no_keys):
            opened_by = "TRUSTED_PROXIES" if settings.host in LOOPBACK_NAMES else "HOST"
            exposed = f"{opened_by}={getattr(settings, opened_by.lower())}"
            raise SettingsError(
                f"there is no API key yet, and {exposed} opens the service to other machines: make an API key with "
                "`python app.py keys add NAME`, or set ALLOW_NO_KEYS=true to let everybody who can connect enrol people"
            )
        if self._api_keys.needed:
            logger.info("API keys: %s", ", ".join(api_key.name for api_key in self._api_keys.current()))
        else:
            level = logging.INFO if settings.is_local else logging.WARNING
            logger.log(level, "No API keys: everybody who can connect to %s may do everything", settings.host)

    def guard(self, app: Flask) -> None:
        """Check every request to `app` before its view, and answer browsers' questions about origins."""
        app.before_request(self._admit)
        app.after_request(self._add_origin_headers)

    def count_claim(self, user_id: str) -> None:
        """Count a 1:1 comparison with a person; FaceError `rate_limited` while that person is locked out."""
        if self._lockout and self._api_keys.needed:
            self._count(self._lockout, "claim", user_id, sentence="locked_out")

    def require_unlocked(self, user_id: str) -> None:
        """Count nothing; FaceError `rate_limited` while that person is locked out."""
        lockout = self._lockout
        if lockout is None or not self._api_keys.needed:
            return
        if not self._ask_storage(lambda: self._limiter.test(lockout, "claim", user_id)):
            raise self._limited(lockout, "claim", user_id, "locked_out")

    def forget_claims(self, user_id: str) -> None:
        """Forget the failed 1:1 comparisons with a person who has now been verified."""
        lockout = self._lockout
        if lockout and self._api_keys.needed:
            self._ask_storage(lambda: self._limiter.clear(lockout, "claim", user_id))

    def _admit(self) -> Response | None:
        """Refuse the request, answer a preflight, or return None to let the request go on."""
        origin = request.headers.get("Origin")
        if origin is not None and not self._may_call(origin):
            raise FaceError("forbidden", "foreign_origin")
        if request.method == "OPTIONS" and origin in self._origins:
            return Response(status=204)
        view = current_app.view_functions.get(request.endpoint or "")
        needed_scope = getattr(view, "scope", "ops")
        if view is None or needed_scope == PUBLIC:
            return None
        record = current_record()
        record.origin_accepted = True
        network = network_of(request.remote_addr)
        record.client = ("", network)
        if not self._needs_api_keys():
            # A proxied request is not local, even if the proxy runs on this machine. Browsers send no Origin with GET,
            # so a DNS-rebinding page is caught by its Host header.
            proxied = any(name in request.headers for name in PROXY_HEADERS)
            if not self._any_host and (proxied or (request.method in ("GET", "HEAD") and not _host_is_this_machine())):
                raise FaceError("forbidden", "not_from_here")
            return None
        if self._per_address:
            self._count(self._per_address, "address", network)
        api_key = self._api_key_with(needed_scope)
        record.client = (api_key.sha256, network)
        if self._per_api_key:
            self._count(self._per_api_key, "key", api_key.name)
        return None

    def _needs_api_keys(self) -> bool:
        self._read_api_keys(self._api_keys.current)
        return self._api_keys.needed

    @staticmethod
    def _read_api_keys(read: Callable[[], Result]) -> Result:
        try:
            return read()
        except ApiKeysError as error:
            logger.exception("The API keys cannot be read, so nobody is let in")
            raise FaceError("not_ready", headers={"Retry-After": "30"}) from error

    def _api_key_with(self, needed_scope: str) -> ApiKey:
        """The API key that the request carries; FaceError `unauthorized`, `forbidden`."""
        kind, _, token = request.headers.get("Authorization", "").partition(" ")
        secret = token.strip() if kind.lower() == "bearer" else request.headers.get("X-API-Key") or ""
        if not secret:
            raise FaceError("unauthorized", headers={"WWW-Authenticate": "Bearer"})
        api_key = self._read_api_keys(lambda: self._api_keys.find(secret))
        if api_key is None:
            raise FaceError(
                "unauthorized",
                "unknown_key",
                headers={"WWW-Authenticate": 'Bearer error="invalid_token"'},
            )
        current_record().api_key = api_key  # before the scope is checked: the logs name the key of a refused request
        if needed_scope not in api_key.scopes:
            raise FaceError("forbidden", "missing_scope", values={"scope": needed_scope})
        return api_key

    def _may_call(self, origin: str) -> bool:
        if origin in self._origins:
            return True
        # A page of this very service. Without API keys the page must also use a name of this machine: otherwise any web
        # site could let its own name point here and count as the same origin.
        safe = self._api_keys.needed or self._any_host or _host_is_this_machine()
        return origin == f"{request.scheme}://{request.host}" and safe

    def _add_origin_headers(self, response: Response) -> Response:
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

    def _count(self, item: RateLimitItem, kind: str, subject: str, *, sentence: str | None = None) -> None:
        """Count one event of a subject; FaceError `rate_limited`."""
        if not self._ask_storage(lambda: self._limiter.hit(item, kind, subject)):
            raise self._limited(item, kind, subject, sentence)

    def _limited(self, item: RateLimitItem, kind: str, subject: str, sentence: str | None) -> FaceError:
        """The error `rate_limited`, with the seconds to wait."""
        reset = self._ask_storage(lambda: self._limiter.get_window_stats(item, kind, subject).reset_time)
        wait = max(1, math.ceil(reset - time.time()))
        return FaceError("rate_limited", sentence, headers={"Retry-After": str(wait)})

    def _ask_storage(self, ask: Callable[[], Result]) -> Result:
        """Ask the storage of the limits; FaceError `not_ready` while it is out of reach."""
        now, unreachable = time.monotonic(), FaceError("not_ready", headers={"Retry-After": f"{STORAGE_PAUSE_S:g}"})
        if now < self._next_storage_try:
            raise unreachable
        if self._next_storage_try:
            self._next_storage_try = now + STORAGE_PAUSE_S  # this request tries; the others do not wait for it
        try:
            answer = ask()
        except StorageError as error:
            self._next_storage_try = time.monotonic() + STORAGE_PAUSE_S
            reason = type(error.__cause__).__name__
            logger.warning("LIMITS_STORAGE cannot be reached (%s): requests are refused until it can", reason)
            raise unreachable from error
        self._next_storage_try = 0.0
        return answer


def parse_origins(text: str) -> frozenset[str]:
    """The origins of CORS_ORIGINS as browsers send them; SettingsError for one that no browser can send."""
    origins = set()
    for written in text.split(","):
        origin = written.strip().lower().removesuffix("/")
        if not origin:
            continue
        parts = _ORIGIN.fullmatch(origin)
        if parts is None:
            raise SettingsError(
                f"CORS_ORIGINS holds {written.strip()!r}, which can never match a browser's Origin: write each as "
                "scheme://host or scheme://host:port, without a path or *, with commas between them"
            )
        # A browser leaves the scheme's usual port out.
        origins.add(origin.removesuffix(_DEFAULT_PORTS.get(parts["scheme"], " ")))
    return frozenset(origins)


def _host_is_this_machine() -> bool:
    """Whether the request's Host header is a loopback name."""
    name, _, port = request.host.rpartition(":")
    return (name if port.isdigit() else request.host).strip("[]") in LOOPBACK_NAMES


def _storage_options(uri: str) -> dict[str, float | bool]:
    """Options for the storage of the limits: short timeouts, and one kind of error when it cannot be reached."""
    options: dict[str, float | bool] = {} if uri.startswith("memory") else {"wrap_exceptions": True}
    if uri.startswith("mongodb"):
        names = ("serverSelectionTimeoutMS", "connectTimeoutMS", "socketTimeoutMS")
        options |= dict.fromkeys(names, 1000 * STORAGE_TIMEOUT_S)
    elif uri.startswith(("redis", "valkey")):
        options |= dict.fromkeys(("socket_timeout", "socket_connect_timeout"), STORAGE_TIMEOUT_S)
    return options


def _limit(name: str, text: str) -> RateLimitItem | None:
    """A limit from its setting, None for off; SettingsError."""
    if text.strip().lower() in ("", "off"):  # in .env an empty line means the default, so there must be a word for off
        return None
    try:
        return parse(text)
    except ValueError as error:
        raise SettingsError(
            f"{name} is {text!r}; it must be a limit such as 60/minute or 10/15 minutes, or off"
        ) from error


def network_of(address: str | None) -> str:
    """The address without a port, or its network if it is IPv6; "unknown" if it cannot be read."""
    text = (address or "").strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:  # some proxies add the port
        text = text.partition(":")[0]
    try:
        parsed = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX_BITS), strict=False).network_address)
    return str(getattr(parsed, "ipv4_mapped", None) or parsed)
