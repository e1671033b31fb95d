"""One run of requests about images: several at a time, repeated where that helps, and when to stop.

How a server is talked to stands in `endpoint_client`, how lines are kept in `caption_file`, what is asked in
`describing`.
"""

import asyncio
import contextlib
import random
import signal
import time
from collections.abc import Iterator

from meme_llava.dataset.images import resolve_image_path
from meme_llava.dataset.inspection import find_loop, find_refusal
from meme_llava.inference.endpoint_client import (
    CaptionClient,
    Completion,
    ImageRejected,
    StopAsking,
    TransientError,
    backoff_seconds,
)
from meme_llava.inference.image_upload import encode_image, make_data_url
from meme_llava.prepare.caption_file import CaptionLedger
from meme_llava.prepare.describing import UNANSWERED, DescribeArguments, Progress, Prompt
from meme_llava.storage.files import try_hash_file

# This many images set aside in a row, with none answered between them, are not an accident.
LONGEST_BAD_RUN = 10
# A server that asks for a longer wait means another day.
LONGEST_ASKED_WAIT = 300.0
GRACE_SECONDS = 5.0  # for answers on their way when a person stops the run: they may be paid for


def classify_reply(reply: Completion) -> tuple[str, str] | None:
    """Why a reply is not a caption, as a reason and the words that show it; None if it is one."""
    if reply.refusal or reply.finish_reason == "content_filter":
        return "refusal", reply.refusal or "stopped by the provider's content filter"
    if refused := find_refusal(reply.text):
        return "refusal", refused
    # Before the length: a loop runs into the limit too, but may end when asked again.
    if piece := find_loop(reply.text):
        return "loop", piece
    if reply.finish_reason == "length":
        return "cut", f"{reply.completion_tokens or 'its'} tokens were not enough"
    if not reply.text:
        return "empty", f"finish_reason {reply.finish_reason!r}"
    return None


class RequestStats:
    """What asking about one image has cost so far and brought."""

    def __init__(self):
        self.start = time.monotonic()
        self.requests = 0
        self.prompt_tokens: int | None = None
        self.completion_tokens: int | None = None
        self.faults = 0
        self.rejected_replies = 0
        self.bad: tuple[str, str, str] | None = None  # reason, detail and text of the last answer that is not a caption

    def add(self, reply: Completion) -> None:
        """Count a reply's tokens."""
        if reply.prompt_tokens is not None:
            self.prompt_tokens = (self.prompt_tokens or 0) + reply.prompt_tokens
        if reply.completion_tokens is not None:
            self.completion_tokens = (self.completion_tokens or 0) + reply.completion_tokens


