# SPDX-License-Identifier: Apache-2.0
"""An ensemble as the loop of transformers' `generate`: a file that stands in `custom_generate/`.

    model.generate(**inputs, custom_generate=FOLDER, trust_remote_code=True, members=[other])

`specens export custom_generate FOLDER` copies it as it is. It needs `specens` to be installed.
"""

from inspect import signature
from typing import Any

from specens import SpeculativeDecoder


def generate(inputs: Any = None, *, model: Any, members: Any = (), **options: Any) -> Any:
    """Continue a prompt by the ensemble of a model and others.

    Every call makes a decoder, which runs each model in a few tiny forwards: for many calls, make
    one and hand it over, `custom_generate=decoder`.

    Args:
        inputs: (B, S) int64. Prompts, left-padded; or input_ids= and attention_mask=.
        model: the first member. transformers hands it over.
        members: further causal LMs of the ensemble; none leaves the model's own law.
        options: what `SpeculativeDecoder` takes (weights, ensemble, schedule, draft, acceptance,
            seed, ...), and what `model.generate` takes. An assistant_model is the draft.
    Returns:
        What `SpeculativeDecoder.generate` returns.
    """
    if options.get("custom_generate") is not None:
        # A model that was loaded with this file has it for its `generate`, which decoders call.
        return type(model).generate(model, inputs, **options)
    assistant = options.pop("assistant_model", None)
    if assistant is not None:
        options.setdefault("draft", assistant)
        options.setdefault("schedule", "speculative")
    names = signature(SpeculativeDecoder).parameters
    settings = {name: options.pop(name) for name in names if name in options}
    return SpeculativeDecoder([model, *members], **settings).generate(inputs, **options)
