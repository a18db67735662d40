# SPDX-License-Identifier: Apache-2.0
"""Streamers get every token; a call that they nest or break leaves the decoder usable."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from decoders import SCHEDULES, VOCAB_SIZE, decoder, same
from torch import Tensor
from toys import prompts
from transformers import TextIteratorStreamer, TextStreamer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("skip_prompt", [False, True])
@pytest.mark.parametrize("schedule", ["plain", *SCHEDULES])
def test_streamers_get_every_token(skip_prompt, schedule, models, tokenizer):
    fast = decoder(models, 2, schedule)
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=skip_prompt, timeout=60)
    texts: list[Tensor] = []
    thread = threading.Thread(
        target=lambda: texts.append(fast.generate(**settings, streamer=streamer))
    )
    thread.start()
    pieces = list(streamer)  # ends only if `end` is called
    thread.join()
    written = texts[0][0, 5 if skip_prompt else 0 :]
    assert "".join(pieces) == tokenizer.decode(written)
    assert len(pieces) > 3


def test_a_streamer_gets_what_transformers_would_give_it(models, tokenizer, capsys):
    class Log(TextStreamer):
        def __init__(self) -> None:
            super().__init__(tokenizer)
            self.puts: list[Tensor] = []
            self.ends = 0

        def put(self, value: Tensor) -> None:
            self.puts.append(value.clone())
            super().put(value)

        def end(self) -> None:
            self.ends += 1
            super().end()

    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 20, "do_sample": False}
    theirs, ours = Log(), Log()
    expected = models[0].generate(**settings, streamer=theirs)
    printed = capsys.readouterr().out
    decoder(models, 1, "draft").generate(**settings, streamer=ours)
    assert capsys.readouterr().out == printed == tokenizer.decode(expected[0]) + "\n"
    assert ours.ends == theirs.ends == 1
    same(ours.puts[0], settings["input_ids"])
    assert all(put.dim() == 1 and put.device.type == "cpu" for put in ours.puts[1:])
    same(torch.cat(ours.puts[1:]), expected[0, 5:])


def test_a_streamer_does_not_arrive_through_the_models_generate(models):
    """Why README sends streamers to `decoder.generate`; where this fails, it need not any more."""
    sink = Meddler(lambda: None)
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 8, "do_sample": False}
    models[0].generate(**settings, streamer=sink, custom_generate=decoder(models, 1, "draft"))
    assert sink.puts == 1


def test_a_streamer_takes_one_row(models):
    class Sink:
        def put(self, value: Tensor) -> None: ...
        def end(self) -> None: ...

    fast = decoder(models, 2, "alternating")
    with pytest.raises(ValueError, match=r"^generate: streamer: expected batch size 1, got 2$"):
        fast.generate(**prompts((5, 2), VOCAB_SIZE), max_new_tokens=4, streamer=Sink())


class Meddler:
    """A streamer that calls `act` once, at the first tokens written, and keeps what it raised."""

    def __init__(self, act: Any) -> None:
        self.act = act
        self.raised: list[Exception] = []
        self.puts = 0

    def put(self, value: Tensor) -> None:
        self.puts += 1
        if self.puts == 2:  # the prompt came first
            try:
                self.act()
            except RuntimeError as error:
                self.raised.append(error)

    def end(self) -> None: ...


@pytest.mark.parametrize("elsewhere", [False, True])
def test_one_call_at_a_time(elsewhere, models):
    """A nested or concurrent call is refused at once and changes nothing of the first."""
    fast = decoder(models, 2, "alternating")
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 12, "do_sample": False}
    expected = fast.generate(**settings)

    def again() -> None:
        fast.generate(**prompts((3, 2), VOCAB_SIZE), max_new_tokens=4, do_sample=False)

    def from_a_thread() -> None:
        with ThreadPoolExecutor(1) as threads:
            threads.submit(again).result(timeout=60)

    meddler = Meddler(from_a_thread if elsewhere else again)
    same(fast.generate(**settings, streamer=meddler), expected)
    (error,) = meddler.raised
    assert str(error).startswith("generate: decoder: expected one call at a time, got another")
    again()  # now it may


def test_a_call_that_fails_leaves_the_decoder_usable(models):
    class Broken(Meddler):
        def put(self, value: Tensor) -> None:
            super().put(value)
            if self.puts > 2:
                raise OSError("full")

    fast = decoder(models, 2, "alternating")
    settings = {**prompts((5,), VOCAB_SIZE), "max_new_tokens": 12, "do_sample": False}
    expected = fast.generate(**settings)
    with pytest.raises(OSError, match="full"):
        fast.generate(**settings, streamer=Broken(lambda: copy.deepcopy(fast).generate(**settings)))
    same(fast.generate(**settings), expected)
