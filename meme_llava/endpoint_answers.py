"""Knows how the requests of an evaluation are made of a server: several at a time, again where that helps.

What each way of not answering means stands in `caption_client`.
"""

import asyncio
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from meme_llava.caption_client import CaptionClient, PassingFault, PictureRejected, StopAsking, choose_wait
from meme_llava.endpoints import Endpoint
from meme_llava.errors import UserError
from meme_llava.given_answer import GivenAnswer
from meme_llava.picture_upload import encode_picture, make_data_url

MAX_SIDE = 1024  # pixels; the services scale larger pictures down themselves
ATTEMPTS = 5  # requests while none brings an answer
# A server that asks for a longer wait means another day.
LONGEST_ASKED_WAIT = 300.0
# What the OpenAI interface calls the end that a model chose; others cut the answer off.
ENDED_BY_ITSELF = "stop"


@dataclass(frozen=True)
class Request:
    """A picture and what is asked about it."""

    picture: Path
    prompt: str
    system: str | None = None


def ask_endpoint(
    endpoint: Endpoint, requests: Sequence[Request], max_new_tokens: int, timeout: float
) -> Iterator[GivenAnswer]:
    """Ask everything at the same time and give the answers in order. A picture that is not taken has a problem.

    Raises:
        UserError: no answer came to one of the requests; those before it were given.
    """
    for outcome in asyncio.run(_ask_all(endpoint, requests, max_new_tokens, timeout)):
        if isinstance(outcome, BaseException):
            raise outcome
        yield outcome


async def _ask_all(
    endpoint: Endpoint, requests: Sequence[Request], max_new_tokens: int, timeout: float
) -> list[GivenAnswer | BaseException]:
    async with CaptionClient(endpoint, max_new_tokens, timeout) as client:
        said: set[str] = set()
        return await asyncio.gather(*(_ask(client, request, said) for request in requests), return_exceptions=True)


async def _ask(client: CaptionClient, request: Request, said: set[str]) -> GivenAnswer:
    """The answer to one request. What a server does not do is told once for all of them, in `said`."""
    jpeg = await asyncio.to_thread(encode_picture, request.picture, MAX_SIDE)
    generator = random.Random()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            reply = await client.ask(make_data_url(jpeg), request.prompt, request.system)
        except PassingFault as fault:
            if attempt == ATTEMPTS or (fault.wait or 0) > LONGEST_ASKED_WAIT:
                raise UserError(
                    f"{request.picture}: {client.endpoint.host} gave no answer in {attempt} attempts, the last time: "
                    f"{fault}. What was answered is kept; start the same command again later, which goes on."
                ) from fault
            if str(fault) not in said:
                said.add(str(fault))
                print(f"{fault}; asking again", file=sys.stderr, flush=True)
            await asyncio.sleep(choose_wait(attempt, fault.wait, generator))
        except PictureRejected as error:
            return GivenAnswer("", problem=f"rejected: {error}")
        except StopAsking as error:
            raise UserError(f"{error}. What was answered is kept; the same command goes on.") from error
        else:
            if reply.refusal:
                return GivenAnswer("", reply.completion_tokens, problem=f"refused: {reply.refusal}")
            return GivenAnswer(reply.text, reply.completion_tokens, reply.finish_reason == ENDED_BY_ITSELF)
    raise AssertionError("the last attempt returns or raises")
