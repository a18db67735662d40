# SPDX-License-Identifier: Apache-2.0
"""One call of generate: turns over the rows of a batch, and what a schedule may ask of them."""
