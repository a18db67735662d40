# SPDX-License-Identifier: Apache-2.0
"""Causal LMs that take part: how each is run exactly, what it keeps, and how drafts are made."""
