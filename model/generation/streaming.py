"""Streamers: what generate() tells as it goes. put(ids) first gives the prompt, then each token; end() closes.

If generate() raises, fail(error) closes instead: who reads from another thread gets the error, and does not wait.

An incomplete UTF-8 sequence is held back, and nothing else: a word appears with its last token, not with the next
word's. That is the tokenizer's work: it needs `stream_decoder(skip_special_tokens=)`, as the project's own has.
"""

import asyncio
import functools
import queue
import sys
from typing import Any

import torch

from model.terminal import shown


def tells_streamer(generate):
    """Lets a streamer know of what generate(..., streamer=) raises."""

    @functools.wraps(generate)
    def telling(*args, streamer=None, **kwargs):
        try:
            return generate(*args, streamer=streamer, **kwargs)
        except BaseException as error:
            if hasattr(streamer, "fail"):
                streamer.fail(error)
            elif hasattr(streamer, "end"):  # somebody else's, whose reader would wait
                streamer.end()
            raise

    return telling


class TextStreamer:
    """Prints the text as it is generated; on a terminal, characters that would steer it are escaped."""

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, skip_special_tokens: bool = False) -> None:
        if not hasattr(tokenizer, "stream_decoder"):
            raise TypeError(
                f"{type(self).__name__}: tokenizer is {type(tokenizer).__name__}; "
                "it must have stream_decoder(skip_special_tokens=), as tokenizer.GPT2Tokenizer has"
            )
        self._expects_prompt = True
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._restart()

    def put(self, ids: torch.Tensor) -> None:
        """ids: a tensor of token ids of one row."""
        is_prompt, self._expects_prompt = self._expects_prompt, False
        if is_prompt and self.skip_prompt:
            return
        text = self._decoder.push(ids.flatten().tolist())
        if text:
            self.on_text(text)

    def end(self) -> None:
        text = self._decoder.finish()  # an incomplete character, as U+FFFD
        self._restart()
        if text:
            self.on_text(text)
        self.on_end()

    def fail(self, error: BaseException) -> None:
        """generate() has raised `error`: what is held back is dropped, and the streamer may be used again."""
        self._restart()
        self.on_error(error)

    def on_text(self, text: str) -> None:
        print(shown(text, sys.stdout), end="", flush=True)

    def on_end(self) -> None:
        print(flush=True)

    def on_error(self, error: BaseException) -> None:
        """The caller of generate(), who also reads here, sees the error itself."""

    def _restart(self):
        self._decoder = self.tokenizer.stream_decoder(skip_special_tokens=self.skip_special_tokens)
        self._expects_prompt = True


class TextIteratorStreamer(TextStreamer):
    """An iterator over the text, for a thread that runs generate() and another that reads.

    timeout: seconds to wait for the next piece; then queue.Empty is raised.
    """

    def __init__(self, tokenizer, skip_prompt=False, skip_special_tokens=False, timeout=None):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens)
        self.timeout = timeout
        self._pieces = queue.Queue()

    def on_text(self, text):
        self._pieces.put(text)

    def on_end(self):
        self._pieces.put(None)

    def on_error(self, error):
        self._pieces.put(error)

    def __iter__(self):
        return self

    def __next__(self):
        piece = self._pieces.get(timeout=self.timeout)
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            raise StopIteration
        return piece


class AsyncTextIteratorStreamer(TextStreamer):
    """An async iterator over the text; generate() runs in another thread. Made inside the event loop that reads it.

    timeout: seconds to wait for the next piece; then asyncio.TimeoutError is raised.
    """

    def __init__(self, tokenizer, skip_prompt=False, skip_special_tokens=False, timeout=None):
        super().__init__(tokenizer, skip_prompt, skip_special_tokens)
        self.timeout = timeout
        self._loop = asyncio.get_running_loop()
        self._pieces = asyncio.Queue()

    def on_text(self, text):
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, text)

    def on_end(self):
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, None)

    def on_error(self, error):
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, error)

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await asyncio.wait_for(self._pieces.get(), self.timeout)
        if isinstance(piece, BaseException):
            raise piece
        if piece is None:
            raise StopAsyncIteration
        return piece
