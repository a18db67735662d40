# SPDX-License-Identifier: Apache-2.0
"""Training for speculation: the weight head of DIVERSED (`diversed.py`) and drafts (`distil.py`).

`settings.py` holds all that shapes a run, `examples.py` the data, `batches.py` what a step takes of
it, `rewards.py` what a text is worth (`trial.py`: whether it passes tests), `rollouts.py` how the
ensemble writes and what a head's gradient needs, `front.py` the comparison with static weights,
`loop.py` the optimiser's steps and their checkpoints. The commands `specens train` are
`cli/train_head.py` and `cli/train_draft.py`.
"""
