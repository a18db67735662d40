# SPDX-License-Identifier: Apache-2.0
"""Serving engines whose verified law is the ensemble's: a package for each, imported late.

An engine is no dependency: its package needs what its door says, and nothing else here imports it.
To add an engine, add its package, its room in tests/test_rooms.py and its part of docs/engines.md.
"""
