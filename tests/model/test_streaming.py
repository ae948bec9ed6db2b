"""Streamers give the text piece by piece, and hold back nothing but unfinished characters."""

import asyncio
import queue
import threading

import pytest
import torch
from peers import TALKATIVE, spread, tiny_config

from model import GPT2
from model.generation.streaming import AsyncTextIteratorStreamer, TextIteratorStreamer, TextStreamer
from tokenizer import StreamDecoder

TEXT = "naïve 世界 🙂!"


class Bytes:
    """A tokenizer with a token for each byte; 0 is special."""

    def stream_decoder(self, skip_special_tokens=False):
        return StreamDecoder(self, skip_special_tokens=skip_special_tokens)

    def decode_bytes(self, ids, skip_special_tokens=False):
        return bytes(i for i in ids if i or not skip_special_tokens)

    def _known_bytes(self, ids, skip_special_tokens, function):
        return self.decode_bytes(ids, skip_special_tokens)


def feed(streamer, *pieces):
    for piece in pieces:
        streamer.put(torch.tensor(list(piece)))
    streamer.end()


class Collected(TextStreamer):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pieces, self.ended = [], 0

    def on_text(self, text):
        self.pieces.append(text)

    def on_end(self):
        self.ended += 1


def test_each_character_comes_with_its_last_byte():
    streamer = Collected(Bytes())
    feed(streamer, b"", *(bytes([byte]) for byte in TEXT.encode()))
    assert streamer.pieces == list(TEXT)
    assert streamer.ended == 1


def test_an_unfinished_character_is_shown_as_such_at_the_end_and_not_carried_over():
    streamer = Collected(Bytes())
    feed(streamer, b"a", "世".encode()[:2])
    feed(streamer, b"b")
    assert streamer.pieces == ["a", "\ufffd", "b"]


def test_the_prompt_and_special_tokens_are_left_out_on_request():
    streamer = Collected(Bytes(), skip_prompt=True, skip_special_tokens=True)
    feed(streamer, b"prompt", b"a", b"\0", b"b")
    feed(streamer, b"prompt", b"c")
    assert streamer.pieces == ["a", "b", "c"]


def test_text_streamer_prints(capsys):
    feed(TextStreamer(Bytes()), b"ab", "世".encode(), b"c")
    assert capsys.readouterr().out == "ab世c\n"


@pytest.fixture
def model():
    return spread(GPT2(tiny_config(vocab_size=128, eos_token_id=None, bos_token_id=None)), TALKATIVE).eval()


def test_generate_streams_what_it_returns(model):
    streamer = Collected(Bytes())
    for options in ({}, {"do_sample": True, "seed": 1}, {"prompt_lookup_num_tokens": 4}):
        streamer.pieces.clear()
        out = model.generate([[65, 66]], streamer=streamer, max_new_tokens=20, **options)
        assert "".join(streamer.pieces) == bytes(out[0].tolist()).decode()
        assert len(streamer.pieces) == 21  # the prompt, then a token at a time


def test_the_iterator_reads_in_another_thread(model):
    streamer = TextIteratorStreamer(Bytes(), skip_prompt=True, timeout=60)
    thread = threading.Thread(target=model.generate, args=([[65]],), kwargs={"streamer": streamer, "max_new_tokens": 9})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert len(pieces) == 9
    with pytest.raises(queue.Empty):
        next(TextIteratorStreamer(Bytes(), timeout=0.01))


def test_the_async_iterator_reads_in_the_event_loop(model):
    async def read():
        streamer = AsyncTextIteratorStreamer(Bytes(), skip_prompt=True, timeout=60)
        task = asyncio.create_task(asyncio.to_thread(model.generate, [[65]], streamer=streamer, max_new_tokens=9))
        pieces = [piece async for piece in streamer]
        await task
        return pieces

    assert len(asyncio.run(read())) == 9

    async def wait():
        await anext(AsyncTextIteratorStreamer(Bytes(), timeout=0.01))

    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(wait())


def wrong(*_):
    raise RuntimeError("a criterion's own")


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0, "do_sample": True}, {"stopping_criteria": [wrong]}, {"x": 1}]
)
def test_who_reads_gets_what_generate_raises_and_does_not_wait(model, options):
    streamer = TextIteratorStreamer(Bytes(), timeout=60)
    raised = []

    def work():
        try:
            model.generate([[65]], streamer=streamer, max_new_tokens=9, **options)
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    with pytest.raises((ValueError, TypeError, RuntimeError)) as seen:
        list(streamer)
    thread.join()
    assert seen.value is raised[0]


def test_who_reads_in_the_event_loop_gets_it_too(model):
    async def read():
        streamer = AsyncTextIteratorStreamer(Bytes(), timeout=60)
        task = asyncio.create_task(asyncio.to_thread(model.generate, [[65]], streamer=streamer, max_new_tokens=-1))
        try:
            with pytest.raises(ValueError, match="max_new_tokens"):
                [piece async for piece in streamer]
        finally:
            await asyncio.gather(task, return_exceptions=True)

    asyncio.run(read())


def test_somebody_elses_streamer_is_ended(model):
    class Theirs:
        ended = 0

        def end(self):
            self.ended += 1

    theirs = Theirs()
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate([[65]], streamer=theirs, max_new_tokens=-1)
    assert theirs.ended == 1


def test_half_a_character_does_not_outlive_an_error(model):
    streamer = Collected(Bytes())
    streamer.put(torch.tensor(list("世".encode()[:2])))
    with pytest.raises(ValueError, match="max_new_tokens"):
        model.generate([[65]], streamer=streamer, max_new_tokens=-1)
    feed(streamer, b"a")
    assert streamer.pieces == ["a"]


def test_a_tokenizer_that_cannot_stream_is_refused():
    with pytest.raises(TypeError, match=r"TextIteratorStreamer: tokenizer is object; it must have stream_decoder"):
        TextIteratorStreamer(object())


def test_a_terminal_is_not_steered_and_a_pipe_gets_the_text(capsys, monkeypatch):
    feed(TextStreamer(Bytes()), b"a\x1b", b"[2Jb\r\n\tc", "\x9b\u202e".encode())
    assert capsys.readouterr().out == "a\x1b[2Jb\r\n\tc\x9b\u202e\n"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    feed(TextStreamer(Bytes()), b"a\x1b", b"[2Jb\r\n\tc", "\x9b\u202e".encode())
    assert capsys.readouterr().out == "a\\x1b[2Jb\\r\n\tc\\x9b\\u202e\n"
