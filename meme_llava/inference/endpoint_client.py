"""A client for a vision model behind an OpenAI-compatible endpoint, and what each way of not answering means.

Retries, files and images are the caller's. A key goes into the request and nowhere else: every text that leaves this
module has it blotted out.
"""

import asyncio
import json
import random
import time
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

import openai

from meme_llava.inference.endpoints import LOOPBACK, Endpoint

LONGEST_DETAIL = 300  # characters of a server's message that are kept
FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0
BLOTTED_KEY = "[key]"
SHORTEST_SECRET = 8
# The endpoint or the account is wrong, for every image alike.
_FATAL = {
    401: "the key is not accepted",
    402: "the account has no credit",
    403: "the key is not allowed to do this",
    404: "there is no such model or address",
}
# 408 and 409 are what gateways answer while a backend restarts.
_PASSING = (408, 409, 425, 429)


class StopAsking(Exception):
    """No image can be answered: the key, the model or the address is wrong."""


class ImageRejected(Exception):
    """The server does not take this image; asking again gives the same."""


class TransientError(Exception):
    """Asking again can help. `wait` is how many seconds the server asked to wait, or None."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


@dataclass(frozen=True)
class Completion:
    """What a model answered, paid for whether it is of use or not. Token counts are None where none are reported."""

    text: str
    refusal: str | None
    finish_reason: str | None
    prompt_tokens: int | None
    completion_tokens: int | None


class CaptionClient:
    """Asks one endpoint about one image at a time; use it with `async with`."""

    def __init__(self, endpoint: Endpoint, max_new_tokens: int, timeout: float):
        self.endpoint = endpoint
        self.timeout = timeout
        self._limit = {endpoint.limit_name: max_new_tokens}
        # A proxy of the machine cannot reach the machine's own server.
        self._is_local = urlsplit(endpoint.base_url).hostname in LOOPBACK
        self._client = openai.AsyncOpenAI(
            api_key=endpoint.key,
            base_url=endpoint.base_url,
            timeout=timeout,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if self._is_local else None,
        )

    async def __aenter__(self) -> "CaptionClient":
        return self

    async def __aexit__(self, *exception) -> None:
        await self._client.close()

    async def ask(self, data_url: str, prompt: str, system: str | None = None) -> Completion:
        """One request: the image, then the prompt.

        Raises:
            TransientError: no usable answer came (429, 5xx, timeout, cut connection, not a completion).
            ImageRejected: the server does not take this request.
            StopAsking: it takes none.
        """
        content = [{"type": "image_url", "image_url": {"url": data_url}}, {"type": "text", "text": prompt}]
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages.append({"role": "user", "content": content})
        create = self._client.chat.completions.with_raw_response.create
        try:
            # The client's own timeout starts anew with every byte that arrives.
            async with asyncio.timeout(self.timeout):
                response = await create(model=self.endpoint.model, messages=messages, **self._limit)
                body = response.content
        except (TimeoutError, openai.APITimeoutError):
            raise TransientError(f"no answer within {self.timeout:g} s") from None
        except openai.APIStatusError as error:
            raise self._sort(error) from None
        except openai.APIError as error:
            cause = error.__cause__ or error
            hint = f"; see whether the server at {self.endpoint.host} runs" if self._is_local else ""
            message = f"the connection failed ({type(cause).__name__}: {cause}){hint}"
            raise TransientError(self.clean(message)) from None
        return self._read(body)

    def clean(self, text: str) -> str:
        """A server's text without the key."""
        # Local servers take any word as key; such a word is not a secret and may stand in a caption.
        is_secret = len(self.endpoint.key) >= SHORTEST_SECRET
        return text.replace(self.endpoint.key, BLOTTED_KEY) if is_secret else text

    def _tell_key(self) -> str:
        variable = self.endpoint.key_variable
        return f"key from {variable}" if variable else "no key was sent; --key_variable names one"

    def _shorten(self, text: str) -> str:
        words = " ".join(self.clean(text).split())
        printable = "".join(character for character in words if character.isprintable())
        return printable if len(printable) <= LONGEST_DETAIL else printable[:LONGEST_DETAIL] + "…"

    def _sort(self, error: openai.APIStatusError) -> Exception:
        """What an HTTP status means for this image and for the others."""
        status = error.status_code
        said = self._shorten(_find_message(error))
        detail = f"HTTP {status}" + (f": {said}" if said else "")
        # OpenAI says 429 both for "slower" and for "your credit is used up".
        if status in _FATAL or error.code == "insufficient_quota":
            return StopAsking(
                f"{self.endpoint.host} answered {detail}; {_FATAL.get(status, _FATAL[402])} "
                f"(model {self.endpoint.model}, {self._tell_key()})"
            )
        if status in _PASSING or status >= 500:
            return TransientError(detail, parse_retry_after(error.response.headers.get("retry-after"), time.time()))
        return ImageRejected(detail)

    def _read(self, body: bytes) -> Completion:
        """The answer in a response that came with status 200, whatever it holds."""
        try:
            completion = json.loads(body)
            choice = completion["choices"][0]
            message = choice["message"]
            text, refusal = message.get("content") or "", message.get("refusal") or None
            text.encode(), (refusal or "").encode()  # half a surrogate pair can be written nowhere
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            start = self._shorten(body[:80].decode(errors="replace"))
            raise TransientError(
                f"status 200, but no completion ({type(error).__name__}); it begins {start!r}"
            ) from None
        usage = completion.get("usage")
        counts = [_read_count(usage, name) for name in ("prompt_tokens", "completion_tokens")]
        reason = choice.get("finish_reason")
        return Completion(self.clean(text).strip(), refusal and self.clean(refusal), reason, *counts)


def _read_count(usage, name: str) -> int | None:
    count = usage.get(name) if isinstance(usage, dict) else None
    return count if isinstance(count, int) and not isinstance(count, bool) and count >= 0 else None


def _find_message(error: openai.APIStatusError) -> str:
    """The server's own words, without the wrapping of JSON where it is known."""
    body = error.body
    if isinstance(body, dict):
        for key in ("message", "detail", "error"):
            if isinstance(body.get(key), str):
                return body[key]
        return json.dumps(body, ensure_ascii=False)
    return str(body or "")


def parse_retry_after(value: str | None, now: float) -> float | None:
    """Seconds to wait by a Retry-After header, which holds seconds or an HTTP date; None if it says neither.

    Args:
        now: seconds since 1970, UTC.
    """
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except ValueError:
            return None
        seconds = (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now
    return max(seconds, 0.0) if seconds < float("inf") else None


def backoff_seconds(faults: int, asked_wait: float | None, generator: random.Random) -> float:
    """Seconds to wait after a number of faults of an image: twice as long each time, shortened by chance by up to half.

    Never less than the server asked for. Chance keeps requests that failed together from coming back together.
    """
    longest = min(FIRST_WAIT_SECONDS * 2 ** (faults - 1), LONGEST_WAIT_SECONDS)
    return max(longest * generator.uniform(0.5, 1.0), asked_wait or 0.0)
