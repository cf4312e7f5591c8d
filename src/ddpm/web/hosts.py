"""Which requests are for this server: a page from elsewhere, open in a browser on this machine, must not use it."""

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send


class OwnHostsOnly:
    """Refuses requests whose Host header names another server, and those that a page of another origin sends.

    A foreign name can lead to this machine (DNS rebinding), an IP address is what it says.
    """

    def __init__(self, app: ASGIApp, names: set[str]):
        self.app, self.names = app, {name.lower() for name in names} | {"localhost"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (error := self._fault(Headers(scope=scope))):
            await JSONResponse({"error": error}, 403)(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    def _fault(self, headers: Headers) -> str | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_own(host):
            return f"Host: {host!r} is not this server; use its IP address or localhost, or start it with --host NAME"
        if origin is not None and urlsplit(origin).netloc != host:
            return f"Origin: {origin!r} may not use this server"
        return None

    def _is_own(self, host: str) -> bool:
        name = None
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname
        if name is None:
            return False
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return name in self.names
