"""Streamers: what generate() tells as it goes. put(ids) first gives the prompt, then each token; end() closes.

Bytes of an unfinished character are held back, and nothing else: a word appears with its last token, not with the next
word's. tokenizer needs `decode_bytes(ids, skip_special_tokens=)`, as the project's own has.
"""

import asyncio
import codecs
import queue


class TextStreamer:
    """Prints the text as it is generated."""

    def __init__(self, tokenizer, skip_prompt=False, skip_special_tokens=False):
        self.tokenizer = tokenizer
        self.skip_prompt = skip_prompt
        self.skip_special_tokens = skip_special_tokens
        self._restart()

    def put(self, ids):
        """ids: a tensor of token ids of one row."""
        ids = ids.flatten().tolist()
        is_prompt, self._expects_prompt = self._expects_prompt, False
        if is_prompt and self.skip_prompt:
            return
        text = self._utf8.decode(self.tokenizer.decode_bytes(ids, skip_special_tokens=self.skip_special_tokens))
        if text:
            self.on_text(text)

    def end(self):
        text = self._utf8.decode(b"", final=True)  # a character that never came to its end, as U+FFFD
        self._restart()
        if text:
            self.on_text(text)
        self.on_end()

    def on_text(self, text):
        print(text, end="", flush=True)

    def on_end(self):
        print(flush=True)

    def _restart(self):
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
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

    def __iter__(self):
        return self

    def __next__(self):
        piece = self._pieces.get(timeout=self.timeout)
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

    def __aiter__(self):
        return self

    async def __anext__(self):
        piece = await asyncio.wait_for(self._pieces.get(), self.timeout)
        if piece is None:
            raise StopAsyncIteration
        return piece