class CaptionRun:
    """One run over the images of a folder.

    Args:
        client: asked about every image.
        ledger: gets one line for every image that is described or set aside.
        progress: told of every line after it was written.
        generator: draws how long waits are shortened.
    """

    def __init__(
        self,
        arguments: DescribeArguments,
        prompt: Prompt,
        client: CaptionClient,
        ledger: CaptionLedger,
        progress: Progress,
        generator: random.Random,
    ):
        self.arguments = arguments
        self.prompt = prompt
        self.client = client
        self.ledger = ledger
        self.progress = progress
        self.generator = generator
        self.stop_reason: str | None = None
        self.stop_is_error = False
        self.was_interrupted = False
        self.dropped = 0  # requests given up on their way
        self._bad_run = 0
        self._not_before = 0.0
        self._said: set[str] = set()

    async def run(self, names: list[str]) -> None:
        """Ask about the images. Returns when all have a line or the run was stopped; `stop_reason` says why."""
        self._stopping = asyncio.Event()
        self._hurried = asyncio.Event()
        self._watch_budget()
        queue = iter(names)
        tasks = [asyncio.create_task(self._work(queue)) for _ in range(self.arguments.concurrency)]
        hurried = asyncio.create_task(self._hurried.wait())
        with self._handle_signals():
            try:
                waiting = set(tasks)
                while waiting and not self._hurried.is_set():
                    done, _ = await asyncio.wait({*waiting, hurried}, return_when=asyncio.FIRST_COMPLETED)
                    waiting -= done
                    for task in done - {hurried}:
                        task.result()  # a fault of ours is raised here
            finally:
                hurried.cancel()
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def stop(self, reason: str, is_error: bool = True) -> None:
        """Start no further image and no further request; what is on its way may still arrive."""
        if self.stop_reason is None:
            self.stop_reason, self.stop_is_error = reason, is_error
        self._stopping.set()

    @contextlib.contextmanager
    def _handle_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()

        def interrupt() -> None:
            if self.was_interrupted:
                self._hurried.set()
                return
            self.was_interrupted = True
            self.progress.say(f"stopping: up to {GRACE_SECONDS:g} s for answers on their way (once more: at once)")
            self.stop("interrupted")
            loop.call_later(GRACE_SECONDS, self._hurried.set)

        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, interrupt)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def _work(self, queue: Iterator[str]) -> None:
        for name in queue:
            if self._stopping.is_set():
                return
            entry = await self._describe(name)
            if entry is None:
                return
            # Nothing is awaited between the answer and its line, so no cancelling comes between them.
            self.ledger.append(entry)
            self.progress.advance(entry)
            self._watch(entry)

    def _watch(self, entry: dict) -> None:
        """Stop the run where going on would only burn images or money."""
        reason = entry.get("set_aside")
        if reason != "unreadable":
            self._bad_run = 0 if reason is None else self._bad_run + 1
        if self._bad_run >= LONGEST_BAD_RUN:
            again = "" if reason == UNANSWERED else " with --retry_set_aside"
            self.stop(
                f"{LONGEST_BAD_RUN} images in a row were set aside, the last as {reason}: {entry['detail']}; "
                f"fix the cause, then start the same command again{again}, or one with another --model and --output"
            )
        counts = (entry["prompt_tokens"], entry["completion_tokens"])
        if self.arguments.max_tokens_total is not None and "description" in entry and None in counts:
            self.stop("the server does not say how many tokens an answer took, so --max_tokens_total cannot be kept")
        self._watch_budget()

    def _watch_budget(self) -> None:
        budget, spent = self.arguments.max_tokens_total, self.ledger.tokens.total()
        if budget is not None and spent >= budget:
            self.stop(f"{spent:,} tokens reach --max_tokens_total {budget:,}", is_error=False)

    async def _describe(self, name: str) -> dict | None:
        """The line of an image, or None if the run stops before anything was paid for it."""
        purchase = RequestStats()
        path = self.arguments.images / name
        digest = await asyncio.to_thread(try_hash_file, path)
        try:
            path = resolve_image_path(name, self.arguments.images)
            jpeg = await asyncio.to_thread(encode_image, path, self.arguments.max_side)
        except ValueError as error:
            # Where the folder lies on this machine is not business of the file's readers.
            return self._set_aside(name, digest, purchase, "unreadable", str(error).removeprefix(f"{path}: "))
        data_url = make_data_url(jpeg)
        wait = 0.0
        try:
            while await self._wait(wait):
                outcome = await self._ask_once(name, digest, data_url, purchase)
                if isinstance(outcome, dict):
                    return outcome
                wait = outcome
        except asyncio.CancelledError:
            self.dropped += 1
            # An earlier answer was paid for, so its line is written all the same; the worker ends after it.
            if purchase.bad is None:
                raise
        if purchase.bad is None:
            return None
        return self._set_aside(name, digest, purchase, *purchase.bad)

    async def _ask_once(self, name: str, digest: str | None, data_url: str, purchase: RequestStats) -> dict | float:
        """The image's line if this request settles it, else how many seconds to wait before the next."""
        purchase.requests += 1
        try:
            reply = await self.client.ask(data_url, self.prompt.fill(name))
        except TransientError as fault:
            return self._handle_fault(name, digest, purchase, fault)
        except ImageRejected as error:
            return self._set_aside(name, digest, purchase, *(purchase.bad or ("rejected", str(error))))
        except StopAsking as error:
            self.stop(str(error))
            return 0.0
        purchase.add(reply)
        problem = classify_reply(reply)
        if problem is None:
            return {"picName": name, "description": reply.text, **self._describe_purchase(digest, purchase)}
        purchase.bad = (*problem, reply.text)
        purchase.rejected_replies += 1
        # The same limit would cut the next answer as well.
        if problem[0] == "cut" or purchase.rejected_replies >= self.arguments.attempts_on_refusal:
            return self._set_aside(name, digest, purchase, *purchase.bad)
        return backoff_seconds(purchase.rejected_replies, None, self.generator)

    def _handle_fault(
        self, name: str, digest: str | None, purchase: RequestStats, fault: TransientError
    ) -> dict | float:
        purchase.faults += 1
        if fault.wait is not None and fault.wait > LONGEST_ASKED_WAIT:
            self.stop(f"the server asks to wait {fault.wait:,.0f} s ({fault}); start the same command again then")
            return 0.0
        if purchase.faults >= self.arguments.attempts:
            return self._set_aside(name, digest, purchase, *(purchase.bad or (UNANSWERED, str(fault))))
        if str(fault) not in self._said and len(self._said) < LONGEST_BAD_RUN:
            self._said.add(str(fault))
            self.progress.say(f"{name}: {fault}; asking again" + ("" if not fault.wait else f" in {fault.wait:,.0f} s"))
        if fault.wait is not None:
            # The limit is the account's, not the image's: nobody asks before that.
            self._not_before = max(self._not_before, time.monotonic() + fault.wait)
        return backoff_seconds(purchase.faults, fault.wait, self.generator)

    async def _wait(self, seconds: float) -> bool:
        """Wait at least so long, and for the time the server asked all of us to wait. False if the run stops."""
        ready = time.monotonic() + seconds
        while not self._stopping.is_set():
            left = max(ready, self._not_before) - time.monotonic()
            if left <= 0:
                return True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), left)
        return False

    def _set_aside(
        self, name: str, digest: str | None, purchase: RequestStats, reason: str, detail: str, answer: str | None = None
    ) -> dict:
        line = {"picName": name, "set_aside": reason, "detail": self.client.clean(detail), "answer": answer}
        return {**line, **self._describe_purchase(digest, purchase)}

    def _describe_purchase(self, digest: str | None, purchase: RequestStats) -> dict:
        return {
            "model": self.client.endpoint.model,
            "endpoint": self.client.endpoint.host,
            "prompt": self.prompt.fingerprint,
            "prompt_tokens": purchase.prompt_tokens,
            "completion_tokens": purchase.completion_tokens,
            "attempts": purchase.requests,
            "seconds": round(time.monotonic() - purchase.start, 2),
            "sha256": digest,
        }
