"""Requests of an evaluation to a server: several at a time, repeated where that helps.

What each way of not answering means stands in `endpoint_client`.
"""

import asyncio
import random
import sys
from collections.abc import Iterator, Sequence

from meme_llava.errors import UserError
from meme_llava.inference.endpoint_client import (
    CaptionClient,
    ImageRejected,
    StopAsking,
    TransientError,
    backoff_seconds,
)
from meme_llava.inference.endpoints import Endpoint
from meme_llava.inference.image_upload import encode_image, make_data_url
from meme_llava.inference.questions import Prediction, Question

MAX_SIDE = 1024  # pixels; the services scale larger images down themselves
ATTEMPTS = 5  # requests while none brings an answer
# A server that asks for a longer wait means another day.
LONGEST_ASKED_WAIT = 300.0
# What the OpenAI interface calls the end that a model chose; others cut the answer off.
ENDED_BY_ITSELF = "stop"


class NoAnswer(UserError):
    """All attempts at a request failed."""

    def __init__(self, message: str, fault: TransientError):
        super().__init__(message)
        self.fault = fault


def ask_endpoint(
    endpoint: Endpoint, requests: Sequence[Question], max_new_tokens: int, timeout: float
) -> Iterator[Prediction]:
    """Ask everything at the same time and give the answers in order.

    A request that is not taken, or to which no answer comes while others have theirs, has a problem.

    Raises:
        UserError: no answer came to any request, or none will; those before it were given.
    """
    outcomes = asyncio.run(_ask_all(endpoint, requests, max_new_tokens, timeout))
    some_came = any(isinstance(outcome, Prediction) for outcome in outcomes)
    for request, outcome in zip(requests, outcomes, strict=True):
        if isinstance(outcome, NoAnswer) and some_came:
            # It would stand in the way of all that come after it, for ever.
            yield Prediction(request, "", problem=f"unanswered: {outcome.fault}")
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            yield outcome


async def _ask_all(
    endpoint: Endpoint, requests: Sequence[Question], max_new_tokens: int, timeout: float
) -> list[Prediction | BaseException]:
    async with CaptionClient(endpoint, max_new_tokens, timeout) as client:
        said: set[str] = set()
        return await asyncio.gather(*(_ask(client, request, said) for request in requests), return_exceptions=True)


async def _ask(client: CaptionClient, request: Question, said: set[str]) -> Prediction:
    """The answer to one request. What a server does not do is told once for all of them, in `said`."""
    jpeg = await asyncio.to_thread(encode_image, request.image, MAX_SIDE)
    generator = random.Random()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            reply = await client.ask(make_data_url(jpeg), request.text, request.system)
        except TransientError as fault:
            if attempt == ATTEMPTS or (fault.wait or 0) > LONGEST_ASKED_WAIT:
                raise NoAnswer(
                    f"{request.image}: {client.endpoint.host} gave no answer in {attempt} attempts, the last time: "
                    f"{fault}. What was answered is kept; start the same command again later, which goes on.",
                    fault,
                ) from fault
            if str(fault) not in said:
                said.add(str(fault))
                print(f"{fault}; asking again", file=sys.stderr, flush=True)
            await asyncio.sleep(backoff_seconds(attempt, fault.wait, generator))
        except ImageRejected as error:
            return Prediction(request, "", problem=f"rejected: {error}")
        except StopAsking as error:
            raise UserError(f"{error}. What was answered is kept; the same command goes on.") from error
        else:
            if reply.refusal or reply.finish_reason == "content_filter":
                reason = reply.refusal or "stopped by the provider's content filter"
                return Prediction(request, "", reply.completion_tokens, problem=f"refusal: {reason}")
            if not reply.text:
                # A model that thinks may spend all of --max_new_tokens on thoughts.
                return Prediction(
                    request, "", reply.completion_tokens, problem=f"empty: finish_reason {reply.finish_reason!r}"
                )
            return Prediction(request, reply.text, reply.completion_tokens, reply.finish_reason == ENDED_BY_ITSELF)
    raise AssertionError("the last attempt returns or raises")
