"""The proxy that the environment names, as the libraries that download and ask can use it."""

import importlib.util
import os
import re
from urllib.request import getproxies

from meme_llava.errors import UserError

_SCHEMES = ("http", "https", "socks5", "socks5h")


def check_proxy() -> None:
    """Raise UserError if http or https go through a proxy that no connection here can use."""
    proxies = getproxies()
    if proxies.get("no") == "*":
        return
    for name in ("http", "https", "all"):
        # Without a scheme it is an http proxy.
        scheme, separator, place = proxies.get(name, "").rpartition("://")
        if not separator:
            continue
        variable = next((one for one in (f"{name}_proxy", f"{name.upper()}_PROXY") if os.environ.get(one)), name)
        shown = f"the variable {variable} is {scheme}://{re.sub('.*@', '***@', place)}"
        if scheme.lower() not in _SCHEMES:
            advice = (
                f"write socks5://{re.sub('.*@', '***@', place)}" if scheme.lower().startswith("socks") else "correct it"
            )
            raise UserError(f"{shown}, expected http://, https://, socks5:// or socks5h://; {advice}")
        if scheme.lower().startswith("socks") and importlib.util.find_spec("socksio") is None:
            raise UserError(f"{shown}, which needs one more package: pip install -r requirements.txt")
