# SPDX-License-Identifier: Apache-2.0
"""The commands `specens methods` and `specens probe`: what there is, and what a model can do."""

from dataclasses import asdict
from typing import Annotated

import typer

from specens.cli import loading, options


def methods(as_json: options.Json = False) -> None:
    """List the methods of `generate --method`: their law, what they need, when to use them."""
    from specens.cli import output, tables
    from specens.methods import METHODS

    if as_json:
        keys = ("name", "law", "lossless", "needs", "use", "source")
        facts = [{key: getattr(method, key) for key in keys} for method in METHODS.values()]
        output.write_json(facts)
    else:
        output.console().print(tables.methods_table(METHODS.values()))


def probe(
    model: Annotated[str, typer.Argument(help="Folder, hub name, or family:code.")],
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: options.Json = False,
) -> None:
    """Run a model in a few tiny forwards and say how it can be decoded exactly."""
    how = loading.Loading(dtype, device, trust_remote_code=trust_remote_code)
    loading.check_names("model", [model])

    from specens.cli import output, tables
    from specens.members.probe import probe as examine

    loaded, _ = loading.load([model], how)
    abilities = examine(loaded[0])
    if as_json:
        facts = asdict(abilities)
        del facts["layout"]
        output.write_json(facts)
    else:
        output.console().print(tables.probe_table(abilities))
