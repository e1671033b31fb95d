"""Questions to a vision model behind an OpenAI-compatible endpoint, several at a time. Files are the caller's.

The client of openai repeats requests that fail. A key goes into the request and nowhere else: every text that leaves
this module has it blotted out.
"""

import asyncio
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import openai
from PIL import Image

from meme_llava.dataset.conversation import is_blank
from meme_llava.dataset.images import open_image, to_data_url
from meme_llava.errors import UserError
from meme_llava.inference.endpoints import Endpoint
from meme_llava.inference.questions import Prediction, Question

JPEG_QUALITY = 90
GRACE_SECONDS = 5.0  # for answers on their way when a person stops the run: they may be paid for
LONGEST_DETAIL = 300  # characters of a server's message that are kept
LONGEST_ANSWER = 1_000_000  # characters; what is longer would only take the time of whoever reads it
SHORTEST_SECRET = 8
GO_ON = "What was answered is kept; the same command goes on."
UNANSWERED = "unanswered"
# The endpoint or the account is wrong, for every question alike.
_FATAL = {
    401: "the key is not accepted",
    402: "the account has no credit",
    403: "the key is not allowed to do this",
    404: "there is no such model or address",
}


def ask_all(
    endpoint: Endpoint,
    questions: Iterable[Question],
    concurrency: int,
    max_new_tokens: int,
    timeout: float,
    *,
    temperature: float | None = None,
    retries: int = 4,
    tries: int = 2,
    max_side: int = 1024,
    lossless: bool = False,
    check: Callable[[Prediction], str | None] = lambda prediction: None,
) -> Iterator[tuple[int, Prediction, dict]]:
    """Ask everything, `concurrency` questions at a time, and give each prediction as it comes, with its place.

    A prediction without a usable answer has a problem, whose first word is its kind: unreadable (the image), rejected
    (the server does not take it), unanswered (all attempts failed), refusal, empty, loop (endless), or what `check`
    finds. The dict says what it cost: prompt_tokens and completion_tokens (None where none are reported), attempts and
    seconds.

    Args:
        questions: read as answers come; where it ends early, what is on its way still arrives.
        timeout: seconds to wait for an answer.
        temperature: None leaves it to the server.
        retries: of requests that fail (429, 5xx, timeouts, cut connections), never sooner than the server asks for.
        tries: answers bought of a question while they have a problem; one that is cut off is not asked for again.
        max_side: pixels; the services scale larger images down themselves.
        lossless: send PNG, so that the server's model sees the pixels that it would see here; JPEG is a tenth the size.
        check: what is wrong with an answer, as "kind: detail", or None.

    Raises:
        UserError: key, model or address are wrong, or the account is used up; after what was on its way has come.
    """
    client = openai.AsyncOpenAI(
        api_key=endpoint.key,
        base_url=endpoint.base_url,
        timeout=timeout,
        max_retries=retries,
        # A proxy of the machine cannot reach the machine's own server.
        http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if endpoint.is_local else None,
    )
    options = {"model": endpoint.model, endpoint.limit_name: max_new_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    asker = _Asker(endpoint, client, options, tries, max_side, lossless, check)
    waiting = enumerate(questions)
    places: dict[asyncio.Task, int] = {}  # of what is on its way
    stop: BaseException | None = None
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        interrupt = loop.create_future()
        # Ctrl-C while the caller writes an answer must not end its loop, too: the others on their way are paid for.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            loop.add_signal_handler(signal.SIGINT, lambda: interrupt.done() or interrupt.set_result(None))
        try:
            while True:
                if stop is None:
                    for place, question in itertools.islice(waiting, concurrency - len(places)):
                        places[loop.create_task(asker.ask(question))] = place
                if not places:
                    break
                done, _ = runner.run(asyncio.wait([*places, interrupt], return_when=asyncio.FIRST_COMPLETED))
                if interrupt in done:
                    loop.remove_signal_handler(signal.SIGINT)  # once more ends everything
                    stop = KeyboardInterrupt()
                    grace = f"up to {GRACE_SECONDS:g} s for answers on their way (once more: at once)"
                    print(f"stopping: {grace}", file=sys.stderr, flush=True)
                    done, _ = runner.run(asyncio.wait(places, timeout=GRACE_SECONDS))
                    places = {task: places[task] for task in done}
                for task in done:
                    place = places.pop(task)
                    if isinstance(error := task.exception(), UserError):
                        stop = error
                    else:
                        yield place, *task.result()
        finally:
            runner.run(client.close())
    if stop is not None:
        raise stop


def ask_in_order(
    endpoint: Endpoint, questions: Sequence[Question], max_new_tokens: int, timeout: float, **options
) -> Iterator[Prediction]:
    """Ask everything at the same time, with images as they are; predictions come in the order of the questions, without
    text if refused.

    Raises UserError where no question can be answered, or none was; those before it were given.
    """
    came: dict[int, Prediction] = {}
    held: list[Prediction] = []  # without an answer; an answer behind them shows that it is not the server
    due = 0
    together = len(questions)
    for place, prediction, _ in ask_all(
        endpoint, questions, together, max_new_tokens, timeout, lossless=True, **options
    ):
        came[place] = replace(prediction, text="", stopped=None) if prediction.problem else prediction
        while due in came:
            held.append(came.pop(due))
            due += 1
            if not (held[-1].problem or "").startswith(UNANSWERED):
                yield from held
                held = []
    if held and len(held) == len(questions):
        raise UserError(f"{endpoint.host} gave no answer, the last time: {held[-1].problem}. {GO_ON}")
    yield from held


@dataclass(frozen=True)
class _Asker:
    """One question at a time; the arguments as in `ask_all`."""

    endpoint: Endpoint
    client: openai.AsyncOpenAI
    options: dict  # of every request
    tries: int
    max_side: int
    lossless: bool
    check: Callable[[Prediction], str | None]

    async def ask(self, question: Question) -> tuple[Prediction, dict]:
        """The last answer to a question, and what all of them cost. Raises UserError where no question has one."""
        start = time.monotonic()
        cost = {"prompt_tokens": None, "completion_tokens": None, "attempts": 0}
        prediction = await self._ask(question, cost)
        return prediction, cost | {"seconds": round(time.monotonic() - start, 2)}

    async def _ask(self, question: Question, cost: dict) -> Prediction:
        try:
            url = await asyncio.to_thread(encode_image, question.image, self.max_side, self.lossless)
        except ValueError as error:
            return Prediction(question, "", problem=f"unreadable: {error}")
        content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": question.text}]
        messages = [] if question.system is None else [{"role": "system", "content": question.system}]
        messages.append({"role": "user", "content": content})
        create = self.client.chat.completions.with_raw_response.create
        prediction = None
        for _ in range(self.tries):
            try:
                response = await create(messages=messages, **self.options)
            except openai.APIError as error:
                cost["attempts"] += 1 + _count_retries(error)
                # An answer that is no good was paid for all the same.
                return prediction or Prediction(question, "", problem=self._explain(error))
            cost["attempts"] += 1 + response.retries_taken
            prediction = self._read(question, response, cost)
            if prediction.problem is None:
                prediction = replace(prediction, problem=self.check(prediction))
            if prediction.problem is None or prediction.problem.startswith("cut"):
                break
        return prediction

    def _read(self, question: Question, response, cost: dict) -> Prediction:
        """The answer in a response that came with status 200, whatever it holds."""
        try:
            completion = response.parse()
            choice = completion.choices[0]
            text, refusal = (choice.message.content or "").strip(), getattr(choice.message, "refusal", None)
            text.encode(), (refusal or "").encode()  # half a surrogate pair can be written nowhere
        except (ValueError, TypeError, IndexError, AttributeError, openai.APIError) as error:
            begin = self._shorten(response.text[:80])
            found = f"status 200, but no completion ({type(error).__name__}); it begins {begin!r}"
            return Prediction(question, "", problem=f"{UNANSWERED}: {found}")
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = getattr(completion.usage, name, None)
            if tokens is not None:
                cost[name] = (cost[name] or 0) + tokens
        if refusal or choice.finish_reason == "content_filter":
            problem = f"refusal: {refusal or 'stopped by the provider’s content filter'}"
        elif len(text) > LONGEST_ANSWER:
            problem = f"loop: {len(text):,} characters, expected at most {LONGEST_ANSWER:,}"
            text = text[:LONGEST_DETAIL]
        else:
            # A model that thinks may spend all of --max_new_tokens on thoughts.
            kind = "cut" if choice.finish_reason == "length" else "empty"
            problem = f"{kind}: no text, finish_reason {choice.finish_reason!r}" if is_blank(text) else None
        is_whole = {"stop": True, "length": False}.get(choice.finish_reason)
        return Prediction(question, self._blot(text), tokens, is_whole, problem and self._blot(problem))

    def _explain(self, error: openai.APIError) -> str:
        """What a failed request means for its question. Raises UserError where it means the same for all others."""
        host = self.endpoint.host
        if isinstance(error, openai.APITimeoutError):
            return f"{UNANSWERED}: no answer within {self.client.timeout:g} s"
        if not isinstance(error, openai.APIStatusError):
            cause = error.__cause__ or error
            found = self._shorten(f"{type(cause).__name__}: {cause}")
            hint = f"; see whether the server at {host} runs" if self.endpoint.is_local else ""
            return f"{UNANSWERED}: the connection failed ({found}){hint}"
        # The server's own words, without the wrapping of JSON where it is known.
        said = error.body.get("message", error.body) if isinstance(error.body, dict) else error.body
        status, said = error.status_code, self._shorten(str(said or ""))
        detail = f"HTTP {status}" + (f": {said}" if said else "")
        # OpenAI says 429 both for "slower" and for "your credit is used up".
        if status in _FATAL or error.code == "insufficient_quota":
            variable = self.endpoint.key_variable
            key = f"key from {variable}" if variable else "no key was sent; --key_variable names one"
            meaning = _FATAL.get(status, _FATAL[402])
            raise UserError(f"{host} answered {detail}; {meaning} (model {self.endpoint.model}, {key}). {GO_ON}")
        if status not in (408, 409, 425, 429) and status < 500:
            return f"rejected: {detail}"
        # The client does not repeat a request where it would have to wait for more than two minutes.
        wait = error.response.headers.get("retry-after")
        if wait is not None and self.client.max_retries and _count_retries(error) == 0:
            raise UserError(f"{host} answered {detail} and asks to wait (Retry-After: {wait}). {GO_ON}")
        return f"{UNANSWERED}: {detail}"

    def _blot(self, text: str) -> str:
        # Local servers take any word as key; such a word is not a secret and may stand in a caption.
        is_secret = len(self.endpoint.key) >= SHORTEST_SECRET
        return text.replace(self.endpoint.key, "[key]") if is_secret else text

    def _shorten(self, text: str) -> str:
        printable = "".join(character for character in " ".join(self._blot(text).split()) if character.isprintable())
        return printable if len(printable) <= LONGEST_DETAIL else printable[:LONGEST_DETAIL] + "…"


def _count_retries(error: openai.APIError) -> int:
    return int(error.request.headers.get("x-stainless-retry-count", 0))


def encode_image(path: Path, max_side: int, lossless: bool = False) -> str:
    """An image as training sees it, at most `max_side` pixels a side, as a data URL. Raises ValueError for no image."""
    image = open_image(path)
    image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS, reducing_gap=None)
    return to_data_url(image, "PNG") if lossless else to_data_url(image, "JPEG", JPEG_QUALITY)
