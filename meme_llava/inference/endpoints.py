"""Known OpenAI-compatible endpoints and what must be said of another. Keys come from the environment."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from meme_llava.errors import UserError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Preset:
    """What is known of a provider.

    The models named are those of November 2026; providers retire models, --model takes any other one.
    """

    base_url: str
    model: str | None
    key_variable: str | None
    # The name of the field that limits an answer: newer models of OpenAI refuse the older name, others know no newer.
    limit_name: str = "max_tokens"


PRESETS = {
    "gpt-4o": Preset("https://api.openai.com/v1", "gpt-4o", "OPENAI_API_KEY", "max_completion_tokens"),
    "gemini": Preset("https://generativelanguage.googleapis.com/v1beta/openai/", "gemini-3.8-flash", "GEMINI_API_KEY"),
    "claude": Preset("https://api.anthropic.com/v1/", "claude-sonnet-5", "ANTHROPIC_API_KEY"),
    "yi-vision": Preset("https://api.lingyiwanwu.com/v1", "yi-vision", "YI_API_KEY"),
    "glm": Preset("https://open.bigmodel.cn/api/paas/v4", "glm-4.6v", "ZHIPUAI_API_KEY"),
    "local": Preset("http://127.0.0.1:8000/v1", None, None),
}


@dataclass(frozen=True)
class Endpoint:
    """Where to ask which model. `key` is not shown when an Endpoint is printed."""

    base_url: str
    model: str
    limit_name: str
    key_variable: str | None
    key: str

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r}, {self.model!r})"

    @property
    def host(self) -> str:
        """Host name, with the port where there is one."""
        return urlsplit(self.base_url).netloc


def check_client() -> None:
    """Raise UserError where the package that asks servers is not installed."""
    if importlib.util.find_spec("openai") is None:
        raise UserError("asking a server needs openai: pip install -r configs/requirements/other_models.txt")


def find_endpoint(
    preset: str | None,
    base_url: str | None,
    model: str | None,
    key_variable: str | None,
    environment: Mapping[str, str],
) -> Endpoint:
    """Put preset and overrides together and take the key from the environment.

    Raises:
        UserError: no address, no model, or no key where one is needed. No message holds a key.
    """
    if preset is None and base_url is None:
        raise UserError(f"give --preset ({', '.join(PRESETS)}) or --base_url")
    known = PRESETS[preset] if preset is not None else Preset(base_url, None, None)
    base_url = base_url or known.base_url
    host = _check_base_url(base_url)
    model = model or known.model
    if not model:
        raise UserError(f"give --model: the name by which the server at {host} knows its model")
    key_variable = key_variable or known.key_variable
    if key_variable is None and host not in LOOPBACK:
        raise UserError(f"give --key_variable: the name of the environment variable that holds the key for {host}")
    # The client wants some key; a local server does not look at it.
    key = environment.get(key_variable, "").strip() if key_variable else "none"
    if not key:
        raise UserError(f"the environment variable {key_variable} is not set; export {key_variable} with your key")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise UserError(f"the environment variable {key_variable} holds characters that no key has; export it again")
    return Endpoint(base_url, model, known.limit_name, key_variable, key)


def _check_base_url(base_url: str) -> str:
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    # The value is not repeated: a key may stand in it.
    if not usable:
        raise UserError("--base_url is not an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise UserError("--base_url holds more than host and path; keys come from the environment only")
    return parts.hostname
