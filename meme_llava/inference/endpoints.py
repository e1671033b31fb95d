"""Known OpenAI-compatible endpoints and what must be said of another. Keys come from the environment."""

import importlib.util
import os
from dataclasses import dataclass, field, replace
from urllib.parse import urlsplit

from meme_llava.errors import UserError
from meme_llava.storage.proxy import check_proxy


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model. The key is not shown when an Endpoint is printed."""

    base_url: str
    model: str | None
    key_variable: str | None = None
    # The name of the field that limits an answer: newer models of OpenAI refuse the older name, others know no newer.
    limit_name: str = "max_tokens"
    key: str = field(default="none", repr=False)  # the client wants some; a local server does not look at it

    @property
    def host(self) -> str:
        """Host name, with the port where there is one."""
        return urlsplit(self.base_url).netloc

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine."""
        return urlsplit(self.base_url).hostname in ("localhost", "127.0.0.1", "::1")


# What is known of providers. The models are those of November 2026; providers retire models, --model takes any other.
PRESETS = {
    "gpt-4o": Endpoint("https://api.openai.com/v1", "gpt-4o", "OPENAI_API_KEY", "max_completion_tokens"),
    "gemini": Endpoint(
        "https://generativelanguage.googleapis.com/v1beta/openai/", "gemini-3.8-flash", "GEMINI_API_KEY"
    ),
    "claude": Endpoint("https://api.anthropic.com/v1/", "claude-sonnet-5", "ANTHROPIC_API_KEY"),
    "yi-vision": Endpoint("https://api.lingyiwanwu.com/v1", "yi-vision", "YI_API_KEY"),
    "glm": Endpoint("https://open.bigmodel.cn/api/paas/v4", "glm-4.6v", "ZHIPUAI_API_KEY"),
    "local": Endpoint("http://127.0.0.1:8000/v1", None),
}


def find_endpoint(arguments) -> Endpoint:
    """Put preset, base_url, model and key_variable of the settings together and take the key from the environment.

    Raises UserError where one is missing, the key is, openai is not installed, or the environment's proxy cannot be
    used. No message holds a key.
    """
    if importlib.util.find_spec("openai") is None:
        raise UserError("asking a server needs openai: pip install -r configs/requirements/other_models.txt")
    if arguments.preset is None and arguments.base_url is None:
        raise UserError(f"give --preset ({', '.join(PRESETS)}) or --base_url")
    known = Endpoint(arguments.base_url, None) if arguments.preset is None else PRESETS[arguments.preset]
    given = {name: getattr(arguments, name) for name in ("base_url", "model", "key_variable")}
    endpoint = replace(known, **{name: value for name, value in given.items() if value})
    _check_base_url(endpoint.base_url)
    if not endpoint.is_local:
        check_proxy()
    if not endpoint.model:
        raise UserError(f"give --model: the name by which the server at {endpoint.host} knows its model")
    variable = endpoint.key_variable
    if variable is None:
        if not endpoint.is_local:
            raise UserError(
                f"give --key_variable: the name of the environment variable that holds the key for {endpoint.host}"
            )
        return endpoint
    key = os.environ.get(variable, "").strip()
    if not key:
        raise UserError(f"the environment variable {variable} is not set; export {variable} with your key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the environment variable {variable} holds characters that no key has; export it again")
    return replace(endpoint, key=key)


def _check_base_url(base_url: str) -> None:
    """Raise UserError unless it is host and path. It is not repeated: a key may stand in it."""
    try:
        parts = urlsplit(base_url)
        is_address = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        is_address = False
    if not is_address or parts.username or parts.password or parts.query or parts.fragment:
        raise UserError(
            "--base_url is not an address of host and path alone, such as http://127.0.0.1:8000/v1; keys come from the "
            "environment only"
        )
